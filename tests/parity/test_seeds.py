"""Two seeds of a sample: one for its initial noise, one for the noise of its stochastic steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.pairs import FAMILY_WITH_DTYPE
from tests.rollouts import assert_same_bits

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.sampling.noise import step_noise

REQUEST: dict[str, Any] = {"prompt": "a green bottle", "height": 64, "width": 64, "num_inference_steps": 3}
ALL: dict[str, Any] = {"debug_mode": True, "return_dit_trajectory": True}
EngineOf = Callable[[str, str], Engine]


def first_state(rollout: Rollout) -> torch.Tensor:
    assert rollout.dit_trajectory is not None
    return rollout.dit_trajectory.latents[0]


def noise_of(rollout: Rollout) -> torch.Tensor:
    assert rollout.debug_tensors is not None
    return rollout.debug_tensors.variance_noise


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_a_group_may_start_from_the_same_noise_and_go_its_own_ways(engine_of: EngineOf, family: str, dtype: str) -> None:
    engine = engine_of(family, dtype)
    group = engine.rollout(**REQUEST, **ALL, seed=40, init_seed=3, num_outputs_per_prompt=3)
    (start,) = engine.rollout(**REQUEST, **ALL, seed=3)
    for index, rollout in enumerate(group):
        assert (rollout.seed, rollout.sampling.init_seed, rollout.sampling.sde_seed) == (40 + index, 3, 40 + index)
        assert torch.equal(first_state(rollout), first_state(start))
        (own,) = engine.rollout(**REQUEST, **ALL, seed=40 + index)
        assert torch.equal(noise_of(rollout), noise_of(own))
        assert not torch.equal(first_state(rollout), first_state(own))
    assert not torch.equal(group[0].image, group[1].image)


def test_each_sample_may_have_both_of_its_own(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    group = engine.rollout(**REQUEST, **ALL, init_seed=(7, 8), sde_seed=(5, 2**32 - 1))
    assert [(one.seed, one.sampling.init_seed, one.sampling.sde_seed) for one in group] == [
        (5, 7, 5),
        (2**32 - 1, 8, 2**32 - 1),
    ]
    for rollout, init_seed, sde_seed in zip(group, (7, 8), (5, 2**32 - 1), strict=True):
        (start,) = engine.rollout(**REQUEST, **ALL, seed=init_seed)
        assert torch.equal(first_state(rollout), first_state(start))
        for step in range(3):
            shape = noise_of(rollout)[step].shape
            drawn = step_noise(sde_seed, step, shape, device=engine.info.device)
            assert torch.equal(noise_of(rollout)[step], drawn.cpu())


def test_seeds_that_are_left_out_are_the_samples_own(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "bfloat16")
    (plain,) = engine.rollout(**REQUEST, **ALL, seed=7)
    assert (plain.sampling.init_seed, plain.sampling.sde_seed) == (7, 7)
    for seeds in ({"init_seed": 7, "sde_seed": 7}, {"seed": 7, "init_seed": 7}, {"seeds": (7,), "sde_seed": 7}):
        assert_same_bits(engine.rollout(**REQUEST, **ALL, **seeds)[0], plain)


def test_a_picture_starts_from_the_seed_of_its_noise(engine_of: EngineOf) -> None:
    engine = engine_of("z_image", "float32")
    plain, other = (engine.generate(**REQUEST, **seeds)[0] for seeds in ({"seed": 3}, {"seed": 9, "init_seed": 3}))
    assert torch.equal(plain.latents, other.latents)
    assert (other.seed, other.sampling.init_seed, other.sampling.sde_seed) == (9, 3, None)
