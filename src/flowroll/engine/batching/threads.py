"""A thread that drives a line of work."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from flowroll.engine.batching.lines import Line

T = TypeVar("T")
# How often a thread that has nothing to do looks whether its owner is still there. Nobody can tell it: what runs when an object
# is collected must not wait for a lock, as waking a thread may.
_LOOK_S = 5.0


class LineThread:
    """A thread that drives a line until it is stopped, or the line's owner is gone.

    Args:
        name: Of the thread.
        owner: Kept alive by the thread only while it works, so that an engine nobody holds any more can be collected.
        line: The owner's line.
        crash: Told of an error that ends the thread.
    """

    def __init__(self, name: str, owner: T, line: Callable[[T], Line], crash: Callable[[T, BaseException], None]) -> None:
        self._woken, self._stopped = threading.Event(), threading.Event()
        # The thread must not hold this object either: its owner does.
        self._thread = threading.Thread(
            target=_drive, name=name, args=(weakref.ref(owner), line, crash, self._woken, self._stopped), daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether this is the calling thread."""
        return threading.current_thread() is self._thread

    def wake(self) -> None:
        """Makes it look for work."""
        self._woken.set()

    def stop(self) -> None:
        """Ends it after the piece of work that it is at; does not wait."""
        self._stopped.set()
        self._woken.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Waits for its end."""
        self._thread.join(timeout_s)


def _drive(
    owner: weakref.ref[T],
    line: Callable[[T], Line],
    crash: Callable[[T, BaseException], None],
    woken: threading.Event,
    stopped: threading.Event,
) -> None:
    # A thread's own setting in torch, for all that it does.
    torch.set_grad_enabled(False)
    while not stopped.is_set():
        # Before looking, so that what comes after the look wakes it again.
        woken.clear()
        held = owner()
        if held is None:
            return
        try:
            worked = line(held).work()
            idle_s = None if worked else line(held).idle_s()
        except BaseException as error:
            crash(held, error)
            return
        del held
        if not worked:
            woken.wait(_LOOK_S if idle_s is None else min(idle_s, _LOOK_S))
