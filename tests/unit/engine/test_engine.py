"""The engine's life cycle and what it refuses."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.rollouts import assert_same_bits

from flowroll import SamplingParams
from flowroll.engine import Engine, Limits
from flowroll.errors import EngineError, InvalidRequestError, ShuttingDownError
from flowroll.types import ALIASES

SMALL = {"prompt": "a bowl", "height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, limits=Limits(max_pixels=256 * 256, max_steps=300, max_outputs=3)) as engine:
        yield engine


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("height", {"height": 100}, "use 96 or 112"),
        ("width", {"width": 8}, "use 16"),
        ("height", {"height": 512, "width": 512}, "65536 pixels"),
        ("num_inference_steps", {"num_inference_steps": 301}, "300 steps"),
        ("sigmas", {"num_inference_steps": None, "sigmas": (*(1 - i / 301 for i in range(301)), 0.0)}, "300 steps"),
        ("num_outputs_per_prompt", {"num_outputs_per_prompt": 4}, "3 samples"),
        ("seeds", {"seeds": (1, 2, 3, 4)}, "3 samples"),
        ("rollout_sde_step_indices", {"sde_step_indices": (0, 2)}, "0..1"),
        ("rollout_return_step_indices", {"return_step_indices": (3,)}, "0..2"),
        ("colour", {"colour": "red"}, "field of SamplingParams"),
    ],
)
def test_a_request_off_the_models_grid_is_refused_before_model_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, field: str, values: dict[str, Any], words: str
) -> None:
    def no_model_work(*_: object) -> None:
        raise AssertionError("the model was used")

    monkeypatch.setattr(engine._pipeline.text_encoder, "forward", no_model_work)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        engine.rollout(**{**SMALL, **values})
    assert caught.value.field == field


def test_the_prompt_is_the_first_argument_and_numbers_may_be_numpys(engine: Engine) -> None:
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "noise_level": 0.5}
    expected = engine.rollout(prompt="a bowl", seeds=(3, 4), sde_step_indices=(1,), return_dit_trajectory=True, **size)
    found = engine.rollout(
        "a bowl",
        seeds=torch.tensor([3, 4]),
        height=np.int64(64),
        width=torch.tensor(64),
        num_inference_steps=np.uint8(2),
        noise_level=np.float32(0.5),
        sde_step_indices=np.array([1]),
        return_dit_trajectory=np.bool_(True),
    )
    for sample, other in zip(found, expected, strict=True):
        assert sample.seed == other.seed
        assert_same_bits(sample, other)
    size.pop("noise_level")
    [picture] = engine.generate("a bowl", seed=np.int64(3), **size)
    assert torch.equal(picture.image, engine.generate(prompt="a bowl", seed=3, **size)[0].image)


def test_a_request_given_twice_is_refused(engine: Engine) -> None:
    plan = engine.plan(SamplingParams(**SMALL))
    assert len(engine.rollout(plan)) == 1
    for ask in (engine.rollout, engine.generate):
        with pytest.raises(InvalidRequestError, match="prompt must be given once"):
            ask("a bowl", **SMALL)
        for whole in (plan, plan.params):
            with pytest.raises(InvalidRequestError, match="params must be given alone"):
                ask(whole, seed=3)
    with pytest.raises(InvalidRequestError, match="noise_level must be left out of plain generation"):
        engine.generate("a bowl", noise_level=0.5)
    with pytest.raises(InvalidRequestError, match="rollout must be left out of plain generation"):
        engine.generate(plan)


def test_a_side_beyond_the_position_table_is_refused(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, limits=Limits(max_pixels=10**9)) as engine:
        rows = engine._pipeline.transformer.config.axes_lens[1]
        engine.plan(SamplingParams(prompt="", height=rows * 16, width=16))
        with pytest.raises(InvalidRequestError, match=f"at most {rows * 16}") as caught:
            engine.plan(SamplingParams(prompt="", height=(rows + 1) * 16, width=16))
        assert caught.value.field == "height"


@pytest.mark.parametrize(
    "values",
    [
        {"sde_type": "ode"},
        {"noise_level": 0.7},
        {"rollout_noise_level": 0.7},
        {"return_dit_trajectory": False},
        {"rollout": True},
    ],
)
def test_plain_generation_refuses_rollout_fields(engine: Engine, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="plain generation") as caught:
        engine.generate(**SMALL, **values)
    assert caught.value.field == next(iter(values))


def test_plain_generation_refuses_a_request_with_rollout_fields(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="noise_level"):
        engine.generate(SamplingParams(**SMALL, rollout=False, noise_level=0.1))
    assert len(engine.generate(SamplingParams(**SMALL, rollout=False))) == 1


def test_an_evaluation_returns_the_image_alone(engine: Engine) -> None:
    rollout = engine.rollout(**SMALL, seed=1, rollout=False)[0]
    assert rollout.log_probs is rollout.debug_tensors is rollout.denoising_env is rollout.dit_trajectory is None
    assert rollout.sde_step_indices is None
    assert torch.equal(rollout.image, engine.generate(**SMALL, seed=1)[0].image)


@pytest.mark.parametrize("field", ["return_denoising_env", "rollout_return_dit_trajectory"])
def test_an_evaluation_refuses_what_it_would_not_return(engine: Engine, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must be left out of an evaluation") as caught:
        engine.rollout(**SMALL, rollout=False, **{field: True})
    assert caught.value.field == field


@pytest.mark.parametrize(("short", "field"), ALIASES.items())
def test_every_rollout_parameter_has_the_wires_name_and_a_short_one(engine: Engine, short: str, field: str) -> None:
    value = {"rollout_sde_type": "dance_sde", "rollout_noise_level": 0.3, "rollout_noise_levels": (0.3, 0)}.get(field, True)
    value = (0,) if field.endswith("indices") else value
    options = {"return_dit_trajectory": True} if "trajectory" not in field else {}
    one, other = (engine.rollout(**SMALL, **options, seed=1, **{name: value})[0] for name in (short, field))
    assert_same_bits(one, other)
    assert one.sampling == other.sampling
    with pytest.raises(InvalidRequestError, match=f"{field} must be given once, got {short} beside it"):
        engine.rollout(**SMALL, **{short: value, field: value})


def test_an_image_has_one_frame_and_any_rate(engine: Engine) -> None:
    plain = engine.rollout(**SMALL, seed=1)[0]
    for fps in (0, 24, 29.97):
        assert_same_bits(engine.rollout(**SMALL, seed=1, num_frames=1, fps=fps)[0], plain)
        assert torch.equal(
            engine.generate(**SMALL, seed=1, num_frames=1, fps=fps)[0].image, engine.generate(**SMALL, seed=1)[0].image
        )
    with pytest.raises(InvalidRequestError, match="num_frames must be None or 1, got 2"):
        engine.rollout(**SMALL, num_frames=2)


def test_each_distinct_prompt_is_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, prompts = engine._pipeline, []
    encode = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda prompt, **options: (prompts.append(prompt), encode(prompt, **options))[1]
    )
    request = {**SMALL, "prompt": "a first cup", "negative_prompt": "a saucer"}
    engine.rollout(**request, num_outputs_per_prompt=3)
    assert prompts == ["a first cup", "a saucer"]
    prompts.clear()
    engine.rollout(**{**request, "prompt": "a second cup", "negative_prompt": "a second cup"}, num_outputs_per_prompt=2)
    assert prompts == ["a second cup"]
    prompts.clear()
    engine.rollout(**{**request, "prompt": "a third cup"}, guidance_scale=0)
    assert prompts == ["a third cup"]


def test_the_effective_scale_is_true_cfg_then_guidance_then_default(engine: Engine) -> None:
    def scale(**values: float) -> float:
        return engine.plan(SamplingParams(**SMALL, **values)).guidance.scale

    assert scale() == 5.0
    assert scale(guidance_scale=2.0) == 2.0
    assert scale(guidance_scale=2.0, true_cfg_scale=3.0) == 3.0
    assert not engine.plan(SamplingParams(**SMALL, true_cfg_scale=0)).guidance.is_active


def test_the_interrupt_stops_a_running_rollout_at_its_next_step(z_image_checkpoint: Path) -> None:
    engine = Engine(z_image_checkpoint)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            engine.rollout(**{**SMALL, "num_inference_steps": 1000})
        except ShuttingDownError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    engine.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and len(caught) == 1
    with pytest.raises(ShuttingDownError):
        engine.rollout(**SMALL)
    engine.close()


def test_importing_the_trainers_side_loads_no_model_library() -> None:
    code = (
        "import sys, flowroll, flowroll.client, flowroll.families, flowroll.sampling.dynamics\n"
        "heavy = {'diffusers', 'transformers', 'fastapi', 'starlette', 'uvicorn', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_a_failure_after_the_loop_leaves_the_engine_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_peak_memory_mb", fail)
        with pytest.raises(EngineError, match="RuntimeError: no memory"):
            engine.rollout(**SMALL)
    assert len(engine.rollout(**SMALL)) == 1


def test_an_answer_that_would_not_fit_is_refused(z_image_checkpoint: Path) -> None:
    limits = Limits(max_answer_bytes=2 * 2**20)
    with Engine(z_image_checkpoint, limits=limits) as engine:
        engine.plan(SamplingParams(**SMALL))
        big = {"prompt": "", "height": 256, "width": 256, "num_inference_steps": 20}
        with pytest.raises(InvalidRequestError, match="GiB") as caught:
            engine.plan(SamplingParams(**big, debug_mode=True))
        assert caught.value.field == "num_outputs_per_prompt"
        with pytest.raises(InvalidRequestError, match="GiB"):
            engine.plan(SamplingParams(**big, debug_mode=False, return_dit_trajectory=True))
        engine.plan(SamplingParams(**big, debug_mode=False))
        engine.plan(SamplingParams(**big, debug_mode=False, return_dit_trajectory=True, return_step_indices=(20,)))


@pytest.mark.parametrize("shape", [(16, 8, 4), (1, 16, 8, 8), (16, 9, 8)])
def test_latents_of_another_size_are_not_decoded(engine: Engine, shape: tuple[int, ...]) -> None:
    assert engine.decode(torch.zeros(16, 8, 8), height=64, width=64).shape == (3, 1, 64, 64)
    with pytest.raises(InvalidRequestError, match="shape"):
        engine.decode(torch.zeros(shape), height=64, width=64)
    with pytest.raises(InvalidRequestError, match="multiple of 16"):
        engine.decode(torch.zeros(16, 8, 8), height=60, width=64)
