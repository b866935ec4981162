"""ms per image-step of the full-size architectures with random weights, built on the device.

    python -m benchmarks.gpu --family qwen_image --size 512

Runs the engine's own step: the family's guided velocity, then an SDE transition with noise and log-prob.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
import typing
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from flowroll.families import FAMILIES, StepInput
from flowroll.sampling import noise, transition
from flowroll.sampling.dynamics import transitions
from flowroll.sampling.schedule import ScheduleConfig, explicit_schedule
from flowroll.testing import random_images, random_text
from flowroll.types import ReferenceImage

# The options of the full-size architectures, where they are not the defaults of the class.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # Stable Diffusion 3.5 medium.
    "sd3": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
}
# The names that the classes give to their number of layers.
DEPTHS = ("num_layers", "n_layers")
# Where the family does not fix the number.
TEXT_TOKENS = 64
SEED = 0


def transformer_class(family: str) -> type[nn.Module]:
    """The class of the family's transformers, as its pipeline declares it."""
    pipeline = getattr(diffusers, FAMILIES[family].pipeline_classes[0])
    found: type[nn.Module] = typing.get_type_hints(pipeline.__init__)["transformer"]
    return found


def build(family: str, device: torch.device, layers: int | None, options: Mapping[str, Any]) -> nn.Module:
    """The transformer with random bf16 weights, made on the device."""
    torch.manual_seed(SEED)
    model_class = transformer_class(family)
    if layers is not None:
        parameters = inspect.signature(model_class.__init__).parameters
        options = {**options, next(name for name in DEPTHS if name in parameters): layers}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = model_class(**options)
    finally:
        torch.set_default_dtype(default)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def main() -> None:
    """Prints one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen_image")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try the script out")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = build(options.family, device, options.layers, OPTIONS.get(options.family, {}))
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
    # What a specification is made of, without text encoders and VAE: CLIP's 77 tokens, 8 pixels per latent cell of 16 channels.
    vision = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 2**24})
    processor = SimpleNamespace(image_processor=vision, image_token_id=0, image_token="", video_token="")
    parts = {"vae_scale_factor": 8, "tokenizer_max_length": 77, "latent_channels": 16, "processor": processor}
    spec = family.spec(SimpleNamespace(transformer=model, **parts))
    geometry = family.geometry(spec, height=size, width=size)
    if spec.max_images:
        geometry = family.beside(geometry, spec, [ReferenceImage(sha256="", height=1024, width=1024)])
    guidance = family.guidance(4.0)

    generator = torch.Generator().manual_seed(SEED)
    texts = (TEXT_TOKENS, TEXT_TOKENS // 4)
    positive, negative = (random_text(family, spec, one, dtype=torch.bfloat16, generator=generator) for one in texts)
    images = random_images(family, spec, geometry, dtype=torch.bfloat16, generator=generator)
    env = family.env(positive, negative, geometry, images=images).to(device)
    total = steps + 2
    schedule = explicit_schedule(ScheduleConfig(), [1 - step / total for step in range(total)] + [0.0])
    timesteps = family.model_timesteps(schedule.timesteps.to(device), family.timestep_dtype(torch.bfloat16))
    latents = family.initial_latents(noise.initial_noise(SEED, geometry.noise_shape, dtype=torch.float32, device=device))
    seconds = []
    for step, this in enumerate(transitions(schedule.sigmas, sde_type="sde", noise_level=0.7)):
        synchronize(device)
        started = time.perf_counter()
        one = StepInput(latents=latents, timestep=timesteps[step : step + 1], env=env, guidance=guidance, is_first=step == 0)
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
