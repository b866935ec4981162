"""A sample's bits depend on its seed and its request, not on the samples beside it or on what is recorded."""

from collections.abc import Callable

import pytest
import torch
from tests.pairs import DTYPES, dealt, paired
from tests.rollouts import assert_same_bits, tensors_of

from flowroll import SamplingParams
from flowroll.engine import Engine
from flowroll.families import FAMILIES
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.sampling.noise import step_noise
from flowroll.types import GeneratorDevice

ALL = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
REQUEST = {"prompt": "a pink handbag and black scissors", "height": 64, "width": 96, "num_inference_steps": 4}


@paired(family=tuple(FAMILIES), dtype=DTYPES, sde_type=tuple(DYNAMICS))
def test_a_sample_alone_is_the_sample_in_any_group(
    engine_of: Callable[[str, str], Engine], family: str, dtype: str, sde_type: str
) -> None:
    engine = engine_of(family, dtype)
    options = {**REQUEST, **ALL, "sde_type": sde_type}
    group = engine.rollout(**options, seed=7, num_outputs_per_prompt=3)
    other = engine.rollout(**options, seeds=(100, 8))
    alone = engine.rollout(**options, seed=8)
    assert [rollout.seed for rollout in group] == [7, 8, 9]
    assert_same_bits(group[1], alone[0])
    assert_same_bits(group[1], other[1])
    assert not torch.equal(group[0].image, group[1].image)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_changes_nothing_else(engine_of: Callable[[str, str], Engine], family: str) -> None:
    engine = engine_of(family, "bfloat16")
    everything = engine.rollout(**REQUEST, **ALL, seed=3)[0]
    log_probs_only = engine.rollout(**REQUEST, seed=3, debug_mode=False)[0]
    assert dict(tensors_of(log_probs_only)).keys() == {"image", "log_probs"}
    assert torch.equal(log_probs_only.log_probs, everything.log_probs)
    assert torch.equal(log_probs_only.image, everything.image)


@dealt(family=tuple(FAMILIES), generator_device=("cuda", "cpu"))
def test_the_noise_of_a_step_depends_on_seed_and_step_alone(
    engine_of: Callable[[str, str], Engine], family: str, generator_device: GeneratorDevice
) -> None:
    engine = engine_of(family, "float32")
    request = {**REQUEST, "seed": 5, "generator_device": generator_device, "debug_mode": True}
    full = engine.rollout(**request)[0].debug_tensors
    window = engine.rollout(**request, sde_step_indices=(2,))[0].debug_tensors
    drawn_on = engine.info.device if generator_device == "cuda" else "cpu"
    assert full is not None and window is not None
    shape = full.variance_noise.shape[1:]
    for step in range(4):
        assert torch.equal(full.variance_noise[step].cpu(), step_noise(5, step, shape, device=drawn_on).cpu())
    assert torch.equal(window.variance_noise[2], full.variance_noise[2])
    for step in (0, 1, 3):
        assert not window.variance_noise[step].any()
        assert window.noise_std_dev[step].item() == 0


def test_an_omitted_seed_is_drawn_and_echoed(engine_of: Callable[[str, str], Engine]) -> None:
    engine = engine_of("z_image", "float32")
    first, second = engine.rollout(**REQUEST)[0], engine.rollout(**REQUEST)[0]
    assert first.seed != second.seed
    again = engine.rollout(**REQUEST, seed=first.seed)[0]
    assert_same_bits(again, first)


def test_the_engine_takes_a_params_object_or_fields(engine_of: Callable[[str, str], Engine]) -> None:
    engine = engine_of("z_image", "float32")
    assert_same_bits(engine.rollout(SamplingParams(**REQUEST, seed=1))[0], engine.rollout(**REQUEST, seed=1)[0])
