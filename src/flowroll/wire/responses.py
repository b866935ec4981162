"""What the codec writes and reads, for the OpenAPI document only; a test holds the two together.

Shapes are per sample: T is the number of steps, H and W are pixels, L text tokens, and "latent" a sample's latents as the
family's loop has them (Qwen-Image [H/16 * W/16, 64], Z-Image [16, H/8, W/8]).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flowroll.types import MAX_REQUEST_ID_CHARS, SCHEMA_VERSION, SdeType


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TensorObject(_Answer):
    """A tensor. In msgpack, `data` is raw bytes."""

    is_tensor: Literal[True] = Field(alias="__tensor__", description="Marks a tensor.")
    data: str = Field(description='A safetensors blob with the key "t", in base64.')
    shape: list[int] = Field(description="Its shape.", examples=[[3, 1, 1024, 1024]])
    dtype: str = Field(description="Its dtype, as PyTorch prints it.", examples=["torch.float32", "torch.bfloat16"])


class DebugTensorsObject(_Answer):
    """What every transition saw and made; float32. At a deterministic step noise and std are zeros."""

    variance_noise: TensorObject = Field(description="[T, latent]: standard normal noise.")
    prev_sample_mean: TensorObject = Field(description="[T, latent]: mean of the next latents.")
    noise_std_dev: TensorObject = Field(description="[T, 1]: total std of the transition.")
    model_output: TensorObject = Field(description="[T, latent]: the guided velocity, v = eps - x0.")


class SglangDebugTensorsObject(_Answer):
    """The debug tensors as the sglang dialect names them."""

    rollout_variance_noises: TensorObject = Field(description="variance_noise of the native dialect.")
    rollout_prev_sample_means: TensorObject = Field(description="prev_sample_mean of the native dialect.")
    rollout_noise_std_devs: TensorObject = Field(description="noise_std_dev of the native dialect.")
    rollout_model_outputs: TensorObject = Field(description="model_output of the native dialect.")


class DenoisingEnvObject(_Answer):
    """Every argument of the transformer that does not change along the trajectory."""

    image_kwargs: dict[str, Any] = Field(description="Arguments of image conditioning; empty for text-to-image.")
    pos_cond_kwargs: dict[str, Any] = Field(
        description="Arguments of the conditional branch: tensors without batch dimension and plain nested lists. "
        "Qwen-Image: encoder_hidden_states [L, D], encoder_hidden_states_mask [L] where there is one, img_shapes; "
        "Z-Image: cap_feats [L, D]. txt_seq_lens [L] is metadata, never passed to the transformer. "
        "In the sglang dialect every family's embeds are encoder_hidden_states, a list of one tensor."
    )
    neg_cond_kwargs: dict[str, Any] | None = Field(description="Arguments of the unconditional branch; null without guidance.")
    guidance: TensorObject | None = Field(description="Guidance embedding input; null for models without one.")


class TrajectoryObject(_Answer):
    """The latents a sample went through."""

    latents: TensorObject = Field(
        description="[T+1, latent], or the latents asked for: x before each step, then the final latents; in the loop's "
        "dtype, float32 where steps differ."
    )
    timesteps: TensorObject = Field(
        description="[T] float32, as the model's schedule has them; [T+1] with a final 0 in the sglang dialect."
    )
    sigmas: TensorObject = Field(description="[T+1] float32; 1 is noise.")
    latent_step_indices: list[int] = Field(description="The state (0..T) of each returned latent.", examples=[[0, 1, 2]])


class AdapterRecordObject(_Answer):
    """The adapter that made a sample."""

    name: str = Field(description="It was loaded under.", examples=["step-120"])
    version: str = Field(description="Of the server's weights when it was loaded.", examples=["120"])
    sha256: str = Field(description="Over its tensors, their names and scales, as replay.adapter_checksum makes it.")
    merged: bool = Field(description="Whether it was added to the weights; else it ran beside them.")


class SamplingObject(_Answer):
    """How a sample was made: everything that replay needs beside its tensors and the weights."""

    family: str = Field(description="Model family.", examples=["qwen_image"])
    variant: str = Field(description="Variant of the family.", examples=["base"])
    sde_type: SdeType = Field(description="Dynamics of the stochastic steps.")
    noise_level: float = Field(description="The noise level that was asked for.", examples=[0.7])
    log_prob_no_const: bool = Field(description="Which of the two log-prob conventions was used.")
    guidance_rule: str = Field(description='How the branches were combined: "none", or the family\'s rule.')
    guidance_scale: float = Field(description='The effective scale; without meaning for rule "none".', examples=[4.0])
    negative_prompt: str | None = Field(description="Text of the unconditional branch; null without guidance.")
    height: int = Field(description="Pixels.", examples=[1024])
    width: int = Field(description="Pixels.", examples=[1024])
    num_inference_steps: int = Field(description="Number of steps T.", examples=[20])
    sigmas: list[float] = Field(description="T+1 noise levels; float32 values.")
    timesteps: list[float] = Field(description="T timesteps; float32 values.")
    generator_device: str = Field(description="Device type that the noise was drawn on.", examples=["cpu"])
    model_dtype: str = Field(description="Dtype of the transformer's inputs.", examples=["torch.bfloat16"])
    timestep_dtype: str = Field(description="Dtype in which the model's timestep was computed.", examples=["torch.float32"])
    device: str = Field(description="Device type that the transformer ran on.", examples=["cuda"])
    schema_version: int = Field(description="Version of this layout.", examples=[SCHEMA_VERSION])
    pos_cond_sha256: str | None = Field(
        default=None, description="Digest of denoising_env.pos_cond_kwargs as it was made; null where no env was returned."
    )
    neg_cond_sha256: str | None = Field(default=None, description="Digest of denoising_env.neg_cond_kwargs.")
    lora: AdapterRecordObject | None = Field(
        default=None, description="The adapter that it was made with; null: the model as it is."
    )


class RolloutObject(_Answer):
    """One sample of POST /rollout/generate, whose answer is a list of these. Evaluations have null rollout fields."""

    request_id: str = Field(description="Of the request.", examples=["step-120-prompt-7"])
    prompt: str = Field(description="The text.", examples=["a red fox in snow"])
    seed: int = Field(description="This sample's own seed.", examples=[42])
    generated_output: TensorObject = Field(description="[3, 1, H, W] float32 in [0, 1].")
    rollout_log_probs: TensorObject | None = Field(description="[T] float32; 0.0 at deterministic steps.")
    rollout_debug_tensors: DebugTensorsObject | SglangDebugTensorsObject | None = Field(
        description="Per-step tensors, if rollout_debug_mode is true."
    )
    denoising_env: DenoisingEnvObject | None = Field(description="If rollout_return_denoising_env is true.")
    dit_trajectory: TrajectoryObject | None = Field(description="If rollout_return_dit_trajectory is true.")
    sde_step_indices: list[int] | None = Field(description="The steps that have a density.", examples=[[0, 1, 2]])
    weight_version: str = Field(description="Version of the weights that made it.", examples=["0"])
    sampling: SamplingObject = Field(description="How it was made.")
    inference_time_s: float = Field(description="Wall time of the sample's denoising and decode, seconds.", examples=[1.8])
    peak_memory_mb: float = Field(description="Peak memory, MiB.", examples=[61440.0])


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


class RecordedStepsObject(_Answer):
    """Some steps of one sample; n is their number."""

    steps: list[int] = Field(min_length=1, description="Which steps, 0-based.", examples=[[0, 3]])
    latents: TensorObject = Field(description="[n, latent]: x before each step, as dit_trajectory has it.")
    next_latents: TensorObject = Field(description="[n, latent]: x after each step.")
    denoising_env: DenoisingEnvObject = Field(description="Of the rollout.")
    sampling: SamplingObject = Field(description="Of the rollout.")
    sde_step_indices: list[int] | None = Field(
        default=None, description="Of the rollout. null: every step follows sampling.sde_type.", examples=[[0, 1, 2]]
    )


class ScoreRequestObject(_Answer):
    """Body of POST /rollout/score; read by the codec, which refuses unknown names."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
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
            ]
        }
    )

    samples: list[RecordedStepsObject] = Field(
        min_length=1, description="What to score; each step is scored alone. At most max_scores steps in all."
    )
    log_probs_only: bool = Field(
        default=False, description="Leave means and velocities out; no forward is run for a step without density."
    )
    suppress_logs: bool = Field(default=False, description="Do not log this request.")
    request_id: str | None = Field(
        default=None, min_length=1, max_length=MAX_REQUEST_ID_CHARS, description="Echoed. null: the server makes one."
    )
    min_weight_version: str | None = Field(
        default=None,
        description="409 if the weights are older than this version. Numbers compare as numbers, names by arrival.",
        examples=["120"],
    )


class SampleScoresObject(_Answer):
    """The scored steps of one sample; float32."""

    steps: list[int] = Field(description="Which steps, as asked for.", examples=[[0, 3]])
    log_probs: TensorObject = Field(description="[n]; 0.0 at deterministic steps.")
    stds: TensorObject = Field(description="[n]: total std of the transitions; 0.0 at deterministic steps.")
    means: TensorObject | None = Field(description="[n, latent]: mean of the next latents; null with log_probs_only.")
    velocities: TensorObject | None = Field(description="[n, latent]: the guided velocities; null with log_probs_only.")
    lora: AdapterRecordObject | None = Field(
        description="What scored them: the adapter that now has the name in sampling.lora; null: the model as it is."
    )


class ScoreAnswerObject(_Answer):
    """Answer of POST /rollout/score."""

    request_id: str = Field(description="Of the request.", examples=["step-120-scores"])
    weight_version: str = Field(description="Version of the weights that scored all of it.", examples=["0"])
    inference_time_s: float = Field(description="Wall time, seconds.", examples=[0.8])
    samples: list[SampleScoresObject] = Field(description="In the order of the request.")


class GeneratedImageObject(_Answer):
    """One image of POST /generate, whose JSON answer is a list of these."""

    request_id: str = Field(description="Of the request.", examples=["poster-3"])
    prompt: str = Field(description="The text.", examples=["a red fox in snow"])
    seed: int = Field(description="This image's own seed.", examples=[42])
    generated_output: TensorObject = Field(description="[3, 1, H, W] float32 in [0, 1].")
    latents: TensorObject = Field(description="The final latents, in the loop's dtype.")
    weight_version: str = Field(description="Version of the weights that made it.", examples=["0"])
    sampling: SamplingObject = Field(description="How it was made.")
    inference_time_s: float = Field(description="Wall time of the image's denoising and decode, seconds.", examples=[1.8])


class Base64Image(_Answer):
    """One image of an OpenAI answer."""

    b64_json: str = Field(description="The PNG in base64.")


class ImagesObject(_Answer):
    """Answer of POST /v1/images/generations."""

    created: int = Field(description="Unix time, seconds.", examples=[1767225600])
    data: list[Base64Image] = Field(description="The images.")
