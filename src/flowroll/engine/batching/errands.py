"""What is to be done to the model between steps, or while nothing runs at all. Its owner's lock guards it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

ExclusiveMode: TypeAlias = Literal["drain", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Errand:
    """Something to be done by the loop's thread.

    Attributes:
        action: What.
        needs_rest: Whether no request may be taken up meanwhile; else it goes between two steps.
        future: What the action returns or raises.
        num_threads: CPU threads of the caller.
    """

    action: Callable[[], Any]
    needs_rest: bool
    future: Future[Any] = field(default_factory=Future)
    num_threads: int = field(default_factory=torch.get_num_threads)


class Errands:
    """The errands that wait, those of each kind in the order in which they came."""

    def __init__(self) -> None:
        self._between: deque[Errand] = deque()
        self._exclusive: deque[Errand] = deque()
        self._current: Errand | None = None
        self._begun_s = 0.0

    @property
    def needs_rest(self) -> bool:
        """Whether something waits for all requests to end, or is being done, so that none may be taken up."""
        return bool(self._exclusive) or (self._current is not None and self._current.needs_rest)

    def add(self, errand: Errand) -> None:
        """Puts it in line."""
        (self._exclusive if errand.needs_rest else self._between).append(errand)

    @property
    def current_since_s(self) -> float | None:
        """When what is being done was begun; None: nothing is."""
        return None if self._current is None else self._begun_s

    def next(self, now_s: float, *, is_at_rest: bool) -> Errand | None:
        """Takes out what can be done now; it is being done until `done`."""
        if self._current is not None:
            return None
        if self._between:
            self._current = self._between.popleft()
        elif self._exclusive and is_at_rest:
            self._current = self._exclusive.popleft()
        self._begun_s = now_s
        return self._current

    def done(self) -> bool:
        """What was taken out is done; False: it has been given up meanwhile, and its future ended."""
        is_awaited, self._current = self._current is not None, None
        return is_awaited

    def give_up(self) -> Errand | None:
        """What is being done, and does not come to an end."""
        hanging, self._current = self._current, None
        return hanging

    def clear(self) -> list[Errand]:
        """Takes out all that wait."""
        taken = [*self._between, *self._exclusive]
        self._between.clear()
        self._exclusive.clear()
        return taken
