"""Receives new weights tensor by tensor, from HTTP, shared memory or a process group, beside the old ones.

On a CPU, a tensor that has arrived is already where it will stay: each has its own allocation, because float32 bits depend on
the alignment of the data (families/alignment.py).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from flowroll.engine.weights.host import PinnedMemory
from flowroll.engine.weights.staged import (
    Slot,
    StagedWeights,
    check_tensor,
    is_overwritten,
    listed,
    rejected,
    tensor_head,
)
from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.types import ModuleName
from flowroll.wire.safetensors import DTYPES, TensorHead

_CPU = torch.device("cpu")
_SUBJECT = "the new weights"


class WeightReceiver:
    """Collects the new weights of one module. Several threads may use it at the same time.

    A bucket is checked by the names, shapes and dtypes of its tensors before its data arrives. A bucket that is refused or
    breaks off has no effect: its tensors may be sent again. Every tensor is accepted once, so the arrived tensors take at most
    the module's bytes, and buckets on their way at most eight bytes per element.

    Args:
        module: The name of the module that the weights are for.
        slots: The slots of the module in memory, by name. The module is read, not changed, and may run meanwhile.
        partial: Whether tensors that do not arrive keep their values; otherwise a missing tensor is an error.
    """

    def __init__(self, module: ModuleName, slots: Mapping[str, Slot], *, partial: bool = False) -> None:
        self.module, self.partial = module, partial
        self._slots = slots
        self._lock = threading.Lock()
        self._is_open = True
        # Names of tensors that are on their way or have arrived; then the arrived tensors, whole, in the weights' dtype.
        self._claimed: set[str] = set()
        self._arrived: dict[str, Tensor] = {}
        self._memory = PinnedMemory()
        self._started_s = time.perf_counter()

    @property
    def names(self) -> frozenset[str]:
        """The names of the module's tensors."""
        return frozenset(self._slots)

    @property
    def num_tensors(self) -> int:
        """The number of the module's tensors."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the module's tensors, in the dtype of the weights."""
        return sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in self._slots.values())

    @property
    def num_arrived(self) -> int:
        """The number of tensors that have arrived."""
        return len(self._arrived)

    @property
    def is_open(self) -> bool:
        """Whether the update was neither staged nor dropped, so that it still takes tensors."""
        return self._is_open

    @contextlib.contextmanager
    def bucket(self, heads: Sequence[TensorHead], *, device: torch.device = _CPU) -> Iterator[list[Tensor]]:
        """Yields memory for the tensors of a bucket, in their order, for the block to fill. If the block fails, it is dropped.

        Args:
            heads: The names, dtypes and shapes of its tensors.
            device: The device on which their data will arrive.

        Raises:
            WeightsRejectedError: A name is unknown, came already or comes twice, a shape differs, a dtype is no float, or
                there is not enough memory; or, after the block, the update has ended, or a tensor holds NaN or infinity.
        """
        self.claim(heads)
        with self._filling(heads, device) as targets:
            yield targets

    def put(self, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Copies a bucket of ordinary tensors; see `types.tensors.plain_tensor`.

        Raises:
            WeightsRejectedError: As for `bucket`.
        """
        with self.bucket([tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in named_tensors]) as targets:
            for target, (_, tensor) in zip(targets, named_tensors, strict=True):
                target.copy_(tensor.detach())

    def claim(self, heads: Sequence[TensorHead]) -> None:
        """Checks what a bucket will hold before its data arrives. The caller must call `put_claimed` or `unclaim` afterwards.

        Raises:
            WeightsRejectedError: A name is unknown, came already or comes twice, a shape differs, or a dtype is no float.
        """
        try:
            self._claim(heads)
        except CheckpointError as error:
            raise rejected(error, None) from error

    def put_claimed(self, heads: Sequence[TensorHead], tensors: Sequence[Tensor]) -> None:
        """Copies the tensors of a claimed bucket. The errors are those of `bucket`."""
        with self._filling(heads, _CPU) as targets:
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)

    def arrived(self, names: Sequence[str]) -> list[Tensor]:
        """Returns tensors that have arrived, in the dtype of the weights."""
        with self._lock:
            self._check_open()
            return [self._arrived[name] for name in names]

    def unclaim(self, heads: Sequence[TensorHead]) -> None:
        """Drops the claim of a bucket, so that its tensors may come in another bucket."""
        with self._lock:
            self._claimed -= {head.name for head in heads}

    def stage(self) -> StagedWeights:
        """Returns the arrived weights, ready to be committed. No more tensors are accepted afterwards.

        Raises:
            WeightsRejectedError: A tensor is missing, or the engine sleeps. In both cases the update stays open.
        """
        with self._lock:
            self._check_open()
            if any(math.prod(slot.shape) and not slot.live.numel() for slot in self._slots.values()):
                raise WeightsRejectedError(
                    f"{_SUBJECT} must be made ready while the engine is awake, got released memory; wake it and ask again."
                )
            missing = set(self._slots) - set(self._arrived)
            if not self._arrived or (missing and not self.partial):
                raise WeightsRejectedError(
                    f"{_SUBJECT} must be all of the {self.module}'s, got none for {listed(missing)}; send the rest, or begin a "
                    "partial update."
                )
            self._is_open = False
            arrived, self._arrived = self._arrived, {}
        try:
            pairs = [(self._slots[name].live, self._own_part(name, tensor)) for name, tensor in arrived.items()]
        except (MemoryError, RuntimeError, IndexError) as error:  # IndexError: the engine fell asleep meanwhile
            raise rejected(error, None) from error
        return StagedWeights(self.module, arrived, pairs, time.perf_counter() - self._started_s)

    def drop(self) -> None:
        """Drops the arrived tensors; no more are accepted. May be called twice."""
        with self._lock:
            self._is_open = False
            self._arrived = {}

    def _own_part(self, name: str, tensor: Tensor) -> Tensor:
        slot = self._slots[name]
        rows = slot.own_rows(tensor)
        # Rows of a sharded tensor that take the old ones' place are copied: a view would keep the whole tensor in memory, at an
        # arbitrary address.
        return rows.clone() if slot.is_sharded and not is_overwritten(slot.live) else rows

    def _claim(self, heads: Sequence[TensorHead]) -> None:
        names = [head.name for head in heads]
        with self._lock:
            self._check_open()
            doubled = {name for name, count in Counter(names).items() if count > 1} | (self._claimed & set(names))
            if doubled:
                raise CheckpointError(f"{_SUBJECT} must come once, got {listed(doubled)} twice; send each in one bucket.")
            if unknown := set(names) - set(self._slots):
                raise CheckpointError(
                    f"{_SUBJECT} must be the {self.module}'s alone, got others: {listed(unknown)}; send the served module's."
                )
            for head in heads:
                check_tensor(head, self._slots[head.name], _SUBJECT)
            self._claimed |= set(names)

    @contextlib.contextmanager
    def _filling(self, heads: Sequence[TensorHead], device: torch.device) -> Iterator[list[Tensor]]:
        """Yields memory for a claimed bucket, and drops the claim if anything fails."""
        try:
            try:
                targets = [torch.empty(head.shape, dtype=DTYPES[head.dtype], device=device) for head in heads]
            except (MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
                raise rejected(error, None) from error
            yield targets
            self._keep(heads, targets)
        except BaseException:
            self.unclaim(heads)
            raise

    def _keep(self, heads: Sequence[TensorHead], targets: Sequence[Tensor]) -> None:
        try:
            arrived = {
                head.name: self._slots[head.name].waiting(target, self._memory, name=head.name, subject=_SUBJECT)
                for head, target in zip(heads, targets, strict=True)
            }
        except (CheckpointError, MemoryError, RuntimeError) as error:
            raise rejected(error, None) from error
        with self._lock:
            self._check_open()
            self._arrived |= arrived

    def _check_open(self) -> None:
        if not self._is_open:
            raise WeightsRejectedError(f"{_SUBJECT} must come before their update ends, got a bucket after it; begin another.")
