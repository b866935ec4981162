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
        yields: Whether, of those that need rest, a request that waits goes between it and the next of its kind.
        future: What the action returns or raises.
        num_threads: CPU threads of the caller.
    """

    action: Callable[[], Any]
    needs_rest: bool
    yields: bool = False
    future: Future[Any] = field(default_factory=Future)
    num_threads: int = field(default_factory=torch.get_num_threads)


class Errands:
    """The errands that wait, those of each kind in the order in which they came."""

    def __init__(self) -> None:
        self._between: deque[Errand] = deque()
        self._exclusive: deque[Errand] = deque()
        self._current: Errand | None = None
        self._begun_s = 0.0
        self._owes_request = False

    @property
    def needs_rest(self) -> bool:
        """Whether something waits for all requests to end, or is being done, so that none may be taken up."""
        if self._current is not None and self._current.needs_rest:
            return True
        return bool(self._exclusive) and not self._lets_pass

    @property
    def _lets_pass(self) -> bool:
        return self._owes_request and self._exclusive[0].yields

    def note_taken_up(self) -> None:
        """A request was taken up: a stream of errands that yield has let one pass."""
        self._owes_request = False

    def add(self, errand: Errand) -> None:
        """Puts it in line."""
        (self._exclusive if errand.needs_rest else self._between).append(errand)

    @property
    def current_since_s(self) -> float | None:
        """When what is being done was begun; None: nothing is."""
        return None if self._current is None else self._begun_s

    def next(self, now_s: float, *, is_at_rest: bool, is_awaited: bool) -> Errand | None:
        """Takes out what can be done now; it is being done until `done`.

        What needs rest goes first where there is rest: others may come without end.

        Args:
            now_s: The time.
            is_at_rest: Whether nothing works for a request.
            is_awaited: Whether a request waits that could be taken up.
        """
        if self._current is not None:
            return None
        if self._exclusive and is_at_rest and not (self._lets_pass and is_awaited):
            self._current = self._exclusive.popleft()
            self._owes_request = self._current.yields
        elif self._between:
            self._current = self._between.popleft()
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
