"""ms per image-step of the full-size architectures with random weights, built on the device.

    python -m benchmarks.gpu --family qwen_image --size 512

Runs the engine's own step: the family's guided velocity, then an SDE transition with noise and log-prob.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import nn

from flowroll.families import FAMILIES, ModelSpec, StepInput
from flowroll.sampling import noise, transition
from flowroll.sampling.dynamics import transitions
from flowroll.sampling.schedule import ScheduleConfig, explicit_schedule
from flowroll.testing import random_text

# The defaults of these classes are the full-size architectures.
MODELS: dict[str, type[nn.Module]] = {"qwen_image": QwenImageTransformer2DModel, "z_image": ZImageTransformer2DModel}
DEPTH = {"qwen_image": "num_layers", "z_image": "n_layers"}
TEXT_DIM = {"qwen_image": "joint_attention_dim", "z_image": "cap_feat_dim"}
TEXT_TOKENS = 64
SEED = 0


def build(family: str, device: torch.device, layers: int | None) -> nn.Module:
    """The transformer with random bf16 weights, made on the device."""
    torch.manual_seed(SEED)
    options = {} if layers is None else {DEPTH[family]: layers}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = MODELS[family](**options)
    finally:
        torch.set_default_dtype(default)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def main() -> None:
    """Prints one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(MODELS), default="qwen_image")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try the script out")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = build(options.family, device, options.layers)
    with torch.no_grad():
        seconds = time_steps(model, options.family, options.size, options.steps, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    print(
        f"{options.family} {billions:.1f} B parameters, {options.size}x{options.size}, CFG, bf16, batch 1, {name}, "
        f"torch {torch.__version__}: {statistics.median(seconds) * 1e3:.1f} ms per image-step "
        f"(median of {len(seconds)}; min {min(seconds) * 1e3:.1f}, max {max(seconds) * 1e3:.1f})"
    )


def time_steps(model: nn.Module, name: str, size: int, steps: int, device: torch.device) -> list[float]:
    """Seconds of each guided step, after two steps of warm-up."""
    family = FAMILIES[name]
    widths = {"text": model.config[TEXT_DIM[name]]}
    spec = ModelSpec(latent_channels=16, vae_scale_factor=8, widths=widths)
    geometry = family.geometry(spec, height=size, width=size)
    guidance = family.guidance(4.0)

    generator = torch.Generator().manual_seed(SEED)
    texts = (TEXT_TOKENS, TEXT_TOKENS // 4)
    positive, negative = (random_text(family, spec, one, dtype=torch.bfloat16, generator=generator) for one in texts)
    env = family.env(positive, negative, geometry).to(device)
    total = steps + 2
    schedule = explicit_schedule(ScheduleConfig(), [1 - step / total for step in range(total)] + [0.0])
    timesteps = family.model_timesteps(schedule.timesteps.to(device), family.timestep_dtype(torch.bfloat16))
    latents = family.initial_latents(noise.initial_noise(SEED, geometry.noise_shape, dtype=torch.float32, device=device))
    seconds = []
    for step, this in enumerate(transitions(schedule.sigmas, sde_type="sde", noise_level=0.7)):
        synchronize(device)
        started = time.perf_counter()
        one = StepInput(latents=latents, timestep=timesteps[step : step + 1], env=env, guidance=guidance)
        velocity = family.velocity(model, one, torch.bfloat16)
        mean = transition.mean(this, latents, velocity)
        latents = transition.sample(this, mean, noise.step_noise(SEED, step, mean.shape, device=device))
        transition.log_prob(this, latents[None], mean[None])
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
