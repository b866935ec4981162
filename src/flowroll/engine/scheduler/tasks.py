"""Control tasks: work on the model besides steps, such as weight changes and recomputed log-probs. Only the loop uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from flowroll.engine.scheduler.counters import RequestCounts
from flowroll.engine.scheduler.request import cancelled, end_future, too_late
from flowroll.errors import FlowrollError

ExclusiveMode: TypeAlias = Literal["drain", "abort"]
PauseMode: TypeAlias = Literal["finish", "freeze"]
# A task in pieces: samples take steps between the pieces, and the value that the generator returns is the result.
Pieces: TypeAlias = Generator[None, None, Any]


@dataclass(slots=True, kw_only=True, eq=False)
class ControlTask:
    """An action on the model that the loop's thread runs in a turn instead of a step.

    Attributes:
        action: The function to call. If it returns a generator, that is advanced by one piece per turn.
        needs_idle: Whether no request may run meanwhile; otherwise the task runs between two steps.
        is_newer: Whether weights of a newer version are in place afterwards.
        future: The future that receives what the action returns or raises.
        num_threads: The number of CPU threads of the caller.
        request_id: The id of a request to recompute log-probs; None for any other task, which is neither counted nor aborted.
        accepted_s: When the task arrived, in monotonic seconds.
        deadline_s: When the task fails if it has not ended, in monotonic seconds; None: never.
        pieces: The generator that the action returned; None before that.
    """

    action: Callable[[], Any]
    needs_idle: bool
    is_newer: bool = False
    future: Future[Any] = field(default_factory=Future)
    num_threads: int = field(default_factory=torch.get_num_threads)
    request_id: str | None = None
    accepted_s: float = 0.0
    deadline_s: float | None = None
    pieces: Pieces | None = None

    def advance(self) -> tuple[bool, Any]:
        """Runs the task or its next piece; returns whether the task is done, and its result."""
        if self.pieces is None:
            result = self.action()
            if not hasattr(result, "send"):
                return True, result
            self.pieces = result
        try:
            next(self.pieces)
        except StopIteration as end:
            return True, end.value
        return False, None


class TaskQueue:
    """Holds the current task and the waiting tasks, which are in order of arrival within each of their two kinds."""

    def __init__(self) -> None:
        self._between: deque[ControlTask] = deque()
        self._exclusive: deque[ControlTask] = deque()
        # The task that was begun and has not ended. A task in pieces stays here between its pieces.
        self.current: ControlTask | None = None
        self.current_since_s = 0.0
        self._accepted = self._completed = self._failed = 0
        self._ends: list[tuple[ControlTask, Any, BaseException | None]] = []

    @property
    def needs_idle(self) -> bool:
        """Whether a task that needs idleness waits or is current, so that no request may be admitted."""
        return bool(self._exclusive) or (self.current is not None and self.current.needs_idle)

    @property
    def num_newer(self) -> int:
        """The number of newer versions of the weights that wait to be put in place."""
        return sum(task.is_newer for task in self)

    def __iter__(self) -> Iterator[ControlTask]:
        if self.current is not None:
            yield self.current
        yield from self._between
        yield from self._exclusive

    @property
    def has_any(self) -> bool:
        """Whether a task waits or is current."""
        return self.current is not None or bool(self._between or self._exclusive)

    def counts(self) -> RequestCounts:
        """Counts the requests to recompute log-probs. The current one is counted as pending."""
        pending = self._accepted - self._completed - self._failed
        return RequestCounts(accepted=self._accepted, completed=self._completed, failed=self._failed, pending=pending)

    def add(self, task: ControlTask) -> None:
        """Adds a task at the end of the queue of its kind."""
        (self._exclusive if task.needs_idle else self._between).append(task)
        self._accepted += task.request_id is not None

    def next(self, now_s: float, *, is_idle: bool, is_holding: bool) -> ControlTask | None:
        """Returns the current task, after making the next one current if there is none; None if no task may begin now.

        If nothing runs, a task that needs idleness goes first, because the other tasks may arrive without end.

        Args:
            now_s: The current time, in monotonic seconds.
            is_idle: Whether no work is under way for any request.
            is_holding: Whether the weights may be a mixture of old and new ones. If so, requests to recompute log-probs that
                have not begun go on waiting.
        """
        if self.current is None:
            if self._exclusive and is_idle:
                self.current = self._exclusive.popleft()
            elif task := next((task for task in self._between if not is_holding or task.request_id is None), None):
                self._between.remove(task)
                self.current = task
            self.current_since_s = now_s
        return self.current

    def end(self, task: ControlTask, result: Any = None, *, error: BaseException | None = None) -> None:
        """Removes a task, whether it waits or is current; `deliver_ends` ends its future."""
        if task is self.current:
            self.current = None
            if task.pieces is not None:
                task.pieces.close()
        else:
            (self._exclusive if task.needs_idle else self._between).remove(task)
        if task.request_id is not None:
            self._failed += error is not None
            self._completed += error is None
        self._ends.append((task, result, error))

    def deliver_ends(self) -> None:
        """Ends the futures of the tasks that have ended. The futures' callbacks run in this call."""
        ends, self._ends = self._ends, []
        for task, result, error in ends:
            end_future(task.future, result, error=error)

    def cancel(self, is_meant: Callable[[ControlTask], bool]) -> int:
        """Cancels the requests to recompute log-probs for which `is_meant` holds; returns their number."""
        meant = [task for task in self if task.request_id is not None and is_meant(task)]
        for task in meant:
            self.end(task, error=cancelled())
        return len(meant)

    def expire(self, now_s: float) -> None:
        """Ends the tasks whose deadline has passed, and those whose future was cancelled."""
        for task in list(self):
            if task.deadline_s is not None and now_s >= task.deadline_s:
                self.end(task, error=too_late(now_s - task.accepted_s))
            elif task.future.cancelled():
                self.end(task, error=cancelled())

    def next_deadline_s(self) -> float | None:
        """Returns the earliest deadline of all tasks, in monotonic seconds; None if no task has one."""
        return min((task.deadline_s for task in self if task.deadline_s is not None), default=None)

    def fail_all(self, make_error: Callable[[], FlowrollError]) -> None:
        """Ends every task in an error, also the current one."""
        for task in list(self):
            self.end(task, error=make_error())
