"""Every field of a request: its type, limits, description and examples, and what to say where a value breaks the rule.

Owns what can be said of one value alone. Rules between fields are `SamplingParams`'s, those of a checkpoint the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import Field

from flowroll.sampling.base import NOISE_LEVEL_MAX, NOISE_LEVEL_MIN
from flowroll.sampling.dynamics import DYNAMICS, noise_level_help
from flowroll.types import (
    MAX_GUIDANCE_SCALE,
    MAX_LORA_NAME_CHARS,
    MAX_PROMPT_CHARS,
    MAX_REQUEST_ID_CHARS,
    MAX_SEED,
    MAX_VERSION_CHARS,
    GeneratorDevice,
    SdeType,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The middle and the end of an error message: `<field> must <text>, got <value>; <remedy>`."""

    text: str
    remedy: str


_ItemT = TypeVar("_ItemT")
# The first wrong item is the only error: a list of a million would make, and keep, a million of them.
Items: TypeAlias = Annotated[list[_ItemT], Field(fail_fast=True)]
_SeedInt: TypeAlias = Annotated[int, Field(ge=0, le=MAX_SEED)]
_StepIndex: TypeAlias = Annotated[int, Field(ge=0)]

Prompt: TypeAlias = Annotated[
    str,
    Field(max_length=MAX_PROMPT_CHARS, description="The text of one prompt; may be empty.", examples=["a red fox in snow"]),
    Rule(text=f"be a string of at most {MAX_PROMPT_CHARS} characters", remedy="send one prompt as text"),
]
NegativePrompt: TypeAlias = Annotated[
    str | None,
    Field(
        max_length=MAX_PROMPT_CHARS,
        description='Text of the unconditional branch. null: the family\'s own (Qwen-Image " ", Z-Image "").',
        examples=["blurry, low quality"],
    ),
    Rule(text=f"be null or a string of at most {MAX_PROMPT_CHARS} characters", remedy="leave it out for the family's own"),
]
Seed: TypeAlias = Annotated[
    int | None,
    Field(
        ge=0,
        le=MAX_SEED,
        description="Seed of the first output; output i uses seed + i. null: drawn by the server and echoed.",
        examples=[42],
    ),
    Rule(text=f"be null or an integer from 0 to {MAX_SEED}", remedy="leave it out for a drawn seed"),
]
Seeds: TypeAlias = Annotated[
    Items[_SeedInt] | None,
    Field(min_length=1, description="One seed per output, instead of `seed`.", examples=[[7, 11, 13]]),
    Rule(text=f"be null or a list of integers from 0 to {MAX_SEED}", remedy="send one seed per output"),
]
Device: TypeAlias = Annotated[
    GeneratorDevice,
    Field(
        description='Where noise is drawn. "cuda": on the engine\'s own device, whatever it is; "cpu": on the CPU.',
        examples=["cpu"],
    ),
    Rule(text='be "cuda" or "cpu"', remedy="leave it out for the engine's device"),
]
Width: TypeAlias = Annotated[
    int | None,
    Field(
        ge=1,
        description="Width in pixels, a multiple of the family's pixel unit, within the server's limit. null: the family's.",
        examples=[1024],
    ),
    Rule(text="be null or an integer >= 1", remedy="leave it out for the family's width"),
]
Height: TypeAlias = Annotated[
    int | None,
    Field(
        ge=1,
        description="Height in pixels, a multiple of the family's pixel unit, within the server's limit. null: the family's.",
        examples=[1024],
    ),
    Rule(text="be null or an integer >= 1", remedy="leave it out for the family's height"),
]
Steps: TypeAlias = Annotated[
    int | None,
    Field(ge=1, description="Number of denoising steps T, up to the server's limit. null: the family's.", examples=[20]),
    Rule(text="be null or an integer >= 1", remedy="leave it out for the family's number"),
]
Outputs: TypeAlias = Annotated[
    int | None,
    Field(
        ge=1,
        description="Number of outputs, up to the server's limit. null: 1, or the number of `seeds`.",
        examples=[4],
    ),
    Rule(text="be null or an integer >= 1", remedy="leave it out for one output"),
]
GuidanceScale: TypeAlias = Annotated[
    float | None,
    Field(
        ge=0,
        le=MAX_GUIDANCE_SCALE,
        description="Guidance scale, used where `true_cfg_scale` is null. null: the family's. Guidance runs above 1 "
        "(Qwen-Image) or above 0 (Z-Image).",
        examples=[4.0],
    ),
    Rule(text=f"be null or a number from 0 to {MAX_GUIDANCE_SCALE:g}", remedy="use 0 for no guidance"),
]
TrueCfgScale: TypeAlias = Annotated[
    float | None,
    Field(ge=0, le=MAX_GUIDANCE_SCALE, description="Guidance scale; wins over `guidance_scale`.", examples=[4.0]),
    Rule(text=f"be null or a number from 0 to {MAX_GUIDANCE_SCALE:g}", remedy="use 0 for no guidance"),
]
SuppressLogs: TypeAlias = Annotated[
    bool,
    Field(description="Do not log this request.", examples=[True]),
    Rule(text="be true or false", remedy="leave it out for false"),
]
RequestId: TypeAlias = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_REQUEST_ID_CHARS,
        description="Echoed in the answer. null: the server makes one.",
        examples=["step-120-prompt-7"],
    ),
    Rule(text=f"be null or a string of 1 to {MAX_REQUEST_ID_CHARS} characters", remedy="leave it out for a generated one"),
]
MinWeightVersion: TypeAlias = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_VERSION_CHARS,
        description="Refuse weights that are older than this version (409). Two numbers compare as numbers; otherwise every "
        "version that this server has had so far counts as no newer than the current one.",
        examples=["120"],
    ),
    Rule(text=f"be null or a string of 1 to {MAX_VERSION_CHARS} characters", remedy="leave it out for any version"),
]
LoraName: TypeAlias = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_LORA_NAME_CHARS,
        description="The loaded adapter to run with; see /lora_adapters. null: the model as it is.",
        examples=["step-120"],
    ),
    Rule(text=f"be null or a string of 1 to {MAX_LORA_NAME_CHARS} characters", remedy="leave it out for the model as it is"),
]
Sigmas: TypeAlias = Annotated[
    Items[Annotated[float, Field(ge=0, le=1)]] | None,
    Field(
        min_length=2,
        description="T + 1 noise levels used verbatim: strictly decreasing from at most 1, then a final 0. null: the "
        "checkpoint's own schedule.",
        examples=[[1.0, 0.75, 0.4, 0.0]],
    ),
    Rule(text="be null or a list of two or more numbers from 0 to 1", remedy="send one value per step and a final 0"),
]
RolloutFlag: TypeAlias = Annotated[
    bool,
    Field(description="false: an evaluation, the image alone.", examples=[True]),
    Rule(text="be true or false", remedy="leave it out for true"),
]
SdeTypeName: TypeAlias = Annotated[
    SdeType,
    Field(
        description="Dynamics of the stochastic steps. "
        + "; ".join(f'"{name}": {found.summary}' for name, found in DYNAMICS.items())
        + ".",
        examples=["cps"],
    ),
    Rule(text=f"be one of {', '.join(DYNAMICS)}", remedy="choose one of these"),
]
NoiseLevel: TypeAlias = Annotated[
    float,
    Field(
        ge=0,
        le=NOISE_LEVEL_MAX,
        description=f"Noise level n: 0 (every step is an ODE step), or {noise_level_help()}.",
        examples=[0.7],
    ),
    Rule(text=f"be 0, or a number from {NOISE_LEVEL_MIN} to {NOISE_LEVEL_MAX:g}", remedy="use 0 for a deterministic rollout"),
]
LogProbNoConst: TypeAlias = Annotated[
    bool,
    Field(description="Log-probs are minus the mean of (next - mean)^2, without scale and constants.", examples=[False]),
    Rule(text="be true or false", remedy="leave it out for false"),
]
DebugMode: TypeAlias = Annotated[
    bool,
    Field(description="Return the per-step debug tensors.", examples=[False]),
    Rule(text="be true or false", remedy="leave it out for true"),
]
ReturnEnv: TypeAlias = Annotated[
    bool,
    Field(description="Return every argument that the transformer was called with.", examples=[True]),
    Rule(text="be true or false", remedy="leave it out for false"),
]
ReturnTrajectory: TypeAlias = Annotated[
    bool,
    Field(description="Return latents, timesteps and sigmas.", examples=[True]),
    Rule(text="be true or false", remedy="leave it out for false"),
]
SdeSteps: TypeAlias = Annotated[
    Items[_StepIndex] | None,
    Field(
        description="The steps (0..T-1, each once) that follow `rollout_sde_type`; the others are ODE steps. null: all.",
        examples=[[0, 1]],
    ),
    Rule(text="be null or a list of integers >= 0", remedy="count steps from 0"),
]
ReturnSteps: TypeAlias = Annotated[
    Items[_StepIndex] | None,
    Field(description="Which of the T+1 latents (0..T, each once) to return. null: all.", examples=[[0, 4]]),
    Rule(text="be null or a list of integers >= 0", remedy="count latents from 0"),
]
Frames: TypeAlias = Annotated[
    int | None,
    Field(ge=1, le=1, description="null or 1: an image.", examples=[1]),
    Rule(text="be null or 1", remedy="leave it out, flowroll makes images"),
]
FramesPerSecond: TypeAlias = Annotated[
    float | None,
    Field(description="Accepted for compatibility; an image has no use for it.", examples=[24]),
    Rule(text="be null or a number", remedy="leave it out, an image has no use for it"),
]
ImagePath: TypeAlias = Annotated[
    None,
    Field(description="Accepted for compatibility; must be null.", examples=[None]),
    Rule(text="be null", remedy="leave it out, flowroll makes images from text alone"),
]
# OpenAI's parameters of an image request.
Model: TypeAlias = Annotated[
    str | None,
    Field(description="Name of the served model. null: the one that is served.", examples=["Qwen-Image"]),
    Rule(text="be null or a string", remedy="leave it out for the served model"),
]
ImageCount: TypeAlias = Annotated[
    int | None,
    Field(ge=1, description="Number of images, up to the server's limit. null: 1.", examples=[2]),
    Rule(text="be null or an integer >= 1", remedy="leave it out for one image"),
]
ImageSize: TypeAlias = Annotated[
    str | None,
    Field(
        pattern=r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$",
        description='"WIDTHxHEIGHT" in pixels. "auto" or null: the family\'s own.',
        examples=["1024x768", "auto"],
    ),
    Rule(text='be null, "auto" or "WIDTHxHEIGHT"', remedy='send for example "1024x768"'),
]
ResponseFormat: TypeAlias = Annotated[
    Literal["b64_json"] | None,
    Field(description="How images are returned: as base64 PNG.", examples=["b64_json"]),
    Rule(text='be null or "b64_json"', remedy="read the image from b64_json, there are no URLs"),
]
User: TypeAlias = Annotated[
    str | None,
    Field(description="Accepted for compatibility; has no effect.", examples=["trainer-3"]),
    Rule(text="be null or a string", remedy="leave it out"),
]
Quality: TypeAlias = Annotated[
    Literal["auto", "standard"] | None,
    Field(description="Accepted where it changes nothing.", examples=["auto"]),
    Rule(text='be null, "auto" or "standard"', remedy="choose num_inference_steps instead"),
]
Style: TypeAlias = Annotated[
    None,
    Field(description="Accepted where it changes nothing.", examples=[None]),
    Rule(text="be null", remedy="describe the style in the prompt"),
]
Background: TypeAlias = Annotated[
    Literal["auto", "opaque"] | None,
    Field(description="Accepted where it changes nothing: images are opaque.", examples=["opaque"]),
    Rule(text='be null, "auto" or "opaque"', remedy="leave it out, images are opaque"),
]
OutputFormat: TypeAlias = Annotated[
    Literal["png"] | None,
    Field(description="Accepted where it changes nothing: images are PNG.", examples=["png"]),
    Rule(text='be null or "png"', remedy="leave it out, images are PNG"),
]
OutputCompression: TypeAlias = Annotated[
    Literal[100] | None,
    Field(description="Accepted where it changes nothing: PNG is lossless.", examples=[100]),
    Rule(text="be null or 100", remedy="leave it out, PNG is lossless"),
]
Moderation: TypeAlias = Annotated[
    Literal["auto", "low"] | None,
    Field(description="Accepted for compatibility; nothing is moderated.", examples=["auto"]),
    Rule(text='be null, "auto" or "low"', remedy="leave it out"),
]
Stream: TypeAlias = Annotated[
    Literal[False] | None,
    Field(description="Accepted where it changes nothing: the answer comes whole.", examples=[False]),
    Rule(text="be null or false", remedy="leave it out, the answer comes whole"),
]
PartialImages: TypeAlias = Annotated[
    Literal[0] | None,
    Field(description="Accepted where it changes nothing: the answer comes whole.", examples=[0]),
    Rule(text="be null or 0", remedy="leave it out, the answer comes whole"),
]
