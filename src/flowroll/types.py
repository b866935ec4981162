"""The data that flows through flowroll: one frozen type per arrow.

`SamplingParams` is what a caller asks for, `Rollout` is what comes back. Both are plain data: the HTTP names live in
`wire/`, the model's rules in `families/`, and what depends on a loaded checkpoint (sizes, limits) is checked by the
engine. Nothing here imports a model library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast, get_args

from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError

SdeType: TypeAlias = Literal["sde", "cps", "ode"]
GeneratorDevice: TypeAlias = Literal["cuda", "cpu"]
Number: TypeAlias = int | float
# The value of one transformer argument in an environment: a tensor without batch dimension, or plain nested lists.
EnvValue: TypeAlias = "Tensor | int | float | str | bool | Sequence[EnvValue]"

SCHEMA_VERSION = 1
MAX_SEED = 2**32 - 1
MAX_PROMPT_CHARS = 100_000
NOISE_LEVEL_MIN, NOISE_LEVEL_MAX, NOISE_LEVEL_MAX_CPS = 1e-4, 10.0, 1.0
MIN_SIGMA_GAP = 1e-6
# The fields that plain generation does not have.
ROLLOUT_FIELDS = frozenset(
    {
        "rollout",
        "sde_type",
        "noise_level",
        "log_prob_no_const",
        "debug_mode",
        "return_denoising_env",
        "return_dit_trajectory",
        "sde_step_indices",
        "return_step_indices",
    }
)


def _require(ok: bool, field_name: str, rule: str, value: object, remedy: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise InvalidRequestError(f"{field_name} must {rule}, got {shown}; {remedy}.", field=field_name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request: a prompt and how to sample it. `None` means "the family's default".

    Rules that need no model are checked here; the rest (pixel grid, server limits) when the engine plans the request.

    Attributes:
        prompt: The text; may be empty.
        negative_prompt: Text of the unconditional branch; used only when guidance runs.
        seed: Seed of the first sample, sample i uses `seed + i`; in [0, 2^32). None: the engine draws one.
        seeds: One seed per sample; excludes `seed` and sets the number of samples.
        generator_device: Where noise is drawn; "cuda" means the engine's own device.
        width: Pixels.
        height: Pixels.
        num_inference_steps: Number of transitions T.
        num_outputs_per_prompt: Number of samples K. None: 1, or the number of `seeds`.
        guidance_scale: Guidance scale, used if `true_cfg_scale` is None.
        true_cfg_scale: Guidance scale.
        sigmas: T + 1 noise levels used verbatim: in (0, 1], strictly decreasing by at least 1e-6, then a final 0.
        rollout: False: an evaluation, the image alone.
        sde_type: Dynamics of the stochastic steps.
        noise_level: 0 (every step is an ODE step), or 1e-4 to 10 (cps: to 1).
        log_prob_no_const: Log-probs are minus the mean of (next - mean)^2, without scale and constants.
        debug_mode: Return the per-step debug tensors.
        return_denoising_env: Return every transformer argument.
        return_dit_trajectory: Return latents, timesteps and sigmas.
        sde_step_indices: Steps that follow `sde_type`, the others are ODE steps. None: all.
        return_step_indices: Which of the T + 1 latents the trajectory holds. None: all.
        suppress_logs: Do not log this request.
        request_id: Echoed; None: the engine makes one.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    generator_device: GeneratorDevice = "cuda"
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    num_outputs_per_prompt: int | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = None
    sigmas: tuple[Number, ...] | None = None
    rollout: bool = True
    sde_type: SdeType = "sde"
    noise_level: Number = 0.7
    log_prob_no_const: bool = False
    debug_mode: bool = True
    return_denoising_env: bool = False
    return_dit_trajectory: bool = False
    sde_step_indices: tuple[int, ...] | None = None
    return_step_indices: tuple[int, ...] | None = None
    suppress_logs: bool = False
    request_id: str | None = None

    def __post_init__(self) -> None:
        self._check_text()
        self._check_seeds()
        self._check_numbers()
        self._check_sigmas()
        self._check_rollout()

    def _check_text(self) -> None:
        for name in ("prompt", "negative_prompt", "request_id"):
            text = getattr(self, name)
            if text is None and name != "prompt":
                continue
            _require(isinstance(text, str), name, "be text", text, "send a string")
            _require(
                len(text) <= MAX_PROMPT_CHARS, name, f"have at most {MAX_PROMPT_CHARS} characters", len(text), "shorten it"
            )
            valid = text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
            _require(valid, name, "be valid Unicode", text, "remove the unpaired surrogates")

    def _check_seeds(self) -> None:
        remedy = f"use an integer from 0 to {MAX_SEED}"
        if self.seed is not None:
            last = self.seed + (self.num_outputs_per_prompt or 1) - 1 if _is_int(self.seed) else self.seed
            _require(_is_int(self.seed) and self.seed >= 0, "seed", "be >= 0", self.seed, remedy)
            _require(last <= MAX_SEED, "seed", "leave every seed + i below 2^32", self.seed, "use a smaller seed")
        if self.seeds is None:
            return
        _require(self.seed is None, "seeds", "not be given together with seed", self.seeds, "send one of the two")
        _require(len(self.seeds) > 0, "seeds", "hold at least one seed", self.seeds, "send one seed per output")
        for value in self.seeds:
            _require(_is_int(value) and 0 <= value <= MAX_SEED, "seeds", "hold integers in [0, 2^32)", value, remedy)
        count = self.num_outputs_per_prompt
        agrees = count is None or count == len(self.seeds)
        _require(agrees, "seeds", f"hold num_outputs_per_prompt = {count} values", len(self.seeds), "send one seed per output")

    def _check_numbers(self) -> None:
        for name in ("width", "height", "num_inference_steps", "num_outputs_per_prompt"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and value >= 1), name, "be an integer >= 1", value, "use 1 or more")
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(self, name)
            ok = value is None or (_is_finite(value) and value >= 0)
            _require(ok, name, "be finite and >= 0", value, "use 0 for no guidance")

    def _check_sigmas(self) -> None:
        if self.sigmas is None:
            return
        values = self.sigmas
        _require(len(values) >= 2, "sigmas", "hold T + 1 >= 2 values", values, "send one value per step and a final 0")
        _require(all(map(_is_finite, values)), "sigmas", "be finite numbers", values, "send plain numbers")
        _require(values[-1] == 0, "sigmas", "end at 0", values[-1], "append a final 0")
        _require(values[0] <= 1, "sigmas", "start at 1 or below", values[0], "scale the list to [0, 1]")
        gaps = [a - b for a, b in itertools.pairwise(values)]
        ok = min(gaps) >= MIN_SIGMA_GAP
        _require(ok, "sigmas", f"decrease by at least {MIN_SIGMA_GAP} at every step", min(gaps), "remove the repeated values")
        steps = self.num_inference_steps
        agrees = steps is None or steps == len(values) - 1
        _require(
            agrees, "sigmas", f"hold num_inference_steps + 1 = {(steps or 0) + 1} values", len(values), "omit one of the two"
        )

    def _check_rollout(self) -> None:
        choices = get_args(SdeType)
        _require(self.sde_type in choices, "sde_type", f"be one of {', '.join(choices)}", self.sde_type, "choose one of these")
        devices = get_args(GeneratorDevice)
        ok = self.generator_device in devices
        _require(ok, "generator_device", f"be one of {', '.join(devices)}", self.generator_device, "choose one of these")
        high = NOISE_LEVEL_MAX_CPS if self.sde_type == "cps" else NOISE_LEVEL_MAX
        level = self.noise_level
        ok = _is_finite(level) and (level == 0 or NOISE_LEVEL_MIN <= level <= high)
        rule = f"be 0 or from {NOISE_LEVEL_MIN} to {high:g} for {self.sde_type}"
        _require(ok, "noise_level", rule, level, "use 0 for a deterministic rollout")
        for name in ("sde_step_indices", "return_step_indices"):
            indices = getattr(self, name)
            if indices is None:
                continue
            whole = all(_is_int(i) and i >= 0 for i in indices)
            _require(whole, name, "hold integers >= 0", indices, "count steps from 0")
            _require(len(set(indices)) == len(indices), name, "hold each step once", indices, "remove the duplicates")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRecord:
    """How a sample was made: everything that replay needs beside its tensors and the weights.

    Attributes:
        family: Name of the model family, e.g. "qwen_image".
        variant: Variant of the family, e.g. "base", "turbo".
        sde_type: Dynamics of the stochastic steps.
        noise_level: The user's knob n.
        log_prob_no_const: Which of the two log-prob conventions was used.
        guidance_rule: How the branches were combined: "none", or the family's rule.
        guidance_scale: The effective scale; meaningless for rule "none".
        negative_prompt: Text of the unconditional branch; None without guidance.
        height: Pixels.
        width: Pixels.
        num_inference_steps: Number of transitions T.
        sigmas: T + 1 noise levels, float32 values.
        timesteps: T timesteps as the model's schedule has them, float32 values.
        generator_device: Device type that the noise was drawn on.
        model_dtype: Dtype of the transformer's inputs, e.g. "torch.bfloat16".
        timestep_dtype: Dtype in which the timestep given to the model was computed.
        device: Device type that the transformer ran on.
        schema_version: Version of this record.
    """

    family: str
    variant: str
    sde_type: SdeType
    noise_level: Number
    log_prob_no_const: bool
    guidance_rule: str
    guidance_scale: Number
    negative_prompt: str | None
    height: int
    width: int
    num_inference_steps: int
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    generator_device: str
    model_dtype: str
    timestep_dtype: str
    device: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        assert len(self.sigmas) == self.num_inference_steps + 1
        assert len(self.timesteps) == self.num_inference_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The latents a sample went through.

    Attributes:
        latents: x before each kept step, then the final latents; in the loop's dtype, float32 where steps differ.
        latent_step_indices: The state (0..T) that each row of `latents` is.
        timesteps: float32, as the model's schedule has them.
        sigmas: float32, 1 = noise.
    """

    latents: Float[Tensor, " kept *latent"]
    latent_step_indices: tuple[int, ...]
    timesteps: Float[Tensor, " steps"]
    sigmas: Float[Tensor, " states"]

    def __post_init__(self) -> None:
        assert self.latents.shape[0] == len(self.latent_step_indices)
        assert self.sigmas.shape[0] == self.timesteps.shape[0] + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugTensors:
    """What every transition saw and made; float32. At a deterministic step noise and std are zeros.

    Attributes:
        variance_noise: The standard normal noise of each step.
        prev_sample_mean: Mean of the next latents (the next latents themselves at a deterministic step).
        noise_std_dev: Total std of the transition.
        model_output: The guided velocity given to the transition, v = eps - x0.
    """

    variance_noise: Float[Tensor, " steps *latent"]
    prev_sample_mean: Float[Tensor, " steps *latent"]
    noise_std_dev: Float[Tensor, " steps 1"]
    model_output: Float[Tensor, " steps *latent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingEnv:
    """Every argument of the transformer that does not change along the trajectory, for one sample.

    The families declare which keys there are (`Family.env_schema`). Tensors have no batch dimension.

    Attributes:
        image_kwargs: Arguments of image conditioning; empty for text-to-image.
        pos_cond_kwargs: Arguments of the conditional branch.
        neg_cond_kwargs: Arguments of the unconditional branch; None without guidance.
        guidance: Guidance embedding input; None for models without one.
    """

    image_kwargs: Mapping[str, EnvValue] = field(default_factory=dict)
    pos_cond_kwargs: Mapping[str, EnvValue]
    neg_cond_kwargs: Mapping[str, EnvValue] | None
    guidance: Tensor | None = None

    def on_cpu(self) -> DenoisingEnv:
        """The same environment with its tensors on the CPU, sharing nothing with this one."""

        def copied(value: EnvValue) -> EnvValue:
            return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

        negative = self.neg_cond_kwargs
        return DenoisingEnv(
            image_kwargs={key: copied(value) for key, value in self.image_kwargs.items()},
            pos_cond_kwargs={key: copied(value) for key, value in self.pos_cond_kwargs.items()},
            neg_cond_kwargs=None if negative is None else {key: copied(value) for key, value in negative.items()},
            guidance=None if self.guidance is None else self.guidance.detach().to("cpu", copy=True),
        )

    def positive(self, key: str) -> Tensor:
        """The tensor `key` of the conditional branch."""
        return cast(Tensor, self.pos_cond_kwargs[key])

    def negative(self, key: str) -> Tensor:
        """The tensor `key` of the unconditional branch."""
        assert self.neg_cond_kwargs is not None
        return cast(Tensor, self.neg_cond_kwargs[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished sample.

    Attributes:
        request_id: Of the request it belongs to.
        prompt: The text.
        seed: This sample's own seed.
        image: Decoded picture in [0, 1], float32.
        log_probs: Per step, float32; 0.0 at deterministic steps. None for an evaluation.
        sde_step_indices: The steps that have a density, ascending. None for an evaluation.
        debug_tensors: Present if asked for.
        denoising_env: Present if asked for.
        dit_trajectory: Present if asked for.
        weight_version: Version of the weights that made it.
        sampling: How it was made.
        inference_time_s: Wall time of this sample's denoising loop and decode, seconds.
        peak_memory_mb: Peak memory of the engine's process so far (on CUDA: of this request), MiB.
    """

    request_id: str
    prompt: str
    seed: int
    image: Float[Tensor, " 3 1 height width"]
    log_probs: Float[Tensor, " steps"] | None = None
    sde_step_indices: tuple[int, ...] | None = None
    debug_tensors: DebugTensors | None = None
    denoising_env: DenoisingEnv | None = None
    dit_trajectory: Trajectory | None = None
    weight_version: str
    sampling: SamplingRecord
    inference_time_s: Number
    peak_memory_mb: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage:
    """One picture of plain text-to-image generation.

    Attributes:
        request_id: Of the request it belongs to.
        prompt: The text.
        seed: This sample's own seed.
        image: Decoded picture in [0, 1], float32.
        latents: Final latents in the loop's dtype, as the diffusers pipeline returns them for `output_type="latent"`.
        sampling: How it was made.
        weight_version: Version of the weights that made it.
        inference_time_s: Wall time of this sample's denoising loop and decode, seconds.
    """

    request_id: str
    prompt: str
    seed: int
    image: Float[Tensor, " 3 1 height width"]
    latents: Float[Tensor, " *latent"]
    sampling: SamplingRecord
    weight_version: str
    inference_time_s: Number
