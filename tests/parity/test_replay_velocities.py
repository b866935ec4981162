"""Velocities at latents of the caller's own: at the recorded latents they are the recorded ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.guiding import in_words_of

from flowroll import replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES

REQUEST = {
    "prompt": "a red apple on a wooden table",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
    "guidance_scale": 4.0,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "debug_mode": True,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_at_recorded_latents_they_are_the_recorded_bits_in_any_order(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str
) -> None:
    rollout = engine_of(name, dtype).rollout(**in_words_of(name, REQUEST))[0]
    assert rollout.dit_trajectory is not None and rollout.debug_tensors is not None
    steps = [2, 0, 1, 0]
    transformer = pipeline_of(name, dtype).transformer
    found = replay.velocities(transformer, rollout, [rollout.dit_trajectory.latents[step] for step in steps], steps=steps)
    for velocity, step in zip(found, steps, strict=True):
        assert velocity.dtype == torch.float32
        assert torch.equal(velocity, rollout.debug_tensors.model_output[step])
    assert all(velocity.requires_grad for velocity in found)


def test_the_last_state_and_the_env_are_enough(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]
) -> None:
    engine, transformer = engine_of("z_image", "float32"), pipeline_of("z_image", "float32").transformer
    rollout = engine.rollout(**{**REQUEST, "debug_mode": False}, sde_type="ode", return_step_indices=(3,))[0]
    assert rollout.dit_trajectory is not None
    clean = rollout.dit_trajectory.latents[-1]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    low, high = replay.velocities(transformer, rollout, [torch.lerp(clean, noise, 0.5)] * 2, steps=[0, 2])
    assert torch.isfinite(low).all() and not torch.equal(low, high)


def test_steps_and_latents_must_fit(engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]) -> None:
    rollout = engine_of("z_image", "float32").rollout(**REQUEST)[0]
    transformer = pipeline_of("z_image", "float32").transformer
    assert rollout.dit_trajectory is not None
    state = rollout.dit_trajectory.latents[0]
    for latents, steps in (([state], [3]), ([state], [-1]), ([state], [0, 1]), ([state, state], [0])):
        with pytest.raises(InvalidRequestError, match="one of the 3 steps for each of"):
            replay.velocities(transformer, rollout, latents, steps=steps)


def test_autocast_is_refused_as_in_every_replay(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any]
) -> None:
    rollout = engine_of("z_image", "float32").rollout(**REQUEST)[0]
    transformer = pipeline_of("z_image", "float32").transformer
    assert rollout.dit_trajectory is not None
    device = next(transformer.parameters()).device.type
    with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(InvalidRequestError, match="autocast must be off"):
        replay.velocities(transformer, rollout, [rollout.dit_trajectory.latents[0]], steps=[0])
