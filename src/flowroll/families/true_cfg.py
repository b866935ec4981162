"""What the families have in common whose pipelines guide by two forwards, in the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from flowroll.families.base import Family, StepInput
from flowroll.families.conditioning import Output
from flowroll.families.guidance import fits_positive, guide
from flowroll.types import Number


class TrueCfgFamily(Family):
    """A family with classifier-free guidance neg + scale (pos - neg) above a scale of 1, and timesteps from 0 to 1.

    The conditional branch is the first forward, and the unconditional one the second.
    """

    guidance_rule: ClassVar[str] = "true_cfg"
    guided_above: ClassVar[Number] = 1

    @override
    def model_timesteps(self, timesteps: Float[Tensor, " steps"], dtype: torch.dtype) -> Float[Tensor, " steps"]:
        return timesteps.to(dtype) / 1000

    @override
    def apply_guidance(self, outputs: Sequence[Output], one: StepInput) -> Float[Tensor, " *latent"]:
        positive, *rest = cast("Sequence[Tensor]", outputs)
        return guide(rest[0][0], positive[0], one.guidance.scale) if rest else positive[0]

    @override
    def fits_conditional(self, outputs: Sequence[Output], velocity: Float[Tensor, " *latent"], one: StepInput) -> bool:
        return fits_positive(cast(Tensor, outputs[0])[0], velocity, one.guidance.scale)
