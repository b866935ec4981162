"""Work on the model besides the steps of samples: changes of its weights, and recomputed log-probs. Belongs to the loop."""

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
# Work that is done in pieces, between which samples take steps; what the generator returns is the result.
Pieces: TypeAlias = Generator[None, None, Any]


@dataclass(slots=True, kw_only=True, eq=False)
class ControlTask:
    """Something that the loop's thread does with the model, instead of a step.

    Attributes:
        action: What to do; a generator is advanced by one piece a turn.
        needs_idle: Whether no request may run meanwhile; otherwise it goes between two steps.
        future: Receives what the action returns or raises.
        num_threads: CPU threads of the caller.
        request_id: Names a request to recompute log-probs; None: anything else, which is neither counted nor aborted.
        accepted_s: When it came.
        deadline_s: When it is given up; None: never.
        pieces: The generator, once it was begun.
    """

    action: Callable[[], Any]
    needs_idle: bool
    future: Future[Any] = field(default_factory=Future)
    num_threads: int = field(default_factory=torch.get_num_threads)
    request_id: str | None = None
    accepted_s: float = 0.0
    deadline_s: float | None = None
    pieces: Pieces | None = None

    def advance(self) -> tuple[bool, Any]:
        """Does the task, or its next piece; returns whether it is done, and its result."""
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
    """The tasks that wait, those of each kind in the order in which they came, and the one that is being done."""

    def __init__(self) -> None:
        self._between: deque[ControlTask] = deque()
        self._exclusive: deque[ControlTask] = deque()
        # Begun, and not ended; a task in pieces stays here between its pieces.
        self.current: ControlTask | None = None
        self.current_since_s = 0.0
        self._accepted = self._completed = self._failed = 0
        self._ends: list[tuple[ControlTask, Any, BaseException | None]] = []

    @property
    def needs_idle(self) -> bool:
        """Whether a task waits for all requests to end, or is being done without them, so that none may be admitted."""
        return bool(self._exclusive) or (self.current is not None and self.current.needs_idle)

    def __iter__(self) -> Iterator[ControlTask]:
        if self.current is not None:
            yield self.current
        yield from self._between
        yield from self._exclusive

    def counts(self) -> RequestCounts:
        """Counts the requests to recompute log-probs; one that is being done is among those that wait."""
        pending = self._accepted - self._completed - self._failed
        return RequestCounts(accepted=self._accepted, completed=self._completed, failed=self._failed, pending=pending)

    def add(self, task: ControlTask) -> None:
        """Puts a task in line."""
        (self._exclusive if task.needs_idle else self._between).append(task)
        self._accepted += task.request_id is not None

    def next(self, now_s: float, *, is_idle: bool, is_holding: bool) -> ControlTask | None:
        """Begins the next task, or goes on with the one that is being done in pieces.

        A task that needs idleness goes first where nothing runs: the others may come without end.

        Args:
            now_s: The time.
            is_idle: Whether nothing works for a request.
            is_holding: Whether weights may be a mixture: log-probs that were not begun are not recomputed with it, but wait.
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
        """Takes a task out, wherever it is; its future is ended by `deliver_ends`."""
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
        """Ends the futures of the tasks that have ended; their callbacks run here."""
        ends, self._ends = self._ends, []
        for task, result, error in ends:
            end_future(task.future, result, error=error)

    def cancel(self, is_meant: Callable[[ControlTask], bool]) -> int:
        """Ends the requests to recompute log-probs that are meant; returns how many there were."""
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
        """The first moment at which `expire` will have something to do; None: no task has a deadline."""
        return min((task.deadline_s for task in self if task.deadline_s is not None), default=None)

    def fail_all(self, make_error: Callable[[], FlowrollError]) -> None:
        """Ends every task, the one that is being done too."""
        for task in list(self):
            self.end(task, error=make_error())
