"""One guidance scale a step: each step is that of a request with this scale alone, and replay follows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import assert_same_bits

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES

REQUEST: dict[str, Any] = {
    "prompt": "a red apple on a wooden table",
    "negative_prompt": "blurry",
    "height": 64,
    "width": 64,
    "seed": 5,
    "num_inference_steps": 4,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "debug_mode": True,
}
# With guidance, without, with more, and at the scale from which on some pipelines guide.
SCALES = (3.0, 0.0, 6.5, 1.0)


def assert_each_step_is_that_of_its_scale(engine: Engine, rollout: Rollout, scales: tuple[float, ...]) -> None:
    """A run of one step from each recorded state, with one scale for all."""
    trajectory = rollout.dit_trajectory
    assert trajectory is not None and rollout.debug_tensors is not None
    for step, scale in enumerate(scales):
        alone = engine.rollout(
            **{**REQUEST, "seed": None, "sde_seed": 5},
            latents=trajectory.latents[step],
            start_step=step,
            stop_step=step + 1,
            guidance_scale=scale,
        )[0]
        assert torch.equal(alone.dit_trajectory.latents[-1], trajectory.latents[step + 1]), step
        assert torch.equal(alone.debug_tensors.model_output[step], rollout.debug_tensors.model_output[step]), step


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_every_step_is_that_of_a_request_with_its_scale(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str
) -> None:
    engine = engine_of(name, dtype)
    (rollout,) = engine.rollout(**REQUEST, guidance_scales=SCALES)
    assert rollout.sampling.guidance_scales == SCALES
    assert_each_step_is_that_of_its_scale(engine, rollout, SCALES)
    (constant,) = engine.rollout(**REQUEST, guidance_scale=3.0)
    (alike,) = engine.rollout(**REQUEST, guidance_scales=(3.0,) * 4)
    assert torch.equal(alike.image, constant.image) and not torch.equal(rollout.image, constant.image)
    log_probs = replay.log_prob(pipeline_of(name, dtype).transformer, [rollout, alike], micro_batch=3).detach().cpu()
    assert torch.equal(log_probs, torch.stack([rollout.log_probs, alike.log_probs]))
    scores = replay.score(pipeline_of(name, dtype).transformer, [rollout])
    assert torch.equal(scores.velocities[0].detach().cpu(), rollout.debug_tensors.model_output)
    assert replay.audit(pipeline_of(name, dtype).transformer, [rollout]).is_exact
    one = engine.score(
        latents=rollout.dit_trajectory.latents[2],
        next_latents=rollout.dit_trajectory.latents[3],
        step=2,
        env=rollout.denoising_env,
        record=rollout.sampling,
    )
    assert torch.equal(one.log_prob, rollout.log_probs[2])


@pytest.mark.parametrize("name", ["z_image", "flux"])
def test_samples_of_other_scales_run_beside_it(engine_of: Callable[[str, str], Engine], name: str) -> None:
    engine = engine_of(name, "float32")
    given = [{"guidance_scales": SCALES}, {"guidance_scale": 3.0}, {"guidance_scales": SCALES[::-1]}, {"guidance_scale": 0.0}]
    requests = [{**REQUEST, "request_id": str(number), **one} for number, one in enumerate(given)]
    alone = [engine.rollout(**request)[0] for request in requests]
    futures = [engine.submit(engine.plan(SamplingParams(**request)), "rollout") for request in requests]
    for future, expected in zip(futures, alone, strict=True):
        assert_same_bits(future.result(60)[0], expected)


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_the_audit_names_a_step_with_another_scale(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    (rollout,) = engine_of(name, "float32").rollout(**REQUEST, guidance_scales=(3.0, 3.0, 6.5, 3.0))
    wrong = replace(rollout, sampling=replace(rollout.sampling, guidance_scales=(3.0, 3.0, 5.0, 6.5)))
    report = replay.audit(pipeline_of(name, "float32").transformer, [wrong])
    assert not report.is_exact and {cause.kind for cause in report.causes} == {"guidance"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"guidance_scales": (3.0,)}, "hold one scale for each of the 4 steps, got 1"),
        ({"guidance_scales": (3.0,), "num_inference_steps": None}, r"hold one scale for each of the \d+ steps, got 1"),
        ({"guidance_scales": ()}, "hold one scale a step"),
        ({"guidance_scales": (3.0, -1.0, 3.0, 3.0)}, "hold numbers from 0 to 1000"),
        ({"guidance_scales": (3.0, float("nan"), 3.0, 3.0)}, "hold numbers from 0 to 1000"),
        ({"guidance_scales": SCALES, "guidance_scale": 3.0}, "be given without guidance_scale, got 'both'"),
        ({"guidance_scales": SCALES, "true_cfg_scale": 3.0}, "be given without true_cfg_scale for z_image"),
    ],
)
def test_what_is_wrong_is_refused(engine_of: Callable[[str, str], Engine], values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^guidance_scales must {words}") as caught:
        engine_of("z_image", "float32").rollout(**{**REQUEST, **values})
    assert caught.value.field == "guidance_scales"


def test_every_family_is_covered() -> None:
    assert {name for name, _ in FAMILY_WITH_DTYPE} == set(FAMILIES)
