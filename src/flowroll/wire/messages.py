"""The messages that hold tensors: answers of POST /rollout/generate, /generate and /rollout/score, and its requests.

One definition for both sides: the codec decodes by it and the OpenAPI document shows it. A message is generic in its leaves,
which are how the wire format at hand writes a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from flowroll.types import MAX_REQUEST_ID_CHARS, MAX_VERSION_CHARS, SCHEMA_VERSION, AdapterRecord, Number, SamplingRecord
from flowroll.wire.describe import REF

Dialect: TypeAlias = Literal["native", "sglang"]
Leaf = TypeVar("Leaf")
Data = TypeVar("Data")
LeafOrPlain: TypeAlias = Leaf | list[Any] | int | float | str | bool
WireEnvValue: TypeAlias = Leaf | list[LeafOrPlain[Leaf]] | int | float | str | bool

# Native name -> name in the sglang dialect.
DEBUG_NAMES: Mapping[str, str] = {
    "variance_noise": "rollout_variance_noises",
    "prev_sample_mean": "rollout_prev_sample_means",
    "noise_std_dev": "rollout_noise_std_devs",
    "model_output": "rollout_model_outputs",
}
_DEBUG_SCHEMA = msgspec.Meta(extra_json_schema={"propertyNames": {"enum": [*DEBUG_NAMES, *DEBUG_NAMES.values()]}})


class WireTensor(msgspec.Struct, Generic[Data], frozen=True, forbid_unknown_fields=True):
    """A tensor. In msgpack, `data` is raw bytes.

    Attributes:
        __tensor__: Marks a tensor.
        data: A safetensors blob with the key "t", in base64.
        shape: Its shape.
        dtype: Its dtype, as PyTorch prints it.
    """

    is_tensor: Literal[True] = msgspec.field(name="__tensor__")
    data: Data
    shape: Annotated[tuple[int, ...], Meta(examples=[[3, 1, 1024, 1024]])]
    dtype: Annotated[str, Meta(examples=["torch.float32", "torch.bfloat16"])]


class WireEnv(msgspec.Struct, Generic[Leaf], frozen=True):
    """Every argument of the transformer that does not change along the trajectory.

    Attributes:
        image_kwargs: Arguments of image conditioning; empty for text-to-image.
        pos_cond_kwargs: Arguments of the conditional branch: tensors without batch dimension and plain nested lists.
            Qwen-Image: encoder_hidden_states [L, D], encoder_hidden_states_mask [L] where there is one, img_shapes; Z-Image:
            cap_feats [L, D]; Stable Diffusion 3: encoder_hidden_states [L, D], pooled_projections [P]. txt_seq_lens [L] is
            metadata, never passed to the transformer. In the sglang dialect the embeds of Qwen-Image and Z-Image are
            encoder_hidden_states, a list of one tensor.
        neg_cond_kwargs: Arguments of the unconditional branch; null without guidance.
        guidance: Guidance embedding input; null for models without one.
    """

    pos_cond_kwargs: dict[str, WireEnvValue[Leaf]]
    image_kwargs: dict[str, WireEnvValue[Leaf]] = {}
    neg_cond_kwargs: dict[str, WireEnvValue[Leaf]] | None = None
    guidance: Leaf | None = None


class WireTrajectory(msgspec.Struct, Generic[Leaf], frozen=True):
    """The latents a sample went through.

    Attributes:
        latents: [T+1, latent], or the latents asked for: x before each step, then the final latents; in the loop's dtype,
            float32 where steps differ.
        timesteps: [T] float32, as the model's schedule has them; [T+1] with a final 0 in the sglang dialect.
        sigmas: [T+1] float32; 1 is noise.
        latent_step_indices: The state (0..T) of each returned latent.
    """

    latents: Leaf
    timesteps: Leaf
    sigmas: Leaf
    latent_step_indices: tuple[int, ...]


class WireSample(msgspec.Struct, Generic[Leaf], frozen=True):
    """One sample of POST /rollout/generate, whose answer is a list of these. Evaluations have null rollout fields.

    T is the number of steps, H and W are pixels, L text tokens, and "latent" a sample's latents as the family's loop has them
    (Qwen-Image [H/16 * W/16, 64], Z-Image [16, H/8, W/8]).

    Attributes:
        request_id: Of the request.
        prompt: The text.
        seed: This sample's own seed.
        generated_output: [3, 1, H, W] float32 in [0, 1].
        weight_version: Version of the weights that made it.
        sampling: How it was made.
        inference_time_s: Wall time of the sample's denoising and decode, seconds.
        peak_memory_mb: Peak memory, MiB.
        rollout_log_probs: [T] float32; 0.0 at deterministic steps.
        rollout_debug_tensors: What every transition saw and made, if rollout_debug_mode is true; float32. variance_noise
            [T, latent]: standard normal noise; prev_sample_mean [T, latent]: mean of the next latents; noise_std_dev [T, 1]:
            total std of the transition; model_output [T, latent]: the guided velocity, v = eps - x0. At a deterministic step
            noise and std are zeros. In the sglang dialect the plural names stand for the same tensors in the same order.
        denoising_env: If rollout_return_denoising_env is true.
        dit_trajectory: If rollout_return_dit_trajectory is true.
        sde_step_indices: The steps that have a density.
    """

    request_id: str
    prompt: str
    seed: int
    generated_output: Leaf
    weight_version: str
    sampling: SamplingRecord
    inference_time_s: Number
    peak_memory_mb: Number
    rollout_log_probs: Leaf | None = None
    rollout_debug_tensors: Annotated[dict[str, Leaf] | None, _DEBUG_SCHEMA] = None
    denoising_env: WireEnv[Leaf] | None = None
    dit_trajectory: WireTrajectory[Leaf] | None = None
    sde_step_indices: tuple[int, ...] | None = None


class WireImage(msgspec.Struct, Generic[Leaf], frozen=True):
    """One image of POST /generate, whose JSON answer is a list of these.

    Attributes:
        request_id: Of the request.
        prompt: The text.
        seed: This image's own seed.
        generated_output: [3, 1, H, W] float32 in [0, 1].
        latents: The final latents, in the loop's dtype.
        weight_version: Version of the weights that made it.
        sampling: How it was made.
        inference_time_s: Wall time of the image's denoising and decode, seconds.
    """

    request_id: str
    prompt: str
    seed: int
    generated_output: Leaf
    latents: Leaf
    weight_version: str
    sampling: SamplingRecord
    inference_time_s: Number


class SentEnv(WireEnv[Leaf], Generic[Leaf], frozen=True, forbid_unknown_fields=True):
    """The environment of a rollout, as its answer has it."""


class WireSteps(msgspec.Struct, Generic[Leaf], frozen=True, forbid_unknown_fields=True):
    """Some steps of one sample; n is their number.

    Attributes:
        steps: Which steps, 0-based.
        latents: [n, latent]: x before each step, as dit_trajectory has it.
        next_latents: [n, latent]: x after each step.
        denoising_env: Of the rollout.
        sampling: Of the rollout.
        sde_step_indices: Of the rollout. null: every step follows sampling.sde_type.
    """

    steps: Annotated[tuple[int, ...], Meta(extra_json_schema={"minItems": 1})]
    latents: Leaf
    next_latents: Leaf
    denoising_env: SentEnv[Leaf]
    # Read by hand, for the names in it are checked too.
    sampling: Annotated[dict[str, Any], Meta(extra_json_schema={"$ref": REF.format(name=SamplingRecord.__name__)})]
    sde_step_indices: tuple[int, ...] | None = None


_RECORD_EXAMPLE: dict[str, Any] = {
    "family": "z_image",
    "variant": "turbo",
    "sde_type": "sde",
    "noise_level": 0.7,
    "log_prob_no_const": False,
    "guidance_rule": "none",
    "guidance_scale": 0.0,
    "negative_prompt": None,
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 1,
    "sigmas": [1.0, 0.0],
    "timesteps": [1000.0],
    "generator_device": "cuda",
    "model_dtype": "torch.bfloat16",
    "timestep_dtype": "torch.float32",
    "device": "cuda",
    "schema_version": SCHEMA_VERSION,
}
# A safetensors blob of a [1, 2] tensor, in base64.
_BLOB = "QAAAAAAAAAB7InQiOnsiZHR5cGUiOiJGMzIiLCJzaGFwZSI6WzEsMl0sImRhdGFfb2Zmc2V0cyI6WzAsOF19fSAgICAgICAgAAAAPwAAgL8="
_TENSOR_EXAMPLE: dict[str, Any] = {"__tensor__": True, "shape": [1, 2], "dtype": "torch.float32", "data": _BLOB}
_SCORE_EXAMPLE: dict[str, Any] = {
    "samples": [
        {
            "steps": [0],
            "latents": _TENSOR_EXAMPLE,
            "next_latents": _TENSOR_EXAMPLE,
            "denoising_env": {
                "image_kwargs": {},
                "pos_cond_kwargs": {"cap_feats": _TENSOR_EXAMPLE},
                "neg_cond_kwargs": None,
                "guidance": None,
            },
            "sampling": _RECORD_EXAMPLE,
            "sde_step_indices": [0],
        }
    ],
    "log_probs_only": True,
}


class WireScoreRequest(msgspec.Struct, Generic[Leaf], frozen=True, forbid_unknown_fields=True):
    """Body of POST /rollout/score.

    Attributes:
        samples: What to score; each step is scored alone. At most max_scores steps in all.
        log_probs_only: Leave means and velocities out; no forward is run for a step without density.
        suppress_logs: Do not log this request.
        request_id: Echoed. null: the server makes one.
        min_weight_version: 409 if the weights are older than this version. Numbers compare as numbers, names by arrival.
    """

    EXAMPLES: ClassVar[tuple[Mapping[str, Any], ...]] = (_SCORE_EXAMPLE,)

    samples: Annotated[list[WireSteps[Leaf]], Meta(extra_json_schema={"minItems": 1})]
    log_probs_only: bool = False
    suppress_logs: bool = False
    # Their limits are checked, and worded, by `ScoreParams`.
    request_id: Annotated[str | None, Meta(extra_json_schema={"minLength": 1, "maxLength": MAX_REQUEST_ID_CHARS})] = None
    min_weight_version: Annotated[
        str | None, Meta(examples=["120"], extra_json_schema={"minLength": 1, "maxLength": MAX_VERSION_CHARS})
    ] = None


class WireSampleScores(msgspec.Struct, Generic[Leaf], frozen=True):
    """The scored steps of one sample; float32.

    Attributes:
        steps: Which steps, as asked for.
        log_probs: [n]; 0.0 at deterministic steps.
        stds: [n]: total std of the transitions; 0.0 at deterministic steps.
        means: [n, latent]: mean of the next latents; null with log_probs_only.
        velocities: [n, latent]: the guided velocities; null with log_probs_only.
        lora: What scored them: the adapter that now has the name in sampling.lora; null: the model as it is.
    """

    steps: tuple[int, ...]
    log_probs: Leaf
    stds: Leaf
    means: Leaf | None = None
    velocities: Leaf | None = None
    lora: AdapterRecord | None = None


class WireScoreAnswer(msgspec.Struct, Generic[Leaf], frozen=True):
    """Answer of POST /rollout/score.

    Attributes:
        request_id: Of the request.
        weight_version: Version of the weights that scored all of it.
        samples: In the order of the request.
        inference_time_s: Wall time, seconds.
    """

    request_id: str
    weight_version: str
    samples: list[WireSampleScores[Leaf]]
    inference_time_s: Number
