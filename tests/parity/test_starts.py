"""Runs that start from given latents: the rest of a recorded run, bit for bit, and the pipeline's own start."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.guiding import in_words_of
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import assert_same_bits

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.sampling.noise import initial_noise
from flowroll.types import branch_digest

REQUEST: dict[str, Any] = {"prompt": "a green bottle", "height": 64, "width": 64, "num_inference_steps": 4}
ALL: dict[str, Any] = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
EngineOf = Callable[[str, str], Engine]
PipelineOf = Callable[[str, str], Any]


def states(rollout: Rollout) -> torch.Tensor:
    assert rollout.dit_trajectory is not None
    return rollout.dit_trajectory.latents


def assert_is_the_rest(part: Rollout, whole: Rollout, start: int) -> None:
    """Everything of the steps from `start` on has the bits of the whole run; the rows of the others are zeros."""
    assert part.dit_trajectory is not None and whole.dit_trajectory is not None
    assert part.debug_tensors is not None and whole.debug_tensors is not None
    assert part.log_probs is not None and whole.log_probs is not None
    num_steps = whole.sampling.num_inference_steps
    assert part.dit_trajectory.latent_step_indices == tuple(range(start, num_steps + 1))
    assert states(part).dtype == states(whole).dtype and torch.equal(states(part), states(whole)[start:])
    assert torch.equal(part.dit_trajectory.sigmas, whole.dit_trajectory.sigmas)
    assert torch.equal(part.dit_trajectory.timesteps, whole.dit_trajectory.timesteps)
    for name in ("variance_noise", "prev_sample_mean", "noise_std_dev", "model_output"):
        ours, theirs = getattr(part.debug_tensors, name), getattr(whole.debug_tensors, name)
        assert ours.shape == theirs.shape and torch.equal(ours[start:], theirs[start:]), name
        assert not ours[:start].any(), name
    assert part.log_probs.shape == whole.log_probs.shape and torch.equal(part.log_probs[start:], whole.log_probs[start:])
    assert not part.log_probs[:start].any()
    assert part.sde_step_indices == tuple(step for step in whole.sde_step_indices or () if step >= start)
    assert torch.equal(part.image, whole.image)


# The last step of cps has no density, and follows the dynamics or not depending on the others.
WINDOWS = [
    {},
    {"sde_type": "cps"},
    {"sde_type": "cps", "sde_step_indices": (2,)},
    {"rollout_steps": ({}, {}, {"dynamics": "dance"}, {})},
]


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
@pytest.mark.parametrize("options", WINDOWS, ids=["sde", "cps", "cps window", "steps"])
def test_a_run_from_a_recorded_state_is_the_rest_of_the_run(
    engine_of: EngineOf, pipeline_of: PipelineOf, family: str, dtype: str, options: dict[str, Any]
) -> None:
    engine = engine_of(family, dtype)
    request = in_words_of(family, {**REQUEST, **ALL, "guidance_scale": 3.0, **options})
    group = engine.rollout(**request, seed=5, num_outputs_per_prompt=2)
    for start in (0, 2):
        latents = torch.stack([states(rollout)[start] for rollout in group])
        again = engine.rollout(**request, seed=5, num_outputs_per_prompt=2, latents=latents, start_step=start)
        for sample, (part, whole) in enumerate(zip(again, group, strict=True)):
            assert_is_the_rest(part, whole, start)
            record = part.sampling
            assert (record.start_step, record.init_seed, record.sde_seed) == (start, None, 5 + sample)
            # At step 0 a state in float32 that the pipeline's noise dtype holds exactly is taken as that.
            as_taken = states(whole)[start].to(states(part).dtype)
            if start:
                assert record.latents_sha256 == branch_digest({"latents": as_taken})
        transformer = pipeline_of(family, dtype).transformer
        log_probs = replay.log_prob(transformer, again).detach().cpu()
        assert torch.equal(log_probs, torch.stack([part.log_probs for part in again if part.log_probs is not None])[:, start:])
        scores = replay.score(transformer, again)
        assert scores.steps == tuple(range(start, 4))
        for sample, part in enumerate(again):
            assert part.debug_tensors is not None
            assert torch.equal(scores.means[sample].detach().cpu(), part.debug_tensors.prev_sample_mean[start:])


def test_one_state_may_be_everybodys_start(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    (whole,) = engine.rollout(**REQUEST, **ALL, seed=5)
    before = engine.scheduler.load().steps
    group = engine.rollout(**REQUEST, **ALL, seeds=(5, 6), latents=states(whole)[1], start_step=1)
    assert engine.scheduler.load().steps - before == 2 * 3
    assert_is_the_rest(group[0], whole, 1)
    assert torch.equal(states(group[1])[0], states(whole)[1]) and not torch.equal(states(group[1])[1], states(whole)[2])


def latents_of(pipeline: Any, state: torch.Tensor, noise: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What the pipeline makes of given latents: some take them as their loop has them, others as they draw noise."""
    known = inspect.signature(pipeline.__call__).parameters
    if "true_cfg_scale" in known:
        arguments["true_cfg_scale"] = 1.0
    arguments = {name: value for name, value in arguments.items() if name in known}
    # Of the last step, since some pipelines return latents that are scaled for the VAE.
    last: dict[str, torch.Tensor] = {}
    arguments["callback_on_step_end"] = lambda _, __, ___, tensors: last.update(tensors) or {}
    with torch.no_grad():
        try:
            pipeline(**arguments, latents=state[None], output_type="latent")
        except ValueError:
            pipeline(**arguments, latents=noise, output_type="latent")
    return last["latents"][0].cpu()


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_a_picture_from_latents_is_the_pipelines(engine_of: EngineOf, pipeline_of: PipelineOf, family: str, dtype: str) -> None:
    engine, pipeline = engine_of(family, dtype), pipeline_of(family, dtype)
    (drawn,) = engine.rollout(**REQUEST, **ALL, seed=9)
    start, model = states(drawn)[0], engine._model
    kept = model.family.noise_dtype(model.dtype)
    shape = engine.plan(SamplingParams(**REQUEST)).geometry.noise_shape
    noise = initial_noise(9, shape, dtype=kept, device=engine.info.device)
    theirs = latents_of(pipeline, start.to(engine.info.device, kept), noise, **REQUEST, guidance_scale=0.0)
    (ours,) = engine.generate(**REQUEST, guidance_scale=0.0, latents=start)
    assert torch.equal(ours.latents, theirs)
    assert not torch.equal(ours.latents, engine.generate(**REQUEST, guidance_scale=0.0, seed=10)[0].latents)


def test_what_is_sent_may_change_afterwards(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    (whole,) = engine.rollout(**REQUEST, **ALL, seed=5)
    latents = states(whole)[2].clone()
    plan = engine.plan(SamplingParams(**REQUEST, **ALL, seed=5, latents=latents, start_step=2))
    latents.zero_()
    assert_is_the_rest(engine.rollout(plan)[0], whole, 2)


@pytest.mark.parametrize(
    ("field", "fields", "message"),
    [
        (
            "latents",
            {"latents": torch.zeros(3, 3)},
            r"have the shape \[16, 8, 8\] at 64 x 64, or \[1, 16, 8, 8\] for 1 samples",
        ),
        ("latents", {"latents": torch.zeros(2, 16, 8, 8)}, "have the shape"),
        ("latents", {"latents": torch.zeros(16, 8, 8, dtype=torch.float16)}, "be torch.float32.*they are not cast"),
        ("latents", {"latents": torch.full((16, 8, 8), float("nan"))}, "be finite"),
        ("start_step", {"latents": torch.zeros(16, 8, 8), "start_step": 4}, r"lie in 0\.\.3 for 4 steps, got 4"),
        ("start_step", {"start_step": 1}, "be given with latents"),
        ("init_seed", {"latents": torch.zeros(16, 8, 8), "init_seed": 3}, "be left out beside latents"),
        ("start_step", {"latents": torch.zeros(16, 8, 8), "start_step": 2, "sde_type": "dpmpp2m"}, "needs no prediction"),
        (
            "rollout_return_step_indices",
            {"latents": torch.zeros(16, 8, 8), "start_step": 2, "rollout_return_step_indices": (1, 4)},
            r"lie in 2\.\.4 for a run of the steps 2 to 3, got 1",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(engine_of: EngineOf, field: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine_of("z_image", "float32").plan(SamplingParams(**REQUEST, **fields))
    assert caught.value.field == field


def test_initial_noise_that_the_pipeline_would_round_is_refused(engine_of: EngineOf) -> None:
    engine = engine_of("qwen_image", "bfloat16")
    state = torch.full(engine.plan(SamplingParams(**REQUEST)).geometry.latent_shape, 0.1)
    with pytest.raises(InvalidRequestError, match=r"be values of torch\.bfloat16 at step 0.*round them"):
        engine.plan(SamplingParams(**REQUEST, latents=state))
    engine.plan(SamplingParams(**REQUEST, latents=state.to(torch.bfloat16)))
    engine.plan(SamplingParams(**REQUEST, latents=state, start_step=1))


def test_steps_that_were_not_run_cannot_be_replayed(engine_of: EngineOf, pipeline_of: PipelineOf) -> None:
    (whole,) = engine_of("z_image", "float32").rollout(**REQUEST, **ALL, seed=5)
    (part,) = engine_of("z_image", "float32").rollout(**REQUEST, **ALL, seed=5, latents=states(whole)[2], start_step=2)
    transformer = pipeline_of("z_image", "float32").transformer
    with pytest.raises(InvalidRequestError, match="among the steps that were run, got 1, where rollout 0 ran 2 to 3"):
        replay.log_prob(transformer, [part], steps=[1, 2])
    with pytest.raises(InvalidRequestError, match="steps 0 to 3 and steps 2 to 3"):
        replay.log_prob(transformer, [whole, part])
    assert replay.audit(transformer, [part]).is_exact


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
@pytest.mark.parametrize("options", WINDOWS[:3], ids=["sde", "cps", "cps window"])
def test_a_run_that_stops_early_is_the_beginning_of_the_run(
    engine_of: EngineOf, pipeline_of: PipelineOf, family: str, dtype: str, options: dict[str, Any]
) -> None:
    engine = engine_of(family, dtype)
    request = {**REQUEST, **ALL, **options, "seed": 5}
    (whole,) = engine.rollout(**request)
    before = engine.scheduler.load().steps
    (part,) = engine.rollout(**request, stop_step=3)
    assert engine.scheduler.load().steps - before == 3
    assert part.image is None and part.latents is not None and part.log_probs is not None
    assert (part.sampling.start_step, part.sampling.stop_step, part.sampling.image_format) == (0, 3, "none")
    assert part.dit_trajectory is not None and part.dit_trajectory.latent_step_indices == (0, 1, 2, 3)
    assert torch.equal(states(part).to(states(whole).dtype), states(whole)[:4])
    assert torch.equal(part.latents, states(part)[-1].to(part.latents.dtype))
    assert whole.log_probs is not None and torch.equal(part.log_probs[:3], whole.log_probs[:3]) and part.log_probs[3] == 0
    assert part.sde_step_indices == tuple(step for step in whole.sde_step_indices or () if step < 3)
    scores = replay.score(pipeline_of(family, dtype).transformer, [part])
    assert scores.steps == (0, 1, 2) and torch.equal(scores.log_probs[0].detach().cpu(), part.log_probs[:3])
    (rest,) = engine.rollout(**request, latents=states(part)[-1], start_step=3)
    assert_is_the_rest(rest, whole, 3)


def test_a_state_before_the_end_is_decoded_where_a_picture_is_asked_for(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("z_image", "float32")
    (shown,) = engine.rollout(**REQUEST, **ALL, seed=5, stop_step=2, image_format="tensor")
    picture = engine.decode(states(shown)[-1], height=64, width=64)
    assert isinstance(shown.image, torch.Tensor) and torch.equal(shown.image, picture) and shown.latents is None

    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("nobody asked for a picture")

    monkeypatch.setattr(engine._pipeline.vae, "decode", decode)
    assert engine.rollout(**REQUEST, seed=5, stop_step=2)[0].image is None
    (inner,) = engine.rollout(**REQUEST, **ALL, seed=5, latents=states(shown)[1], start_step=1, stop_step=2)
    assert torch.equal(states(inner), states(shown)[1:3]) and inner.sampling.steps_run == range(1, 2)


def test_a_run_to_its_end_may_say_so(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    whole, said = (engine.rollout(**REQUEST, **ALL, seed=5, **stop)[0] for stop in ({}, {"stop_step": 4}))
    assert_same_bits(whole, said)
    for fields, message in (
        ({"stop_step": 5}, r"be at most 4 for 4 steps, got 5"),
        ({"stop_step": 2, "latents": states(whole)[2], "start_step": 2}, r"be above start_step = 2, got 2"),
        ({"stop_step": 2, "rollout": False}, "be left out of an evaluation"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            engine.plan(SamplingParams(**REQUEST, **fields))


def test_equal_requests_have_equal_latents() -> None:
    one = SamplingParams(prompt="a", latents=torch.ones(4, 4))
    assert one == replace(one, latents=torch.ones(4, 4)) and hash(one) == hash(replace(one, latents=torch.ones(4, 4)))
    assert one != replace(one, latents=torch.zeros(4, 4)) and one != replace(one, latents=None)
