"""Full-size architectures with random weights, made on the device; for a dry run tiny ones."""

from __future__ import annotations

import inspect
import tempfile
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from flowroll.families import FAMILIES, Family, StepInput
from flowroll.sampling import noise, transition
from flowroll.sampling.dynamics import transitions
from flowroll.sampling.schedule import ScheduleConfig, explicit_schedule
from flowroll.testing import make_checkpoint, random_images, random_text
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
# The decoders of their pipelines, where they are not the defaults of the class.
VAE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
# The names that the classes give to their number of layers.
DEPTHS = ("num_layers", "n_layers")
# Where the family does not fix the number.
TEXT_TOKENS = 64
SEED = 0


def component_class(family: str, component: str) -> type[nn.Module]:
    """The class of a component, as the family's pipeline declares it."""
    pipeline = getattr(diffusers, FAMILIES[family].pipeline_classes[0])
    found: type[nn.Module] = typing.get_type_hints(pipeline.__init__)[component]
    return found


def build(family: str, component: str, device: torch.device, *, is_tiny: bool, layers: int | None = None) -> Any:
    """A component with random bf16 weights, made on the device, whole or with few layers; a tiny one is of the checkpoint."""
    torch.manual_seed(SEED)
    model_class: Any = component_class(family, component)
    if is_tiny:
        with tempfile.TemporaryDirectory() as folder:
            path = make_checkpoint(family, folder) / component
            return model_class.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()
    options = dict(OPTIONS.get(family, {}) if component == "transformer" else VAE_OPTIONS.get(model_class.__name__, {}))
    if layers is not None:
        parameters = inspect.signature(model_class.__init__).parameters
        options[next(name for name in DEPTHS if name in parameters)] = layers
        if "dual_attention_layers" in options:
            options["dual_attention_layers"] = tuple(range(layers))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = model_class(**options)
    finally:
        torch.set_default_dtype(default)
    # Their weights need gradients, as those of an engine do.
    return model.to(torch.bfloat16).eval()


@dataclass
class Run:
    """A group of samples of one family at one size, taking the engine's own steps.

    Attributes:
        family: The family.
        model: The transformer.
        size: Height and width of the images in pixels.
        samples: The number of samples.
        steps: How many steps may be taken.
        device: Where they are.
    """

    family: Family
    model: Any
    size: int
    samples: int
    steps: int
    device: torch.device

    def __post_init__(self) -> None:
        family, device, dtype = self.family, self.device, torch.bfloat16
        # What a specification is made of, without text encoders and VAE: CLIP's 77 tokens, 8 pixels per latent cell of 16
        # channels.
        vision = SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 2**24})
        processor = SimpleNamespace(image_processor=vision, image_token_id=0, image_token="", video_token="")
        parts = {"vae_scale_factor": 8, "tokenizer_max_length": 77, "latent_channels": 16, "processor": processor}
        spec = family.spec(SimpleNamespace(transformer=self.model, **parts))
        geometry = family.geometry(spec, height=self.size, width=self.size)
        if spec.max_images:
            geometry = family.beside(geometry, spec, [ReferenceImage(sha256="", height=1024, width=1024)])
        self.geometry, self.guidance = geometry, family.guidance(4.0)
        generator = torch.Generator().manual_seed(SEED)
        texts = (TEXT_TOKENS, TEXT_TOKENS // 4)
        positive, negative = (random_text(family, spec, one, dtype=dtype, generator=generator) for one in texts)
        images = random_images(family, spec, geometry, dtype=dtype, generator=generator)
        self.env = family.env(positive, negative, geometry, images=images).to(device)
        schedule = explicit_schedule(ScheduleConfig(), [1 - step / self.steps for step in range(self.steps)] + [0.0])
        self.timesteps = family.model_timesteps(schedule.timesteps.to(device), family.timestep_dtype(dtype))
        self.transitions = transitions(schedule.sigmas, sde_type="sde", noise_level=0.7)
        shape = geometry.noise_shape
        drawn = (noise.initial_noise(SEED + index, shape, dtype=torch.float32, device=device) for index in range(self.samples))
        self.latents = [family.initial_latents(one) for one in drawn]
        self._step = 0

    def inputs(self, step: int) -> list[StepInput]:
        """What the forwards of a step take, for every sample."""
        return [
            StepInput(
                latents=latents,
                timestep=self.timesteps[step : step + 1],
                env=self.env,
                guidance=self.guidance,
                geometry=self.geometry,
                is_first=step == 0,
            )
            for latents in self.latents
        ]

    def take_step(self, strategy: Any) -> None:
        """Takes the next step of every sample: velocity, mean, noise, log-prob."""
        this, step = self.transitions[self._step], self._step
        for index, velocity in enumerate(strategy.velocities(self.model, self.inputs(step))):
            mean = transition.mean(this, self.latents[index], velocity)
            drawn = noise.step_noise(SEED + index, step, mean.shape, device=self.device)
            self.latents[index] = transition.sample(this, mean, drawn)
            transition.log_prob(this, self.latents[index][None], mean[None])
        self._step += 1
