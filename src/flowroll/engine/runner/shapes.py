"""The tensors of a message from rank 0 without their data, which follows by broadcast."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from flowroll.types import DenoisingEnv
from flowroll.types.results import replace_tensors


class TensorShape(msgspec.Struct, frozen=True):
    """The shape and dtype of a tensor whose data follows by broadcast."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """Describes a tensor without its data."""
        return cls(shape=tuple(tensor.shape), dtype=str(tensor.dtype))

    def empty(self, device: torch.device) -> Tensor:
        """Allocates memory for the tensor."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype.removeprefix("torch.")), device=device)


class EnvShape(msgspec.Struct, frozen=True):
    """A denoising environment with a `TensorShape` in place of each tensor.

    No value of an environment is itself a JSON object, so in the decoded JSON every object is a `TensorShape`.
    """

    image_kwargs: dict[str, Any]
    pos_cond_kwargs: dict[str, Any]
    neg_cond_kwargs: dict[str, Any] | None
    guidance: TensorShape | None

    @classmethod
    def of(cls, env: DenoisingEnv) -> EnvShape:
        """Describes an environment without the data of its tensors."""
        return cls(**replace_tensors({name: getattr(env, name) for name in cls.__struct_fields__}, TensorShape.of))

    def empty(self, device: torch.device) -> DenoisingEnv:
        """Allocates memory for the tensors of the environment."""

        def value(described: Any) -> Any:
            if isinstance(described, dict):
                return msgspec.convert(described, TensorShape).empty(device)
            return [value(item) for item in described] if isinstance(described, list) else described

        def branch(values: dict[str, Any] | None) -> Any:
            return None if values is None else {key: value(described) for key, described in values.items()}

        return DenoisingEnv(
            image_kwargs=branch(self.image_kwargs),
            pos_cond_kwargs=branch(self.pos_cond_kwargs),
            neg_cond_kwargs=branch(self.neg_cond_kwargs),
            guidance=None if self.guidance is None else self.guidance.empty(device),
        )
