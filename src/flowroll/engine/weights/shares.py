"""Receives new weights that rank 0 broadcasts: each rank keeps its part beside the old weights until the commit."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from flowroll.engine.runner.shapes import TensorShape
from flowroll.engine.weights.host import PinnedMemory
from flowroll.engine.weights.staged import Slot, StagedWeights, is_overwritten
from flowroll.parallel.mesh import Mesh


def as_bytes(tensor: Tensor) -> Tensor:
    """Views a contiguous tensor as bytes, because every transport takes bytes, but not every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


class Shares:
    """Memory for a rank's part of new weights that rank 0 will broadcast.

    Args:
        tensors: The shapes and dtypes of the whole tensors, by name, in the order in which they are broadcast.
        slots: The slots of the transformer in memory, by name.
    """

    def __init__(self, tensors: Mapping[str, TensorShape], slots: Mapping[str, Slot]) -> None:
        # The memory is allocated here, before any rank waits for another.
        memory = PinnedMemory()
        self._parts = [(slots[name], _room(slots[name].live, memory), shape) for name, shape in tensors.items()]

    def fill(self, mesh: Mesh) -> StagedWeights:
        """Receives the tensors from rank 0, and keeps this rank's rows of those that are sharded."""
        started_s = time.perf_counter()
        for slot, part, shape in self._parts:
            # A broadcast needs memory of the device.
            is_kept = not slot.is_sharded and part.device == slot.live.device
            whole = part if is_kept else shape.empty(slot.live.device)
            mesh.broadcast(as_bytes(whole))
            if not is_kept:
                part.copy_(slot.own_rows(whole))
        pairs = [(slot.live, part) for slot, part, _ in self._parts]
        return StagedWeights("transformer", {}, pairs, time.perf_counter() - started_s)


def _room(live: Tensor, memory: PinnedMemory) -> Tensor:
    return memory.empty(live.shape, live.dtype) if is_overwritten(live) else torch.empty_like(live.data)
