"""The requests of POST /rollout/generate, /generate, /v1/images/generations and /edits, which become `SamplingParams`.

Types are strict and unknown fields are refused. The fields are described where `SamplingParams` describes them; its short
names are for `extra_sampling_params` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_type_hints

from msgspec import UNSET, Meta, Struct, UnsetType, defstruct, structs

from flowroll.errors import InvalidRequestError
from flowroll.sampling.base import NOISE_LEVEL_MAX, NOISE_LEVEL_MIN
from flowroll.sampling.dynamics import DYNAMICS, noise_level_help
from flowroll.sampling.transition import LogProbForm
from flowroll.types import (
    ALIASES,
    MAX_LORA_NAME_CHARS,
    GeneratorDevice,
    ImageFormat,
    SamplingParams,
    SdeType,
    StepField,
    StepOptions,
)
from flowroll.types.forks import MAX_CHILDREN
from flowroll.wire import fields
from flowroll.wire.fields import Request, about
from flowroll.wire.messages import IMAGE_EXAMPLE, MASK_EXAMPLE, TENSOR_EXAMPLE, WireTensor
from flowroll.wire.names import EXTRA
from flowroll.wire.received import HOW_TO_SEND, received_tensor
from flowroll.wire.safetensors import BlobError
from flowroll.wire.validation import parse, parse_json_body, shown

__all__ = [
    "ExtraGenerateParams",
    "ExtraSamplingParams",
    "GenerateRequest",
    "ImageEditsRequest",
    "ImagesRequest",
    "RolloutRequest",
    "parse",
    "parse_json_body",
]

_Indices: TypeAlias = tuple[Annotated[int, Meta(ge=0)], ...]
_TokenIds: TypeAlias = Annotated[
    tuple[Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)], ...], Meta(min_length=1)
]
_TOKEN_IDS = about(
    [[49406, 736, 3240, 49407]], "send one list of ids for each of the model's tokenizers", "be null or a list of lists of ids"
)
# Bytes in msgpack and in forms, base64 in JSON; `SamplingParams` reads them, and says which one it cannot read.
_Images: TypeAlias = Annotated[
    tuple[Any, ...],
    Meta(min_length=1, extra_json_schema={"items": {"contentEncoding": "base64", "contentMediaType": "image/*"}}),
]
_IMAGES = about([IMAGE_EXAMPLE], "send base64 (JSON) or bytes (msgpack) of each file", "be null or a list of image files")
_Seeds: TypeAlias = Annotated[tuple[fields.SeedNumber, ...], Meta(min_length=1)]
_SeedOrSeeds: TypeAlias = fields.SeedNumber | _Seeds
_SEED_RULE = "be null, an integer from 0 to 4294967295, or a list of these"
_SentTensor: TypeAlias = WireTensor[memoryview]
_TENSOR, _MASK = (about(example, HOW_TO_SEND, "be null or a tensor") for example in (TENSOR_EXAMPLE, MASK_EXAMPLE))
_Step: TypeAlias = Annotated[int, Meta(ge=0)]
# The keys of a JSON object are text.
_Fork: TypeAlias = Annotated[
    dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Annotated[int, Meta(ge=2, le=MAX_CHILDREN)]], Meta(min_length=1)
]
_LoraName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_LORA_NAME_CHARS)]
_SIGMAS = Annotated[
    Annotated[tuple[Annotated[float, Meta(ge=0, le=1)], ...], Meta(min_length=2)] | None,
    about(
        [1.0, 0.75, 0.4, 0.0], "send one value per step and a final 0", "be null or a list of two or more numbers from 0 to 1"
    ),
]
_SDE_TYPE = about(
    "cps",
    "choose one of these",
    f"be one of {', '.join(DYNAMICS)}",
    "Dynamics of the stochastic steps. " + "; ".join(f'"{name}": {found.summary}' for name, found in DYNAMICS.items()) + ".",
)
_NOISE_LEVEL = about(
    0.7,
    "use 0 for a deterministic rollout",
    f"be 0, or a number from {NOISE_LEVEL_MIN} to {NOISE_LEVEL_MAX:g}",
    f"Noise level n: 0 (every step is an ODE step), or {noise_level_help()}.",
)
_PARAMS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


class _Described(Request, kw_only=True, frozen=True):
    # Fields are described where the parameters are.
    __doc__ = SamplingParams.__doc__


class _SamplingRequest(_Described, kw_only=True, frozen=True):
    # What becomes `SamplingParams`; errors about those get the wire's names.

    # What every request of the route has.
    _FIXED: ClassVar[Mapping[str, Any]] = {}

    def to_params(self) -> SamplingParams:
        """Returns the request as `SamplingParams`; what was not sent keeps its default.

        Raises:
            InvalidRequestError: Values that do not go together; named as the wire has them.
        """
        try:
            return SamplingParams(**self._params(), **self._FIXED)
        except InvalidRequestError as error:
            raise self.as_wire_error(error) from None

    def as_wire_error(self, error: InvalidRequestError) -> InvalidRequestError:
        """Returns the error about a field of `SamplingParams`, naming what this request calls it."""
        return error if error.field is None else error.renamed(self._wire_name(error.field))

    def _params(self) -> dict[str, Any]:
        raise NotImplementedError

    def _wire_name(self, param: str) -> str:
        raise NotImplementedError


class _GenerateFields(_SamplingRequest, kw_only=True, frozen=True):
    # Of a request with `extra_sampling_params`, which the requests themselves declare: its fields are made from these.
    prompt: fields.PromptOrNull = None
    negative_prompt: fields.NegativePrompt = None
    prompt_token_ids: Annotated[_TokenIds | None, _TOKEN_IDS] = None
    negative_prompt_token_ids: Annotated[_TokenIds | None, _TOKEN_IDS] = None
    prompt_embeds: Annotated[_SentTensor | None, _TENSOR] = None
    pooled_prompt_embeds: Annotated[_SentTensor | None, _TENSOR] = None
    prompt_embeds_mask: Annotated[_SentTensor | None, _MASK] = None
    negative_prompt_embeds: Annotated[_SentTensor | None, _TENSOR] = None
    negative_pooled_prompt_embeds: Annotated[_SentTensor | None, _TENSOR] = None
    negative_prompt_embeds_mask: Annotated[_SentTensor | None, _MASK] = None
    images: Annotated[_Images | None, _IMAGES] = None
    seed: fields.Seed = None
    seeds: Annotated[_Seeds | None, about([7, 11, 13], "send one seed per output")] = None
    init_seed: Annotated[_SeedOrSeeds | None, about(7, "send one seed, or one per output", _SEED_RULE)] = None
    latents: Annotated[_SentTensor | None, _TENSOR] = None
    start_step: Annotated[_Step | None, about(0, "count steps from 0")] = None
    generator_device: Annotated[GeneratorDevice, about("cpu", "leave it out for the engine's device")] = "cuda"
    width: Annotated[fields.Count | None, about(1024, "leave it out for the family's width")] = None
    height: Annotated[fields.Count | None, about(1024, "leave it out for the family's height")] = None
    num_inference_steps: fields.Steps = None
    num_outputs_per_prompt: Annotated[fields.Count | None, about(4, "leave it out for one output")] = None
    num_frames: Annotated[
        Annotated[int, Meta(ge=1, le=1)] | None, about(1, "leave it out, flowroll makes images", "be null or 1")
    ] = None
    fps: Annotated[float | None, about(24, "leave it out, an image has no use for it")] = None
    guidance_scale: fields.GuidanceScale = None
    guidance_scales: Annotated[
        Annotated[tuple[fields.Scale, ...], Meta(min_length=1)] | None,
        about([4.0, 4.0, 1.0], "send one scale a step"),
    ] = None
    true_cfg_scale: fields.GuidanceScale = None
    suppress_logs: fields.Flag = False
    request_id: fields.RequestId = None
    min_weight_version: Annotated[fields.VersionText | None, about("120", "leave it out for any version")] = None
    max_staleness: Annotated[_Step | None, about(1, "use 0 for the newest weights alone", "be null or an integer >= 0")] = None
    policy: Annotated[_LoraName | None, about("old", "leave it out for the weights as they are")] = None
    lora_name: Annotated[_LoraName | None, about("step-120", "leave it out for the model as it is")] = None

    def check(self, sent: Mapping[str, Any]) -> None:
        """Refuses a field that is given twice."""
        seen = {name for name, value in sent.items() if value is not None}
        for name, value in self._given_further().items():
            field = ALIASES.get(name, name)
            if field in seen:
                raise InvalidRequestError(
                    f"{EXTRA}.{name} must be given once, got {shown(value)} beside another {field}; remove one of the two.",
                    field=f"{EXTRA}.{name}",
                )
            seen.add(field)

    def _given_further(self) -> dict[str, Any]:
        """Returns what `extra_sampling_params` gives, by the names that were sent; null is the same as nothing."""
        further: Request | None = getattr(self, EXTRA)
        given = {} if further is None else structs.asdict(further)
        return {name: value for name, value in given.items() if value is not UNSET and value is not None}

    def _params(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in self.__struct_fields__ if name in _PARAMS}
        given |= {ALIASES.get(name, name): value for name, value in self._given_further().items()}
        if steps := given.get("rollout_steps"):
            given["rollout_steps"] = tuple(StepOptions(**structs.asdict(step)) for step in steps)
        for name, value in given.items():
            if isinstance(value, WireTensor):
                try:
                    given[name] = received_tensor(value)
                except BlobError as error:
                    raise InvalidRequestError(f"{name} must be a tensor, got {error}; {HOW_TO_SEND}.", field=name) from None
        if form := given.get("log_prob"):
            given["log_prob"] = LogProbForm(**structs.asdict(form))
        if not given.get("rollout", True):
            # The route's default asks for debug tensors, of which an evaluation has none.
            given.pop("rollout_debug_mode", None)
        return given

    def _wire_name(self, param: str) -> str:
        # One of several values has its place behind the name.
        name, bracket, place = param.partition("[")
        field = ALIASES.get(name, name)
        nested = next((name for name in self._given_further() if ALIASES.get(name, name) == field), None)
        return (field if nested is None else f"{EXTRA}.{nested}") + bracket + place


class Step(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one step is taken.

    Attributes:
        dynamics: Dynamics of the step. null: the request's.
        noise_level: Noise level of the step. null: the request's.
    """

    dynamics: SdeType | None = None
    noise_level: Annotated[float, Meta(ge=0, le=NOISE_LEVEL_MAX)] | None = None


class LogProb(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is counted as the log-prob of a step.

    Attributes:
        reduce: "mean" or "sum" over the elements of a sample's latents.
        constants: Whether -log std - log sqrt(2 pi) of each element counts.
        inverse_variance: Whether the squared error is divided by 2 std^2.
    """

    reduce: Literal["mean", "sum"] = "mean"
    constants: bool = True
    inverse_variance: bool = True


class _RolloutFields(_GenerateFields, kw_only=True, frozen=True):
    rollout: Annotated[bool, about(True, "leave it out for true")] = True
    sde_seed: Annotated[_SeedOrSeeds | None, about([7, 11, 13], "send one seed, or one per output", _SEED_RULE)] = None
    stop_step: Annotated[fields.Count | None, about(2, "leave it out to run to the end")] = None
    fork: Annotated[
        _Fork | None,
        about({"2": 4}, "send steps with their numbers of children", "be null or an object of steps and numbers of children"),
    ] = None
    rollout_sde_type: Annotated[SdeType, _SDE_TYPE] = "sde"
    rollout_noise_level: Annotated[Annotated[float, Meta(ge=0, le=NOISE_LEVEL_MAX)], _NOISE_LEVEL] = 0.7
    rollout_log_prob_no_const: fields.Flag = False
    log_prob: Annotated[
        LogProb | None,
        about(
            {"reduce": "mean", "constants": False},
            "send {} for the usual form",
            "be null or an object with reduce, constants and inverse_variance",
        ),
    ] = None
    rollout_debug_mode: Annotated[bool, about(False, "leave it out for true")] = True
    rollout_return_denoising_env: fields.Flag = False
    rollout_return_dit_trajectory: fields.Flag = False
    rollout_sde_step_indices: Annotated[_Indices | None, about([0, 1], "count steps from 0")] = None
    rollout_steps: Annotated[
        Annotated[tuple[Step, ...], Meta(min_length=1)] | None,
        about(
            [{"noise_level": 0.8}, {"dynamics": "ode"}],
            "send one object a step, {} where it follows the request",
            "be null or a list of objects with dynamics and noise_level",
        ),
    ] = None
    rollout_noise_levels: Annotated[
        Annotated[tuple[Annotated[float, Meta(ge=0, le=NOISE_LEVEL_MAX)], ...], Meta(min_length=1)] | None,
        about([0.8, 0.8, 0.4, 0.0], "send one noise level a step"),
    ] = None
    rollout_return_step_indices: Annotated[_Indices | None, about([0, 4], "count latents from 0")] = None
    return_fields: Annotated[
        Annotated[tuple[StepField, ...], Meta(min_length=1)] | None, about(["x0", "mean", "std"], "choose of these")
    ] = None
    decode_step_indices: Annotated[_Indices | None, about([0, 3], "count steps from 0")] = None
    image_format: Annotated[ImageFormat | None, about("uint8", "choose one of these")] = None


def _further(name: str, owner: type[Request], summary: str, short_names: Mapping[str, str]) -> type[Struct]:
    """Returns the type of a request's further parameters: any of its fields may be there, and none has a default of its own."""
    hints = get_type_hints(owner, include_extras=True)
    kinds = {field: hints[field] for field in owner.__struct_fields__ if field != "prompt"} | {"sigmas": _SIGMAS}
    kinds |= {short: hints[field] for short, field in short_names.items()}
    attributes = "".join(f"\n    {short}: The same as `{field}`." for short, field in short_names.items())
    return defstruct(
        name,
        [(field, _optional(kind), UNSET) for field, kind in kinds.items()],
        bases=(_Described,),
        namespace={"__doc__": f"{summary}\n\nAttributes:{attributes}"},
        module=__name__,
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


def _optional(kind: Any) -> Any:
    """Returns the type of a field that may be absent: what is said of it stays outside, its limits inside."""
    *limits, said = kind.__metadata__
    inner = kind.__origin__
    for limit in limits:
        inner = Annotated[inner, limit]
    return Annotated[inner | UnsetType, said]


# A type checker cannot see what is in them; nothing but the methods above looks.
if TYPE_CHECKING:
    ExtraGenerateParams: TypeAlias = Request
    ExtraSamplingParams: TypeAlias = Request
else:
    ExtraGenerateParams = _further("ExtraGenerateParams", _GenerateFields, "Further parameters of an image.", {})
    ExtraSamplingParams = _further(
        "ExtraSamplingParams", _RolloutFields, "Further parameters of a rollout, by either of their names.", ALIASES
    )

_FURTHER = about({"sigmas": [1.0, 0.5, 0.0]}, "send further sampling parameters by name")


class RolloutRequest(_RolloutFields, kw_only=True, frozen=True):
    """Body of POST /rollout/generate.

    Attributes:
        extra_sampling_params: Further fields, each with the rules of its namesake; each must be given once, here or there.
        image_path: Accepted for compatibility; must be null.
        rollout_video_dtype: Accepted for compatibility with SGLang's newest clients; it is about videos, and an image comes as
            `image_format` says.
    """

    EXAMPLES = (
        {
            "prompt": "a red fox in snow",
            "seed": 42,
            "num_outputs_per_prompt": 4,
            "num_inference_steps": 10,
            "rollout_sde_step_indices": [0, 1, 2],
            "rollout_return_denoising_env": True,
            "rollout_return_dit_trajectory": True,
        },
    )

    extra_sampling_params: Annotated[ExtraSamplingParams | None, _FURTHER] = None
    image_path: Annotated[None, about(None, "leave it out, and send the files themselves as images")] = None
    rollout_video_dtype: Annotated[
        Literal["uint8"] | None, about("uint8", "leave it out, flowroll makes images", 'be null or "uint8"')
    ] = None


class GenerateRequest(_GenerateFields, kw_only=True, frozen=True):
    """Body of POST /generate: plain text-to-image.

    Attributes:
        extra_sampling_params: Further fields, each with the rules of its namesake; each must be given once, here or there.
    """

    EXAMPLES = ({"prompt": "a red fox in snow", "seed": 42},)
    _FIXED: ClassVar[Mapping[str, Any]] = {"rollout": False}

    extra_sampling_params: Annotated[ExtraGenerateParams | None, _FURTHER] = None


_UNUSED = "leave it out"
_PNG = "leave it out, images are PNG"
_WHOLE = "leave it out, the answer comes whole"


class ImagesRequest(_SamplingRequest, kw_only=True, frozen=True):
    """Body of POST /v1/images/generations, as OpenAI's clients send it; the last four fields are flowroll's own.

    Attributes:
        model: Name of the served model. null: the one that is served.
        n: Number of images, up to the server's limit. null: 1.
        size: "WIDTHxHEIGHT" in pixels. "auto" or null: the family's own.
        response_format: How images are returned: as base64 PNG.
        user: Accepted for compatibility; has no effect.
        quality: Accepted where it changes nothing.
        style: Accepted where it changes nothing.
        background: Accepted where it changes nothing: images are opaque.
        output_format: Accepted where it changes nothing: images are PNG.
        output_compression: Accepted where it changes nothing: PNG is lossless.
        moderation: Accepted for compatibility; nothing is moderated.
        stream: Accepted where it changes nothing: the answer comes whole.
        partial_images: Accepted where it changes nothing: the answer comes whole.
    """

    EXAMPLES = ({"prompt": "a red fox in snow", "n": 1, "size": "1024x1024"},)
    _FIXED: ClassVar[Mapping[str, Any]] = {"rollout": False}
    _NAMES: ClassVar[Mapping[str, str]] = {"num_outputs_per_prompt": "n", "width": "size", "height": "size"}

    prompt: fields.Prompt
    model: Annotated[str | None, about("Qwen-Image", "leave it out for the served model")] = None
    n: Annotated[fields.Count | None, about(2, "leave it out for one image")] = None
    size: Annotated[
        # Python's `$` is before a last newline too.
        Annotated[str, Meta(pattern=r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$(?!\n)")] | None,
        about("1024x768", 'send for example "1024x768"', 'be null, "auto" or "WIDTHxHEIGHT"'),
    ] = None
    response_format: Annotated[
        Literal["b64_json"] | None, about("b64_json", "read the image from b64_json, there are no URLs")
    ] = None
    user: Annotated[str | None, about("trainer-3", _UNUSED)] = None
    quality: Annotated[Literal["auto", "standard"] | None, about("auto", "choose num_inference_steps instead")] = None
    style: Annotated[None, about(None, "describe the style in the prompt")] = None
    background: Annotated[Literal["auto", "opaque"] | None, about("opaque", "leave it out, images are opaque")] = None
    output_format: Annotated[Literal["png"] | None, about("png", _PNG)] = None
    output_compression: Annotated[Literal[100] | None, about(100, "leave it out, PNG is lossless")] = None
    moderation: Annotated[Literal["auto", "low"] | None, about("auto", _UNUSED)] = None
    stream: Annotated[Literal[False] | None, about(False, _WHOLE)] = None
    partial_images: Annotated[Literal[0] | None, about(0, _WHOLE)] = None
    seed: fields.Seed = None
    negative_prompt: fields.NegativePrompt = None
    num_inference_steps: fields.Steps = None
    guidance_scale: fields.GuidanceScale = None

    def _params(self) -> dict[str, Any]:
        params = {name: getattr(self, name) for name in self.__struct_fields__ if name in _PARAMS}
        params["num_outputs_per_prompt"] = self.n
        if self.size is not None and self.size != "auto":
            params["width"], params["height"] = map(int, self.size.split("x"))
        return params

    def _wire_name(self, param: str) -> str:
        return self._NAMES.get(param, param)


class ImageEditsRequest(ImagesRequest, kw_only=True, frozen=True):
    """Body of POST /v1/images/edits, a form (multipart/form-data) as OpenAI's clients send it.

    Attributes:
        image: The pictures to edit: PNG, JPEG or WebP files, each a part named image or image[].
        mask: Accepted for compatibility; must be left out: the whole picture is edited.
        input_fidelity: Accepted where it changes nothing.
        safety_identifier: Accepted for compatibility; has no effect.
    """

    EXAMPLES = ({"image": [IMAGE_EXAMPLE], "prompt": "make it a red fox in snow", "n": 1},)
    _NAMES: ClassVar[Mapping[str, str]] = {**ImagesRequest._NAMES, "images": "image"}

    image: Annotated[_Images, about([IMAGE_EXAMPLE], "send each as a part of its own", "be one or more image files")]
    mask: Annotated[None, about(None, "leave it out, the whole picture is edited")] = None
    input_fidelity: Annotated[Literal["low"] | None, about("low", _UNUSED)] = None
    safety_identifier: Annotated[str | None, about("trainer-3", _UNUSED)] = None

    def _params(self) -> dict[str, Any]:
        return {**super()._params(), "images": self.image}

    def _wire_name(self, param: str) -> str:
        name, bracket, place = param.partition("[")
        return super()._wire_name(name) + bracket + place
