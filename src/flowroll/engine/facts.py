"""The facts about a loaded model without its weights, which are enough to check and plan requests in any process."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from flowroll.families import Defaults, Family, ModelSpec
from flowroll.sampling.schedule import ScheduleConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What a pipeline demands of the token ids that stand for those of one of its tokenizers.

    Attributes:
        name: The pipeline's component, e.g. "tokenizer_2".
        max_tokens: The number of tokens at which the pipeline has a text cut.
        num_ids: The number of ids that the text encoder knows, from 0 up.
        template: The ids in front of every prompt, whose embeddings the pipeline leaves out.
    """

    name: str
    max_tokens: int
    num_ids: int
    template: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A loaded model without its weights.

    Attributes:
        family: The conventions of its family.
        variant: The variant of the family that it is taken for.
        spec: The facts that shape its latents.
        schedule_config: The configuration of its sigma grid.
        device: The device of its modules.
        dtype: The dtype of its weights.
        tokenizers: The tokenizers that make ids of a prompt; empty where a prompt cannot be given as token ids.
    """

    family: Family
    variant: str
    spec: ModelSpec
    schedule_config: ScheduleConfig
    device: torch.device
    dtype: torch.dtype
    tokenizers: tuple[TokenizerFacts, ...] = ()

    @property
    def defaults(self) -> Defaults:
        """The values of what a request leaves open: the variant's, with the number of steps of the checkpoint's own grid."""
        known, own = self.family.variants[self.variant], self.spec.sample_sigmas
        return known if own is None else replace(known, num_inference_steps=len(own))

    @property
    def facts(self) -> ModelFacts:
        """A `ModelFacts` with only these fields, also if this object is of a subclass with more."""
        return ModelFacts(**{field.name: getattr(self, field.name) for field in fields(ModelFacts)})
