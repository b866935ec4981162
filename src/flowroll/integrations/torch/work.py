"""The groups of one iteration on their way, and the threads that have them made."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from flowroll.errors import FlowrollError, InvalidRequestError, QueueFullError
from flowroll.types import Rollout
from flowroll.types.weights import version_number

# What the iterable of prompts may yield: a text, or fields of `SamplingParams`.
PromptItem: TypeAlias = str | Mapping[str, Any]

# How long a full server is asked again, and the longest pause in between, in seconds.
_MAX_WAIT_S, _MAX_PAUSE_S = 600.0, 60.0
# How often the end of the threads asks for the end of what still runs, in seconds.
_ABORT_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The calls that the dataset makes to an engine or a client."""

    rollout: Callable[..., list[Rollout]]
    abort: Callable[[str], object]
    weight_version: Callable[[], str]


def source_of(source: Any) -> Source:
    """Returns what is asked of an engine or a client.

    Raises:
        InvalidRequestError: It is neither.
    """
    rollout = getattr(source, "rollout", None)
    if callable(rollout) and not inspect.iscoroutinefunction(inspect.unwrap(rollout)):
        if hasattr(source, "scheduler"):
            return Source(rollout=rollout, abort=source.scheduler.abort, weight_version=lambda: str(source.weight_version))
        if hasattr(source, "abort_request") and not _is_async(source):
            return Source(
                rollout=rollout, abort=source.abort_request, weight_version=lambda: str(source.server_info()["weight_version"])
            )
    raise InvalidRequestError(
        f"source must be an Engine or a Client, got {type(source).__name__}; an AsyncClient has a Client beside it.",
        field="source",
    )


def _is_async(source: Any) -> bool:
    return hasattr(source, "__aenter__")


@dataclass(slots=True, eq=False)
class Slot:
    """One group on its way. `Work.changed` guards it."""

    index: int
    item: PromptItem | None
    fields: dict[str, Any] = field(default_factory=dict)
    request_id: str | None = None
    rollouts: tuple[Rollout, ...] | None = None
    error: BaseException | None = None
    remakes: int = 0

    @property
    def is_waiting(self) -> bool:
        """Whether the work is still to be done: no request runs for it, and it has neither rollouts nor an error."""
        return self.request_id is None and self.rollouts is None and self.error is None

    @property
    def weight_version(self) -> str:
        """The oldest version among its rollouts."""
        assert self.rollouts
        return min((rollout.weight_version for rollout in self.rollouts), key=lambda version: version_number(version) or 0)


class Work:
    """The groups of one iteration and the threads that make them. The threads hold this, and not the iterator."""

    def __init__(self, source: Source, *, num_threads: int) -> None:
        self._source = source
        self.changed = threading.Condition()
        self.slots: deque[Slot] = deque()
        self.is_stopped = False
        self._stopping = threading.Event()
        cpu_threads = torch.get_num_threads()
        self._threads = [
            threading.Thread(target=self._run, args=(cpu_threads,), name=f"rollouts-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Aborts what runs and waits for the threads."""
        with self.changed:
            self.is_stopped = True
            self._stopping.set()
            self.changed.notify_all()
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        while any(thread.is_alive() for thread in others):
            # Again and again: a request may not have been accepted yet.
            with self.changed:
                running = [slot.request_id for slot in self.slots if slot.request_id is not None]
            for request_id in running:
                with contextlib.suppress(FlowrollError):
                    self._source.abort(request_id)
            until_s = time.monotonic() + _ABORT_EVERY_S
            for thread in others:
                thread.join(max(until_s - time.monotonic(), 0.0))

    def _run(self, cpu_threads: int) -> None:
        # The bits of a rollout depend on the number of threads of who asks for it.
        if torch.get_num_threads() != cpu_threads:
            torch.set_num_threads(cpu_threads)
        while (slot := self._take()) is not None:
            rollouts, error = None, None
            try:
                rollouts = tuple(self._ask({**slot.fields, "request_id": slot.request_id}))
            except BaseException as raised:  # it is raised again in the loop that iterates
                error = raised
            with self.changed:
                slot.request_id, slot.rollouts, slot.error = None, rollouts, error
                self.changed.notify_all()
            del slot, rollouts, error

    def _take(self) -> Slot | None:
        """Waits for a group that is to be made; None: there will be no more."""
        with self.changed:
            while not self.is_stopped:
                for slot in self.slots:
                    if slot.is_waiting:
                        slot.request_id = f"dataset-{uuid.uuid4().hex}"
                        return slot
                self.changed.wait()
        return None

    def _ask(self, fields: dict[str, Any]) -> list[Rollout]:
        until_s = time.monotonic() + _MAX_WAIT_S
        while True:
            try:
                return self._source.rollout(**fields)
            except QueueFullError as error:
                pause_s = min(max(error.retry_after_s, 0.05), _MAX_PAUSE_S)
                if time.monotonic() + pause_s > until_s or self._stopping.wait(pause_s):
                    raise
