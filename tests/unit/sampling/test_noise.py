"""Noise depends on (seed, step) alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowroll.sampling.noise import initial_noise, step_noise, step_seed

PINNED = ["0x910a2dec1808712d", "0xc42c5a1a67ae5b22", "0x2c582b9e35390e91", "0xa5b16713e258aa7c"]


def test_the_mix_is_pinned() -> None:
    # These values are the contract: a change would give every recorded rollout other noise.
    first_of_splitmix64 = 0xE220A8397B1DCDAF  # the generator's well-known first output for the state 0
    assert step_seed(0, 0) == first_of_splitmix64 ^ (first_of_splitmix64 >> 32)
    pairs = [(0, 1), (1, 0), (42, 7), (2**32 - 1, 999)]
    assert [hex(step_seed(seed, step)) for seed, step in pairs] == PINNED


def test_the_noise_is_pinned() -> None:
    expected = [-0.018280260264873505, 0.25916916131973267, -0.6339892148971558, 0.09513670951128006]
    assert step_noise(42, 7, (4,)).tolist() == pytest.approx(expected, abs=1e-6)


def test_steps_and_neighbouring_seeds_differ_in_the_32_bits_that_a_cpu_generator_uses() -> None:
    low = {step_seed(seed, step) & 0xFFFFFFFF for seed in range(40, 60) for step in range(1000)}
    assert len(low) >= 20 * 1000 - 1  # among 20,000 of 2^32 values 0.05 coincidences are expected
    first = [step_noise(40, step, (4,)) for step in range(1000)]
    assert len({tuple(noise.tolist()) for noise in first}) == 1000


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 999))
def test_a_seed_changes_the_noise_through_either_half(seed: int, step: int) -> None:
    assert step_seed(seed, step) != step_seed(seed ^ 1, step)
    assert step_seed(seed, step) != step_seed(seed, step + 1)
    assert 0 <= step_seed(seed, step) < 2**64


def test_the_same_address_gives_the_same_noise() -> None:
    assert torch.equal(step_noise(3, 5, (2, 3)), step_noise(3, 5, (2, 3)))
    assert not torch.equal(step_noise(3, 5, (2, 3)), step_noise(4, 5, (2, 3)))


def test_noise_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step_noise(1, 2, (8,))
    initial_noise(1, (1, 8), dtype=torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_noise_is_standard_normal_across_steps() -> None:
    noise = torch.stack([step_noise(9, step, (64,)) for step in range(500)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03
    correlation = (noise[1:] * noise[:-1]).mean().item()
    assert abs(correlation) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_noise_is_what_diffusers_draws(dtype: torch.dtype) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    shape = (1, 1, 16, 8, 8)
    drawn = randn_tensor(shape, generator=torch.Generator().manual_seed(5), device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(initial_noise(5, shape, dtype=dtype), drawn)
