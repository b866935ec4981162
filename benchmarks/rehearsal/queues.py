"""Streams and events of a device that is not there, and a watch over the order that they make.

The judge is torch's own sanitizer of streams (`torch.cuda._sanitizer`): it knows, for every stream, which kernels of other
streams are over before its next one. On a GPU it listens to the driver and tells tensors apart by their addresses; here it
listens to the stand-ins, and tells them apart by their storages. What it does not watch is added: memory that is freed too
early, and the host, which reads pinned memory.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.cuda import _sanitizer
from torch.cuda._sanitizer import FACTORY_FUNCTION_REGEX, ArgumentHandler, EventHandler
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rehearsal.meter import Meter

# The stream of steps, and the host as one more stream, which waits only where the program makes it wait.
_STEPS, _HOST = 0, -1
# What asks about a tensor, and does not look at its numbers.
_QUESTIONS = (torch.ops.prim.device.default, torch.ops.aten.is_pinned.default)


class RaceError(Exception):
    """Two streams use the same memory, and nothing says which of them comes first."""


class Queues:
    """The streams and events of one device, on one thread of the host.

    Attributes:
        handler: The judge.
        kept_for: By storage, the streams for which the allocator keeps its memory (`Tensor.record_stream`).
    """

    def __init__(self) -> None:
        self.handler = EventHandler()
        self.kept_for: defaultdict[int, set[int]] = defaultdict(set)
        self._current = [_Stream(self, _STEPS)]
        self._ids = itertools.count(1)
        self.handler.syncs.create_stream(_HOST)

    @property
    def current(self) -> int:
        """The stream on which work is queued now."""
        return self._current[-1].cuda_stream

    @property
    def driver(self) -> Mapping[str, Callable[..., Any]]:
        """The functions of `torch.cuda`, by name."""
        return {
            "Stream": lambda *_: _Stream(self, next(self._ids)),
            "Event": lambda **_: self.event(),
            "stream": self._on,
            "current_stream": lambda *_: self._current[-1],
            "synchronize": lambda *_: self.handler._handle_device_synchronization(),
        }

    def event(self) -> _Event:
        """Makes an event."""
        return _Event(self, next(self._ids))

    def keep_for(self, tensor: Tensor, stream: _Stream) -> None:
        """Stands in for `Tensor.record_stream`."""
        self.kept_for[_key(tensor)].add(stream.cuda_stream)

    @contextlib.contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()


class _Stream:
    def __init__(self, queues: Queues, number: int) -> None:
        self.cuda_stream, self._handler, self._queues = number, queues.handler, queues
        self._handler._handle_stream_creation(number)

    def wait_event(self, event: _Event) -> None:
        self._handler._handle_event_wait(event.number, self.cuda_stream)

    def wait_stream(self, other: _Stream) -> None:
        event = self._queues.event()
        event.record(other)
        self.wait_event(event)


class _Event:
    def __init__(self, queues: Queues, number: int) -> None:
        self.number, self._handler = number, queues.handler
        self._handler._handle_event_creation(number)

    def record(self, stream: _Stream) -> None:
        self._handler._handle_event_record(self.number, stream.cuda_stream)

    def synchronize(self) -> None:
        self._handler._handle_event_synchronization(self.number)


class Order(TorchDispatchMode):
    """Watches every operation on the fake device and on pinned memory; raises at the first that has no order.

    It must be entered after the meter.

    Args:
        queues: The streams, as `stand_ins` has them.
        meter: Knows what is pinned, and when the host waits.

    Attributes:
        streams: The streams that something was queued on.
    """

    def __init__(self, queues: Queues, meter: Meter) -> None:
        super().__init__()
        self._queues, self._handler, self._meter = queues, queues.handler, meter
        self.streams: set[int] = set()
        self._made_on: dict[int, int] = {}
        self._freed_early: list[str] = []

    def check(self) -> None:
        """Raises if memory was freed that another stream could still use."""
        found, self._freed_early = self._freed_early, []
        if found:
            raise RaceError(found[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation, and asks the judge about it."""
        if func in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        is_factory = bool(FACTORY_FUNCTION_REGEX.match(func._schema.name))
        found, waits = _Arguments(self._meter), self._meter.num_waits
        found.parse_inputs(func._schema, args, kwargs, is_factory=is_factory)
        result = func(*args, **kwargs)
        found.parse_outputs(func._schema, result, is_factory=is_factory)
        for storage, is_on_device in found.storages:
            self._know(storage, is_on_device=is_on_device)
        stream = self._queues.current if any(is_on_device for _, is_on_device in found.storages) else _HOST
        if found.dataptrs_read or found.dataptrs_written:
            self._launch(stream, found, func)
            self.streams |= {stream} - {_HOST}
        if stream == _HOST:
            self._handler._handle_stream_synchronization(_HOST)
        elif self._meter.num_waits > waits:
            self._handler._handle_stream_synchronization(stream)
        return result

    def _launch(self, stream: int, found: _Arguments, func: Any) -> None:
        with mock.patch.object(_sanitizer, "traceback", _NoTraces):
            errors = self._handler._handle_kernel_launch(
                stream,
                found.dataptrs_read - found.dataptrs_written,
                found.dataptrs_written,
                found.outputs,
                str(func),
                found.tensor_aliases,
            )
        if errors:
            raise RaceError(str(errors[0]))

    def _know(self, storage: torch.UntypedStorage, *, is_on_device: bool) -> None:
        key = storage._cdata
        if key not in self._made_on:
            self._made_on[key] = self._queues.current
            weakref.finalize(storage, self._free, key, is_on_device)

    def _free(self, key: int, is_on_device: bool) -> None:
        """Notes if memory is freed that another stream than its own may still use, unless the allocator was told."""
        own, kept_for = self._made_on.pop(key), self._queues.kept_for.pop(key, set())
        info = self._handler.tensors_accessed.accesses.pop(key, None)
        # Pinned memory is not used again before the copies to it are done; torch sees to that by itself.
        if info is None or not is_on_device:
            return
        for access in [*info.reads, *([info.write] if info.write else [])]:
            if access.stream in (own, *kept_for):
                continue
            if not self._handler.syncs.is_ordered_after(own, access.seq_num, access.stream):
                self._freed_early.append(
                    f"memory of stream {own} is freed while stream {access.stream} may run {access.operator}"
                )


class _NoTraces:
    """Stands in for the module `traceback`: a trace of the stack for every kernel would take most of the time."""

    StackSummary = SimpleNamespace(extract=lambda *_, **__: traceback.StackSummary())
    walk_stack = staticmethod(lambda _: ())


class _Arguments(ArgumentHandler):
    """The storages that an operation reads and writes, on the device or in pinned memory."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter
        self.storages: list[tuple[torch.UntypedStorage, bool]] = []

    def _handle_argument(
        self, value: Any, is_write: bool, metadata_only: bool, name: str | None = None, is_output: bool = False
    ) -> None:
        if not isinstance(value, Tensor):
            return
        is_on_device = value.device.type == "cuda"
        if not is_on_device and not self._meter.is_pinned(value):
            return
        storage = value.untyped_storage()
        self.storages.append((storage, is_on_device))
        if is_write:
            self.dataptrs_written.add(storage._cdata)
        elif not metadata_only:
            self.dataptrs_read.add(storage._cdata)
        self.tensor_aliases.setdefault(storage._cdata, []).append(name or "")


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
