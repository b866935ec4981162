"""The messages with tensors: answers of POST /rollout/generate, /generate and /rollout/score, and the last one's requests.

A message has one definition for both sides: the codec decodes by it, and the OpenAPI document shows it. A message is generic in
its leaves, the form in which a wire format writes a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import Meta

from flowroll.types import (
    MAX_LORA_NAME_CHARS,
    MAX_REQUEST_ID_CHARS,
    MAX_VERSION_CHARS,
    SCHEMA_VERSION,
    AdapterRecord,
    Exactness,
    Number,
    PolicyRecord,
    Provenance,
    SamplingRecord,
    StepField,
    StepStamp,
)
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
        __tensor__: Marks the object as a tensor.
        data: A safetensors blob with the key "t", in base64.
        shape: The tensor's shape.
        dtype: The tensor's dtype, as PyTorch prints it.
    """

    is_tensor: Literal[True] = msgspec.field(name="__tensor__")
    data: Data
    shape: Annotated[tuple[int, ...], Meta(examples=[[3, 1, 1024, 1024]])]
    dtype: Annotated[str, Meta(examples=["torch.float32", "torch.bfloat16"])]


class WireEnv(msgspec.Struct, Generic[Leaf], frozen=True):
    """Every argument of the transformer that does not change along the trajectory.

    Attributes:
        image_kwargs: Arguments of reference images; empty for text-to-image. Qwen-Image-Edit: image_latents [R, 64], which
            stand behind the latents in the model's input.
        pos_cond_kwargs: Arguments of the conditional branch: tensors without batch dimension and plain nested lists.
            Qwen-Image: encoder_hidden_states [L, D], encoder_hidden_states_mask [L] where there is one, img_shapes; Z-Image:
            cap_feats [L, D]; Stable Diffusion 3: encoder_hidden_states [L, D], pooled_projections [P]; FLUX.1: these two,
            txt_ids [L, 3] and img_ids [S, 3]. txt_seq_lens [L] is metadata, never passed to the transformer. In the sglang
            dialect the embeds of Qwen-Image and Z-Image are encoder_hidden_states, a list of one tensor, and in place of the
            ids of FLUX.1 there is freqs_cis, a list of cosines and sines [L + S, width / 2].
        neg_cond_kwargs: Arguments of the unconditional branch; null without guidance.
        guidance: The guidance scale that the model was given, float32, as diffusers' model takes it; null for models without
            such an input.
    """

    pos_cond_kwargs: dict[str, WireEnvValue[Leaf]]
    image_kwargs: dict[str, WireEnvValue[Leaf]] = {}
    neg_cond_kwargs: dict[str, WireEnvValue[Leaf]] | None = None
    guidance: Leaf | None = None


class WireTrajectory(msgspec.Struct, Generic[Leaf], frozen=True):
    """The latents of a sample along its steps.

    Attributes:
        latents: [T+1, latent], or the requested ones of these: x before each step, then the final latents; in the loop's dtype,
            float32 where steps differ.
        timesteps: [T] float32, the timesteps of the model's schedule; [T+1] with a final 0 in the sglang dialect.
        sigmas: [T+1] float32, the noise levels; 1 is noise.
        latent_step_indices: The state (0..T) of each returned latent; in the sglang dialect as an int64 tensor.
    """

    latents: Leaf
    timesteps: Leaf
    sigmas: Leaf
    latent_step_indices: tuple[int, ...] | Leaf


class WireStepTensors(msgspec.Struct, Generic[Leaf], frozen=True):
    """The fields of single steps that a request chose; n is the number of steps.

    Attributes:
        step_indices: The step of each row.
        tensors: float32, by field. x0 [n, latent]: the clean prediction; velocity [n, latent]: guided, v = eps - x0; mean
            [n, latent]: of the next latents; noise [n, latent]: zeros at a deterministic step; std [n, 1].
    """

    step_indices: tuple[int, ...]
    tensors: Annotated[dict[str, Leaf], Meta(extra_json_schema={"propertyNames": {"enum": [*get_args(StepField)]}})]


class WireStepImages(msgspec.Struct, Generic[Leaf], frozen=True):
    """The clean predictions of single steps as pictures.

    Attributes:
        step_indices: The step of each picture.
        images: The pictures, each as generated_output.
    """

    step_indices: tuple[int, ...]
    images: list[Leaf | bytes]


class WireSample(msgspec.Struct, Generic[Leaf], frozen=True):
    """One sample of POST /rollout/generate, whose answer is a list of these. Evaluations have null rollout fields.

    T is the number of steps, H and W are the height and width in pixels, L is the number of text tokens, and "latent" is the
    shape of a sample's latents in the family's loop (Qwen-Image [H/16 * W/16, 64], Z-Image [16, H/8, W/8]).

    Attributes:
        request_id: Id of the request.
        prompt: The prompt's text; null where the request gave none, but its token ids.
        seed: This sample's own seed; that of the sample that it descends from, for a leaf of a tree.
        generated_output: The image as image_format asks for it: [3, 1, H, W] float32 in [0, 1], 4 channels where the model
            draws an alpha channel; the same shape in uint8; the bytes of a PNG file (in JSON as base64); or null.
        weight_version: Version of the weights that made the sample.
        sampling: The record of how the sample was made.
        inference_time_s: Wall time of the sample's denoising and decode, seconds.
        peak_memory_mb: Peak memory in MiB.
        latents: The final latents in the loop's dtype, if image_format is "none".
        rollout_log_probs: [T] float32, the log-prob of each step; 0.0 at deterministic steps, and at steps that were not run.
        rollout_debug_tensors: What every transition saw and made, if rollout_debug_mode is true; float32. variance_noise
            [T, latent]: standard normal noise; prev_sample_mean [T, latent]: mean of the next latents; noise_std_dev [T, 1]:
            total std of the transition; model_output [T, latent]: the guided velocity, v = eps - x0. At a deterministic step
            noise and std are zeros, at one that was not run all are. In the sglang dialect the plural names stand for the
            same tensors in the same order.
        denoising_env: The arguments of the transformer, present if rollout_return_denoising_env is true.
        dit_trajectory: The latents along the steps, present if rollout_return_dit_trajectory is true.
        sde_step_indices: The steps that have a density.
        step_tensors: The fields of steps that return_fields asks for.
        step_images: The pictures that decode_step_indices asks for.
        provenance: What proves where the sample comes from: digests of its start and its noise, and the engine that made it.
        first_step: When the sample's first step was taken, and by which weights.
        last_step: When its last step was taken, and by which weights.
        left_out: The places of the request's samples, in the order of the seeds, that an abort with keep_partial left out of
            the answer; empty for a whole answer.
    """

    request_id: str
    prompt: str | None
    seed: int
    generated_output: Leaf | bytes | None
    weight_version: str
    sampling: SamplingRecord
    inference_time_s: Number
    peak_memory_mb: Number
    latents: Leaf | None = None
    rollout_log_probs: Leaf | None = None
    rollout_debug_tensors: Annotated[dict[str, Leaf] | None, _DEBUG_SCHEMA] = None
    denoising_env: WireEnv[Leaf] | None = None
    dit_trajectory: WireTrajectory[Leaf] | None = None
    sde_step_indices: tuple[int, ...] | None = None
    step_tensors: WireStepTensors[Leaf] | None = None
    step_images: WireStepImages[Leaf] | None = None
    provenance: Provenance | None = None
    first_step: StepStamp | None = None
    last_step: StepStamp | None = None
    left_out: tuple[int, ...] = ()


class WireImage(msgspec.Struct, Generic[Leaf], frozen=True):
    """One image of POST /generate, whose JSON answer is a list of these.

    Attributes:
        request_id: Id of the request.
        prompt: The prompt's text; null where the request gave none, but its token ids.
        seed: This image's own seed.
        generated_output: [3, 1, H, W] float32, the image in [0, 1]; 4 channels where the model draws an alpha channel.
        latents: The final latents, in the loop's dtype.
        weight_version: Version of the weights that made the image.
        sampling: The record of how the image was made.
        inference_time_s: Wall time of the image's denoising and decode, seconds.
        first_step: When the image's first step was taken, and by which weights.
        last_step: When its last step was taken, and by which weights.
        left_out: The places of the request's images that an abort with keep_partial left out; empty for a whole answer.
        exactness: "fast" for a server in the mode that is not exact.
    """

    request_id: str
    prompt: str | None
    seed: int
    generated_output: Leaf
    latents: Leaf
    weight_version: str
    sampling: SamplingRecord
    inference_time_s: Number
    first_step: StepStamp | None = None
    last_step: StepStamp | None = None
    left_out: tuple[int, ...] = ()
    exactness: Exactness = "exact"


class SentEnv(WireEnv[Leaf], Generic[Leaf], frozen=True, forbid_unknown_fields=True):
    """The environment of a rollout, in the form of its answer."""


class WireSteps(msgspec.Struct, Generic[Leaf], frozen=True, forbid_unknown_fields=True):
    """Some steps of one sample; n is their number.

    Attributes:
        steps: The steps, counted from 0.
        latents: [n, latent]: x before each step, as in dit_trajectory.
        next_latents: [n, latent]: x after each step.
        denoising_env: The rollout's denoising_env.
        sampling: The rollout's sampling record.
        sde_step_indices: The rollout's sde_step_indices. null: every step follows sampling.sde_type.
    """

    steps: Annotated[tuple[int, ...], Meta(extra_json_schema={"minItems": 1})]
    latents: Leaf
    next_latents: Leaf
    denoising_env: SentEnv[Leaf]
    # Decoded by our own code, because the names in it are checked too.
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
# A PNG file of one gray pixel, in base64.
IMAGE_EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNoaGgAAAMEAYFL09IQAAAAAElFTkSuQmCC"
TENSOR_EXAMPLE: dict[str, Any] = {"__tensor__": True, "shape": [1, 2], "dtype": "torch.float32", "data": _BLOB}
# The same of two booleans.
_MASK_BLOB = "OAAAAAAAAAB7InQiOnsiZHR5cGUiOiJCT09MIiwic2hhcGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpbMCwyXX19IAEA"
MASK_EXAMPLE: dict[str, Any] = {"__tensor__": True, "shape": [2], "dtype": "torch.bool", "data": _MASK_BLOB}
_SCORE_EXAMPLE: dict[str, Any] = {
    "samples": [
        {
            "steps": [0],
            "latents": TENSOR_EXAMPLE,
            "next_latents": TENSOR_EXAMPLE,
            "denoising_env": {
                "image_kwargs": {},
                "pos_cond_kwargs": {"cap_feats": TENSOR_EXAMPLE},
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
        samples: The recorded steps of each sample; the log-prob of each step is recomputed alone. At most max_scores steps in
            all.
        log_probs_only: Whether to leave out means and velocities; no forward is run for a step without density.
        suppress_logs: Whether this request is left out of the log.
        request_id: Id of the request, which the answer repeats. null: the server makes one.
        min_weight_version: The answer is 409 if the weights are older than this version. Numbers compare as numbers, names by
            arrival.
        policy: The policy, or the adapter, under which all steps are computed, whatever made them. null or "default": the
            weights as they are, with each sample's own adapter.
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
    policy: Annotated[
        str | None, Meta(examples=["old"], extra_json_schema={"minLength": 1, "maxLength": MAX_LORA_NAME_CHARS})
    ] = None


class WireSampleScores(msgspec.Struct, Generic[Leaf], frozen=True):
    """The recomputed steps of one sample; float32.

    Attributes:
        steps: The steps as requested.
        log_probs: [n]: log-probs of the next latents; 0.0 at deterministic steps.
        stds: [n]: total std of the transitions; 0.0 at deterministic steps.
        means: [n, latent]: mean of the next latents; null with log_probs_only.
        velocities: [n, latent]: the guided velocities; null with log_probs_only.
        lora: The adapter that was used: the one that now has the name in sampling.lora, or the policy's. null: no adapter.
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
        request_id: Id of the request.
        weight_version: Version of the weights with which all steps were computed.
        samples: The results of each sample, in the order of the request.
        inference_time_s: Wall time in seconds.
        policy: The policy under which they were computed; null: the default, or an adapter that is no policy.
        exactness: "fast" for a server in the mode that is not exact.
    """

    request_id: str
    weight_version: str
    samples: list[WireSampleScores[Leaf]]
    inference_time_s: Number
    policy: PolicyRecord | None = None
    exactness: Exactness = "exact"
