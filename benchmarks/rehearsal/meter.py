"""Watches every operation on a fake device: what it would cost there, and whether the host would wait for it.

The host is real: operations on the CPU alone are run. What is copied from the device to the host arrives as zeros, and what the
host reads of the device is a stand-in: every flag is set, every mask is full.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# The stage of the steps after the first one.
STEP = "step"
# The stage in which a forward is captured as a CUDA graph.
CAPTURE = "capture"
# Pinned memory of at least so many bytes is fake.
_FAKE_BYTES = 2**26
# CUDA's allocator hands out memory in blocks of this many bytes.
_BLOCK = 512
# Operations that run no kernel although their results are no views by their schemas.
_NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten.set_.source_Storage_storage_offset,
}
_COPIES = (aten._to_copy.default, aten.copy_.default)
# Code that asks others to wait: the caller is named instead.
_ASKERS = ("digest.py", "tensors.py")


class DeviceFaultError(Exception):
    """An operation has operands on two devices, or makes the host wait for the device where it must not."""


@dataclass(slots=True)
class Count:
    """Counts of the operations of one stage, and what they cost.

    Attributes:
        kernels: Operations that compute or move something on the device; each counts once, whatever its kernels are.
        views: Operations on tensors of the device that do not.
        moved: Bytes that kernels read and write, if no cache helps.
        flops: Floating-point operations of products, convolutions and attention, as torch counts them.
        peak: The most bytes that lived on the device at the same time.
        host: The most bytes that tensors took in the host's memory at the same time, as `Meter.host` counts them.
        gathered: Bytes that came from other ranks.
        waits: How often the host waited for the device, by the place that asked.
    """

    kernels: int = 0
    views: int = 0
    moved: int = 0
    flops: int = 0
    peak: int = 0
    host: int = 0
    gathered: int = 0
    waits: Counter[str] = field(default_factory=Counter)


class Meter(TorchDispatchMode):
    """Counts operations by stage; raises at operands on two devices, and where the host waits for the device unexpectedly.

    torch's `MemTracker` is not used: it wants modules and optimizers registered, and leaves out tensors that were there before.

    Args:
        fake: The mode of the fake device, entered before this one.
        waits: For each stage in which the host may wait, the places that may make it wait, with the reason. Places are
            "module:function". None: the host may wait everywhere but in the stages "step" and "capture".

    Attributes:
        counts: What was counted, by stage.
        live: Bytes on the device now.
        pinned: Bytes of pinned memory of the host that were asked for.
        host: Bytes of tensors in the host's memory. Of pinned memory, torch gives none back to the system, so what counts is
            the most that was in use, each tensor's rounded up to a power of two.
        stage: The stage that is being counted.
        num_waits: How often the host has waited for the current stream.
    """

    def __init__(self, fake: FakeTensorMode, waits: Mapping[str, Mapping[str, str]] | None = None) -> None:
        super().__init__()
        self._fake, self._waits = fake, waits
        self.counts: defaultdict[str, Count] = defaultdict(Count)
        self.stage = "other"
        self.num_waits = 0
        self.live = self.pinned = self.host = 0
        self._pinned_in_use = self._pinned_kept = 0
        self._known: set[int] = set()
        self._pinned: set[int] = set()
        self._ordinary: set[int] = set()
        # How many entries the last selection by a mask kept: all of them.
        self._kept = 1

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[Count]:
        """Counts what the block does under this name, and yields the count."""
        before, self.stage = self.stage, stage
        count = self.counts[stage]
        count.peak = max(count.peak, self.live)
        try:
            yield count
        finally:
            self.stage = before

    def is_pinned(self, tensor: Tensor) -> bool:
        """Tells whether a tensor lies in pinned memory of the host."""
        return _key(tensor) in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs or stands in for one operation, and counts it."""
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = dict(kwargs or {})
        given = _tensors((*args, *kwargs.values()))
        if func is aten.is_pinned.default:
            return self.is_pinned(given[0])
        if kwargs.pop("pin_memory", None) or func is aten._pin_memory.default:
            return self._in_pinned_memory(func, given, args, kwargs)
        goes_to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if goes_to != "cuda" and not any(isinstance(one, FakeTensor) for one in given):
            with unset_fake_temporarily():
                made = func(*args, **kwargs)
            for tensor in _tensors((made,)):
                self._keep_on_host(tensor)
            return made
        on = {one.device.type for one in given}
        if func in _COPIES:
            return self._copy(func, given, goes_to, args, kwargs)
        if len(on) > 1:
            raise DeviceFaultError(f"{func} has operands on {' and '.join(sorted(on))}")
        if "cuda" in on:
            if func in (aten._local_scalar_dense.default, aten.equal.default):
                self._wait(str(func))
                return True if func is aten.equal.default or given[0].dtype == torch.bool else self._number(given[0])
            if func is aten.index.Tensor and any(one.dtype == torch.bool for one in given[1:]):
                return self._select(*args)
            if func._schema.name.startswith("c10d::"):
                return self._gather(func, args)
        result = func(*args, **kwargs)
        self._count(func, given, args, kwargs, result)
        return result

    def _in_pinned_memory(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        made: Tensor = torch.empty_like(given[0], device="meta") if given else func(*args, **{**kwargs, "device": "meta"})
        # What holds weights has no numbers: it may be larger than this machine's memory.
        is_fake = made.untyped_storage().nbytes() >= _FAKE_BYTES
        with self._fake if is_fake else unset_fake_temporarily():
            pinned = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype)
        self.pinned += made.untyped_storage().nbytes()
        self._keep_on_host(pinned, is_pinned=True)
        return pinned

    def _copy(self, func: Any, given: list[Tensor], goes_to: str | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copies within a device, or between the host and the device, in which case the host may have to wait."""
        is_in_place = func is aten.copy_.default
        target, source = (given[0], given[1]) if is_in_place else (None, given[0])
        goes_to = target.device.type if target is not None else goes_to or source.device.type
        if {source.device.type, goes_to} == {"cpu", "cuda"}:
            is_queued = bool(kwargs.get("non_blocking") or (is_in_place and args[2:] == (True,)))
            # What goes to new memory of the host without a wait goes to pinned memory.
            host = source if goes_to == "cuda" else target
            if not (is_queued and (host is None or self.is_pinned(host))):
                self._wait(f"a copy from {source.device.type} to {goes_to}")
            if goes_to == "cpu" and not isinstance(target, FakeTensor):
                self._note(func, [source], [])
                with unset_fake_temporarily():
                    if target is not None:
                        return target.zero_()
                    dtype = kwargs.get("dtype") or source.dtype
                    made = torch.empty_strided(source.shape, source.stride(), dtype=dtype).zero_()
                # torch takes pinned memory for it.
                self._keep_on_host(made, is_pinned=is_queued)
                return made
        result = func(*args, **kwargs)
        self._count(func, given, args, kwargs, result)
        return result

    def _select(self, source: Tensor, indices: list[Tensor | None]) -> Tensor:
        """Selects by masks, as if they were full. The host waits, because it has to know how many entries there are."""
        self._wait("a selection by a mask")
        assert len(indices) == 1 and indices[0] is not None
        kept = source.flatten(0, indices[0].ndim - 1).clone()
        self._kept = len(kept)
        return kept

    def _number(self, tensor: Tensor) -> int | float:
        return 0.0 if tensor.is_floating_point() else self._kept

    def _gather(self, func: Any, args: Any) -> Any:
        outputs, inputs = _tensors((args[0],)), _tensors((args[1],))
        self._note(func, inputs, outputs)
        self.counts[self.stage].gathered += sum(one.nbytes for one in outputs) - sum(one.nbytes for one in inputs)
        return func(*args)

    def _wait(self, what: str) -> None:
        place = _asker()
        self.num_waits += 1
        self.counts[self.stage].waits[place] += 1
        if self.stage in (STEP, CAPTURE) if self._waits is None else place not in self._waits.get(self.stage, ()):
            raise DeviceFaultError(f"{place} makes the host wait for the device ({what}) in the stage {self.stage!r}")

    def _count(self, func: Any, given: list[Tensor], args: Any, kwargs: Any, result: Any) -> None:
        made = [one for one in _tensors((result,)) if one.device.type == "cuda"]
        used = [one for one in given if one.device.type == "cuda"]
        if not made and not used:
            return
        for tensor in made:
            self._keep(tensor)
        count = self.counts[self.stage]
        if func in _NO_KERNEL or _is_view(func):
            count.views += 1
            return
        self._note(func, used, made)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            count.flops += formula(*args, **kwargs, out_val=result)

    def _note(self, func: Any, used: list[Tensor], made: list[Tensor]) -> None:
        count = self.counts[self.stage]
        count.kernels += 1
        # An expanded tensor is smaller than its shape says.
        count.moved += sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in (*used, *made))

    def _keep(self, tensor: Tensor) -> None:
        """Counts a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.counts[self.stage].peak = max(self.counts[self.stage].peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _keep_on_host(self, tensor: Tensor, *, is_pinned: bool = False) -> None:
        """Counts the memory of a tensor of the host, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._pinned or key in self._ordinary:
            return
        if is_pinned:
            size = 1 << (size - 1).bit_length()
            self._pinned_in_use += size
            grown = max(self._pinned_in_use - self._pinned_kept, 0)
            self._pinned_kept += grown
            self.host += grown
        else:
            self.host += size
        (self._pinned if is_pinned else self._ordinary).add(key)
        count = self.counts[self.stage]
        count.host = max(count.host, self.host)
        weakref.finalize(storage, self._free_on_host, key, size)

    def _free_on_host(self, key: int, size: int) -> None:
        if key in self._pinned:
            self._pinned.discard(key)
            self._pinned_in_use -= size
        else:
            self._ordinary.discard(key)
            self.host -= size

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among the arguments of an operation, also those in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _asker() -> str:
    """Returns the innermost code outside torch, this package and what asks for others."""
    frame = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if not module.startswith(("torch.", "benchmarks.rehearsal.")) and module != "torch" and not name.endswith(_ASKERS):
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "nobody"
