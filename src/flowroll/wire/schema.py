"""The requests: what POST /rollout/generate, /generate and /v1/images/generations accept, and nothing else.

The models carry what OpenAPI shows. Types are strict and unknown fields are refused. Names and defaults are those of
`SamplingParams`, which `to_params` makes; its short names are for `extra_sampling_params` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flowroll.errors import InvalidRequestError
from flowroll.types import ALIASES, SamplingParams
from flowroll.wire import fields
from flowroll.wire.fields import Rule
from flowroll.wire.names import EXTRA
from flowroll.wire.validation import parse, parse_json_body, shown

__all__ = [
    "ExtraGenerateParams",
    "ExtraSamplingParams",
    "GenerateRequest",
    "ImagesRequest",
    "RolloutRequest",
    "Strict",
    "parse",
    "parse_json_body",
]


class Strict(BaseModel):
    """What every request has in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    def given(self) -> dict[str, Any]:
        """The fields that were sent with a value; null is the same as nothing. Lists become tuples."""
        sent = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in sent.items() if value is not None}


class _Prompted(Strict):
    prompt: fields.Prompt


class _SamplingFields(Strict):
    negative_prompt: fields.NegativePrompt = None
    seed: fields.Seed = None
    seeds: fields.Seeds = None
    generator_device: fields.Device = "cuda"
    width: fields.Width = None
    height: fields.Height = None
    num_inference_steps: fields.Steps = None
    num_outputs_per_prompt: fields.Outputs = None
    num_frames: fields.Frames = None
    fps: fields.FramesPerSecond = None
    guidance_scale: fields.GuidanceScale = None
    true_cfg_scale: fields.TrueCfgScale = None
    suppress_logs: fields.SuppressLogs = False
    request_id: fields.RequestId = None
    min_weight_version: fields.MinWeightVersion = None
    lora_name: fields.LoraName = None


class _RolloutFields(Strict):
    rollout: fields.RolloutFlag = True
    rollout_sde_type: fields.SdeTypeName = "sde"
    rollout_noise_level: fields.NoiseLevel = 0.7
    rollout_log_prob_no_const: fields.LogProbNoConst = False
    rollout_debug_mode: fields.DebugMode = True
    rollout_return_denoising_env: fields.ReturnEnv = False
    rollout_return_dit_trajectory: fields.ReturnTrajectory = False
    rollout_sde_step_indices: fields.SdeSteps = None
    rollout_return_step_indices: fields.ReturnSteps = None


class ExtraGenerateParams(_SamplingFields):
    """Further parameters of a plain generation. A field given here must not be given at the top level too."""

    sigmas: fields.Sigmas = None


class ExtraSamplingParams(ExtraGenerateParams, _RolloutFields):
    """Further parameters of a rollout, by either of their names. Each must be given once, here or at the top level."""

    sde_type: fields.SdeTypeName = "sde"
    noise_level: fields.NoiseLevel = 0.7
    log_prob_no_const: fields.LogProbNoConst = False
    debug_mode: fields.DebugMode = True
    return_denoising_env: fields.ReturnEnv = False
    return_dit_trajectory: fields.ReturnTrajectory = False
    sde_step_indices: fields.SdeSteps = None
    return_step_indices: fields.ReturnSteps = None


class _Request(_Prompted):
    """What the three requests share: they become `SamplingParams`, and errors about those get the wire's names."""

    # What every request of the route has.
    _fixed: ClassVar[Mapping[str, Any]] = {}

    def to_params(self) -> SamplingParams:
        """The request as `SamplingParams`; what was not sent keeps its default.

        Raises:
            InvalidRequestError: Values that do not go together; named as the wire has them.
        """
        try:
            return SamplingParams(**self._params(), **self._fixed)
        except InvalidRequestError as error:
            raise self.as_wire_error(error) from None

    def as_wire_error(self, error: InvalidRequestError) -> InvalidRequestError:
        """The error about a field of `SamplingParams`, naming what this request calls it."""
        if error.field is None:
            return error
        return error.renamed(self._wire_name(error.field))

    def _params(self) -> dict[str, Any]:
        raise NotImplementedError

    def _wire_name(self, param: str) -> str:
        raise NotImplementedError


class _ExtensibleRequest(_Request):
    """A request with `extra_sampling_params`."""

    extra_sampling_params: ExtraGenerateParams | None = None

    @model_validator(mode="after")
    def _check_given_once(self) -> _ExtensibleRequest:
        seen = set(self.given())
        for name, value in self._extra().items():
            field = ALIASES.get(name, name)
            if field in seen:
                raise InvalidRequestError(
                    f"{EXTRA}.{name} must be given once, got {shown(value)} beside another {field}; remove one of the two.",
                    field=f"{EXTRA}.{name}",
                )
            seen.add(field)
        return self

    def _extra(self) -> dict[str, Any]:
        return {} if self.extra_sampling_params is None else self.extra_sampling_params.given()

    def _params(self) -> dict[str, Any]:
        return {name: value for name, value in self.given().items() if name != EXTRA} | self._extra()

    def _wire_name(self, param: str) -> str:
        field = ALIASES.get(param, param)
        nested = next((name for name in self._extra() if ALIASES.get(name, name) == field), None)
        return field if nested is None else f"{EXTRA}.{nested}"


class RolloutRequest(_RolloutFields, _SamplingFields, _ExtensibleRequest):
    """Body of POST /rollout/generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "a red fox in snow",
                    "seed": 42,
                    "num_outputs_per_prompt": 4,
                    "num_inference_steps": 10,
                    "rollout_sde_step_indices": [0, 1, 2],
                    "rollout_return_denoising_env": True,
                    "rollout_return_dit_trajectory": True,
                }
            ]
        }
    )

    extra_sampling_params: Annotated[
        ExtraSamplingParams | None,
        Field(description="Further fields, each with the rules of its namesake.", examples=[{"sigmas": [1.0, 0.5, 0.0]}]),
        Rule(text="be null or an object", remedy="send further sampling parameters by name"),
    ] = None
    image_path: fields.ImagePath = None


class GenerateRequest(_SamplingFields, _ExtensibleRequest):
    """Body of POST /generate: plain text-to-image."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a red fox in snow", "seed": 42}]})
    _fixed: ClassVar[Mapping[str, Any]] = {"rollout": False}

    extra_sampling_params: Annotated[
        ExtraGenerateParams | None,
        Field(description="Further fields, each with the rules of its namesake.", examples=[{"sigmas": [1.0, 0.5, 0.0]}]),
        Rule(text="be null or an object", remedy="send further sampling parameters by name"),
    ] = None


class ImagesRequest(_Request):
    """Body of POST /v1/images/generations, as OpenAI's clients send it; the last four fields are flowroll's own."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a red fox in snow", "n": 1, "size": "1024x1024"}]})
    _fixed: ClassVar[Mapping[str, Any]] = {"rollout": False}
    _NAMES: ClassVar[Mapping[str, str]] = {"num_outputs_per_prompt": "n", "width": "size", "height": "size"}

    model: fields.Model = None
    n: fields.ImageCount = None
    size: fields.ImageSize = None
    response_format: fields.ResponseFormat = None
    user: fields.User = None
    quality: fields.Quality = None
    style: fields.Style = None
    background: fields.Background = None
    output_format: fields.OutputFormat = None
    output_compression: fields.OutputCompression = None
    moderation: fields.Moderation = None
    stream: fields.Stream = None
    partial_images: fields.PartialImages = None
    seed: fields.Seed = None
    negative_prompt: fields.NegativePrompt = None
    num_inference_steps: fields.Steps = None
    guidance_scale: fields.GuidanceScale = None

    def _params(self) -> dict[str, Any]:
        shared = ("prompt", "seed", "negative_prompt", "num_inference_steps", "guidance_scale")
        params = {name: value for name, value in self.given().items() if name in shared}
        if self.n is not None:
            params["num_outputs_per_prompt"] = self.n
        if self.size is not None and self.size != "auto":
            params["width"], params["height"] = map(int, self.size.split("x"))
        return params

    def _wire_name(self, param: str) -> str:
        return self._NAMES.get(param, param)
