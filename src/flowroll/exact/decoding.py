"""Decodes several samples with a VAE in one call, each with the bits that it has alone; it knows no pipeline and no family."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.exact.layout import MemoryLayout, address, joined
from flowroll.exact.sharing import SharedForwards
from flowroll.families import ForwardInput, Output, Transformer


class SharedDecoding:
    """Runs a VAE once for several samples: the forward of a transformer whose only argument is a sample.

    Args:
        decode: Decodes a batch, as the method `decode` of a diffusers VAE does.
        weights: Returns the weights, which may be exchanged: what was found holds for where they lie.
        is_exact: Whether each sample keeps the bits that it has alone; otherwise they are an ordinary batch.
    """

    def __init__(self, decode: Callable[..., Any], weights: Callable[[], Iterable[Tensor]], *, is_exact: bool = True) -> None:
        self._decode, self._weights, self._batches, self._is_exact = decode, weights, _Batches(), is_exact
        self._shared = SharedForwards(self._batches)

    def decode(self, cells: Sequence[Float[Tensor, " 1 *cells"]]) -> list[Float[Tensor, " 1 colors *size"]]:
        """Returns what the VAE makes of each sample; all have one shape and dtype."""
        inputs = [{"z": one} for one in cells]
        if not self._is_exact:
            batch = self(**self._batches.collate(inputs), return_dict=False)[0]
            return cast("list[Tensor]", self._batches.uncollate(batch, len(cells)))
        self._batches.addresses = tuple(map(address, self._weights()))
        return cast("list[Tensor]", self._shared.outputs(self, inputs))

    def __call__(self, z: Tensor, *, return_dict: bool) -> Any:
        """Decodes a batch."""
        return self._decode(z, return_dict=return_dict)


class _Batches:
    """The collation of the only argument of a VAE; see `Collation`.

    Attributes:
        addresses: Where the weights lie, modulo the alignment of allocations.
    """

    addresses: tuple[int, ...] = ()

    def collate_key(self, forward_input: ForwardInput) -> Hashable:
        z: Tensor = forward_input["z"]
        return tuple(z.shape), z.stride(), z.dtype, self.addresses

    def run_in_turn(self, transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
        return [transformer(**one, return_dict=False)[0] for one in forward_inputs]

    def collate(self, forward_inputs: Sequence[ForwardInput]) -> ForwardInput:
        parts: list[Tensor] = [one["z"] for one in forward_inputs]
        return {"z": joined(parts, MemoryLayout.of(parts[0]))}

    def uncollate(self, output: Output, num_inputs: int) -> list[Output]:
        assert isinstance(output, Tensor)
        return list(torch.split(output, len(output) // num_inputs))

    def num_text_rows(self, forward_input: ForwardInput) -> int:
        return 0

    def pad_text(self, forward_input: ForwardInput, num_rows: int) -> ForwardInput:
        raise AssertionError("a VAE has no text")
