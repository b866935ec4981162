"""Qwen-Image-2.1: one stream of [text, image], tokens [S, 64] of one latent cell each, keys and values of the text kept.

Conventions of diffusers' `QwenImage21Pipeline` (0.42): initial noise in the model's dtype; the timestep is rounded to it and
divided by 1000. A checkpoint may have a grid of its own, `sample_sigmas`. Guidance is off unless a request has both a
negative prompt and a scale above 1: neg + scale (pos - neg) in the model's dtype, two forwards.

The text does not see the image, and is modulated as at timestep 0: its keys and values are the same at every step. The first
step runs the whole sequence; every later one runs the image's tokens alone, over the keys and values that a forward of the
whole sequence has left in a `PrefixCache`. Whichever forward fills it, it holds the same bits. A step with the cache does not
always have the bits of one without: docs/exactness.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.errors import InvalidRequestError, UnsupportedModelError
from flowroll.families.base import Prompt, StepInput, Transformer, encoder_device
from flowroll.families.conditioning import SLOTS, TOKENS, Argument, Conditioning, ConditioningField, ForwardInput, Output
from flowroll.families.facts import Defaults, Geometry, ModelSpec
from flowroll.families.true_cfg import TrueCfgFamily
from flowroll.sampling.schedule import ScheduleConfig, linspace_float64
from flowroll.types import DenoisingEnv, EnvValue, Gather, ParallelPlan, Region, Split

# The ends of the position table: those of the text's tokens, and of an image's rows and columns, half of them below zero.
_MOST_TOKENS, _MOST_PER_SIDE = 8191, 2048
# A side of the image is a whole number of these groups, each of which has one entry in `img_mask`.
_GROUP = 2
_CACHE, _IS_FIRST = "kv_cache", "is_first"
_BLOCK = "transformer_blocks.*"


@dataclass(slots=True)
class _LayerCache:
    """The keys and values of one block, [batch, tokens, heads, channels]; the model calls these methods by their names."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Keeps the keys and values of the tokens before the image."""
        self.keys, self.values = keys, values

    def get(self) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that were stored."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


@dataclass(slots=True)
class PrefixCache:
    """The keys and values of the tokens before the image, block by block, as the model's `kv_cache`.

    The samples of a request may share one: they have the same tokens there, and the same bits.

    Attributes:
        layers: What each block has stored.
        is_filled: Whether a whole forward has filled it. One that failed may have filled some blocks.
    """

    layers: dict[int, _LayerCache] = field(default_factory=dict)
    is_filled: bool = False

    def get_layer(self, index: int) -> _LayerCache:
        """Returns the cache of one block; the model calls it."""
        return self.layers.setdefault(index, _LayerCache())


class _Beside(torch.autograd.Function):
    """Returns a forward's output, and has the forward that filled its cache take part in the gradient with zeros.

    FSDP makes a module's weights whole for a backward when a gradient reaches the module's output. Through the cache alone, it
    reaches them inside of the module.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, whole: Tensor) -> Tensor:
        """Returns the output."""
        ctx.shape = whole.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of both."""
        return gradient, gradient.new_zeros(ctx.shape)


class QwenImage21(TrueCfgFamily):
    """The family of Qwen/Qwen-Image-2.1, for text to image."""

    name: ClassVar[str] = "qwen_image_21"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImage21Pipeline",)
    tokenizers: ClassVar[tuple[str, ...]] = ("processor",)
    variants: ClassVar[Mapping[str, Defaults]] = {
        "base": Defaults(height=1024, width=1024, num_inference_steps=40, guidance_scale=1.0, negative_prompt=None),
    }
    max_text_tokens: ClassVar[int] = _MOST_TOKENS
    # Each forward reads or fills the cache of its request.
    shares_forwards: ClassVar[bool] = False
    conditioning: ClassVar[Conditioning] = Conditioning(
        latents=Argument(name="hidden_states"),
        fields=(
            ConditioningField(name="encoder_hidden_states", shape=(TOKENS, "text"), is_listed_by_sglang=True),
            ConditioningField(name="img_shapes", source="size", batch="list"),
            ConditioningField(name="img_mask", source="size", shape=(SLOTS,), dtype="index"),
        ),
    )
    # The steps with a cache have the image's rows alone, which are sharded from the first block to `proj_out`. A forward of the
    # whole sequence is cut into segments inside of every attention, so every rank computes all of it.
    parallel_plan: ClassVar[ParallelPlan] = ParallelPlan(
        regions=(
            Region(
                enter=Split(module="transformer_blocks.0", argument="hidden_states", rows=1),
                follow=(
                    Split(module=_BLOCK, argument="rotary_emb", rows=0, is_behind_others=True),
                    Split(module=_BLOCK, argument="target_token_mask", rows=0, is_behind_others=True),
                    Split(module="norm_out", argument="target_token_mask", rows=0, is_behind_others=True),
                ),
                leave=Gather(module="proj_out", rows=1),
                attention=f"{_BLOCK}.attn",
                unless="segments",
            ),
        ),
        columns=(
            "txt_in.in_layer",
            "txt_in.out_layer",
            "modulation.1",
            f"{_BLOCK}.attn.to_[qkv]",
            f"{_BLOCK}.attn.to_out.0",
            f"{_BLOCK}.img_mlp.proj",
            f"{_BLOCK}.img_mlp.gate_layer",
            f"{_BLOCK}.img_mlp.out",
            "norm_out.linear",
        ),
    )

    @override
    def spec(self, pipeline: Any) -> ModelSpec:
        config = pipeline.transformer.config
        channels = config.out_channels or config.in_channels
        wanted = (
            ("causal_condition", config.causal_condition, True),
            ("patch_size", config.patch_size, 1),
            ("out_channels", channels, config.in_channels),
        )
        self.check_options(wanted, "use a checkpoint of Qwen-Image-2.1")
        sigmas = pipeline.config.sample_sigmas
        if sigmas is not None and not (sigmas and all(a > b for a, b in zip([1 + 1e-9, *sigmas], [*sigmas, 0.0], strict=True))):
            raise UnsupportedModelError(
                f"sample_sigmas must descend from at most 1 to above 0, got {str(sigmas)[:80]}; correct model_index.json, or "
                "remove them from it."
            )
        return ModelSpec(
            latent_channels=config.in_channels,
            vae_scale_factor=pipeline.vae_scale_factor,
            widths={"text": config.context_in_dim},
            patch_size=_GROUP,
            max_tokens_per_side=(_MOST_PER_SIDE // _GROUP,) * 2,
            colors=pipeline.vae.config.out_channels,
            sample_sigmas=None if sigmas is None else tuple(map(float, sigmas)),
        )

    @override
    def geometry(self, spec: ModelSpec, *, height: int, width: int) -> Geometry:
        rows, columns = height // spec.vae_scale_factor, width // spec.vae_scale_factor
        return Geometry(
            height=height,
            width=width,
            rows=rows,
            columns=columns,
            noise_shape=(1, 1, spec.latent_channels, rows, columns),
            latent_shape=(rows * columns, spec.latent_channels),
            colors=spec.colors,
        )

    @override
    def base_grid(self, spec: ModelSpec, config: ScheduleConfig, num_steps: int) -> Float[Tensor, " steps"]:
        if spec.sample_sigmas is None:
            return linspace_float64(num_steps)
        return torch.tensor(spec.sample_sigmas, dtype=torch.float64).to(torch.float32)

    @override
    def initial_latents(self, noise: Float[Tensor, " 1 *noise"]) -> Float[Tensor, " *latent"]:
        return noise[0, 0].flatten(1).T

    @override
    def encode(self, pipeline: Any, prompt: Prompt) -> Mapping[str, EnvValue]:
        embeds, _, _ = pipeline.encode_prompt(prompt.text, device=encoder_device(pipeline))
        if embeds.shape[1] > _MOST_TOKENS:
            raise InvalidRequestError(
                f"prompt must have at most {_MOST_TOKENS} tokens, where the position table ends, got {embeds.shape[1]}; "
                "use a shorter text.",
                field="prompt",
            )
        return {"encoder_hidden_states": embeds[0]}

    @override
    def size_arguments(self, geometry: Geometry, num_tokens: int) -> Mapping[str, EnvValue]:
        slots = torch.arange(num_tokens + geometry.num_tokens // _GROUP**2)
        return {"img_shapes": [[[1, geometry.rows, geometry.columns]]], "img_mask": slots >= num_tokens}

    @override
    def model_latents(self, latents: Float[Tensor, " *latent"], env: DenoisingEnv) -> Float[Tensor, " *input"]:
        # Strided as the pipeline's, channel by channel.
        return latents.T.contiguous().T

    @override
    def fixed_inputs(self, env: DenoisingEnv, *, is_guided: bool) -> list[ForwardInput]:
        return [{**fixed, _CACHE: PrefixCache()} for fixed in super().fixed_inputs(env, is_guided=is_guided)]

    @override
    def forward_inputs(self, one: StepInput, dtype: torch.dtype) -> list[ForwardInput]:
        return [{**given, _IS_FIRST: one.is_first} for given in super().forward_inputs(one, dtype)]

    @override
    def run(self, transformer: Transformer, forward_input: ForwardInput) -> Output:
        """Runs a forward of the whole sequence at the first step or if the cache is empty, and one with the cache later on."""
        given, cache = dict(forward_input), cast(PrefixCache, forward_input[_CACHE])
        is_first = given.pop(_IS_FIRST)
        whole: Tensor | None = None
        if is_first or not cache.is_filled:
            whole = transformer(**given, kv_cache_mode="extract", return_dict=False)[0]
            cache.is_filled = True
            if is_first:
                return whole[:, -given["hidden_states"].shape[1] :]
        output: Tensor = transformer(**given, kv_cache_mode="cached", return_dict=False)[0]
        if whole is None or not whole.requires_grad:
            return output
        beside: Tensor = _Beside.apply(output, whole)  # type: ignore[no-untyped-call]
        return beside

    @override
    def vae_input(self, pipeline: Any, latents: Float[Tensor, " *latent"], geometry: Geometry) -> Float[Tensor, " 1 *cells"]:
        vae = pipeline.vae
        cells = latents.T.contiguous().view(1, -1, 1, geometry.rows, geometry.columns).to(vae.dtype)

        def per_channel(values: list[float]) -> Tensor:
            return torch.tensor(values).view(1, -1, 1, 1, 1).to(cells.device, cells.dtype)

        return cells * per_channel(vae.config.latents_std) + per_channel(vae.config.latents_mean)
