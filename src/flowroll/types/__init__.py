"""The data that flows through flowroll: one frozen type per arrow.

`SamplingParams` is what a caller asks for, `Rollout` is what comes back. Both are plain data: the HTTP names live in `wire/`,
the model's rules in `families/`, and what depends on a loaded checkpoint (sizes, limits) is checked by the engine. Nothing here
imports a model library.
"""

from flowroll.types.adapters import (
    MAX_LORA_NAME_CHARS,
    AdapterChange,
    AdapterRecord,
    LoraAdapter,
    adapter_config_text,
    check_lora_name,
)
from flowroll.types.arguments import ImageFields, RolloutFields, params_of
from flowroll.types.digest import branch_digest, env_digests
from flowroll.types.forks import Branch
from flowroll.types.groups import RolloutStack
from flowroll.types.images import ReferenceImage
from flowroll.types.layout import Gather, Layout, ParallelPlan, Region, Split
from flowroll.types.params import (
    ALIASES,
    MAX_GUIDANCE_SCALE,
    MAX_PROMPT_CHARS,
    MAX_REQUEST_ID_CHARS,
    MIN_SIGMA_GAP,
    ROLLOUT_FIELDS,
    GeneratorDevice,
    ImageFormat,
    Number,
    SamplingParams,
    SdeType,
    StepField,
    StepOptions,
    by_field_name,
)
from flowroll.types.policies import DEFAULT_POLICY, Policy, PolicyChange, PolicyKind, PolicyRecord
from flowroll.types.provenance import Exactness, Provenance, StepStamp
from flowroll.types.results import (
    SCHEMA_VERSION,
    DebugTensors,
    DenoisingEnv,
    EnvValue,
    GeneratedImage,
    Rollout,
    SamplingRecord,
    StepImages,
    StepTensors,
    Trajectory,
    is_readable_version,
)
from flowroll.types.scoring import RecordedSteps, SampleScores, ScoreAnswer, ScoreParams
from flowroll.types.starts import MAX_SEED
from flowroll.types.tensors import all_finite
from flowroll.types.weights import MAX_VERSION_CHARS, MemoryChange, ModuleName, WeightUpdate, check_version, version_number

__all__ = [
    "ALIASES",
    "DEFAULT_POLICY",
    "MAX_GUIDANCE_SCALE",
    "MAX_LORA_NAME_CHARS",
    "MAX_PROMPT_CHARS",
    "MAX_REQUEST_ID_CHARS",
    "MAX_SEED",
    "MAX_VERSION_CHARS",
    "MIN_SIGMA_GAP",
    "ROLLOUT_FIELDS",
    "SCHEMA_VERSION",
    "AdapterChange",
    "AdapterRecord",
    "Branch",
    "DebugTensors",
    "DenoisingEnv",
    "EnvValue",
    "Exactness",
    "Gather",
    "GeneratedImage",
    "GeneratorDevice",
    "ImageFields",
    "ImageFormat",
    "Layout",
    "LoraAdapter",
    "MemoryChange",
    "ModuleName",
    "Number",
    "ParallelPlan",
    "Policy",
    "PolicyChange",
    "PolicyKind",
    "PolicyRecord",
    "Provenance",
    "RecordedSteps",
    "ReferenceImage",
    "Region",
    "Rollout",
    "RolloutFields",
    "RolloutStack",
    "SampleScores",
    "SamplingParams",
    "SamplingRecord",
    "ScoreAnswer",
    "ScoreParams",
    "SdeType",
    "Split",
    "StepField",
    "StepImages",
    "StepOptions",
    "StepStamp",
    "StepTensors",
    "Trajectory",
    "WeightUpdate",
    "adapter_config_text",
    "all_finite",
    "branch_digest",
    "by_field_name",
    "check_lora_name",
    "check_version",
    "env_digests",
    "is_readable_version",
    "params_of",
    "version_number",
]
