"""What callers and the three lines of work share, with the lock that guards it. Nobody holds it while the model works."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from flowroll.engine.batching.book import Book
from flowroll.engine.batching.errands import Errands
from flowroll.engine.batching.jobs import Job, RunningSample
from flowroll.engine.batching.limits import BatchLimits
from flowroll.engine.batching.pace import Pace
from flowroll.engine.batching.samples import Samples
from flowroll.errors import FlowrollError, fresh

PauseMode: TypeAlias = Literal["finish", "freeze"]


class Floor:
    """The state of one batcher, and the one rule that is applied after every change: what there is room for is taken up.

    Args:
        limits: How much runs at once.
        max_running_requests: How many are taken up at once; None: as many as there is room for.
        clock: Monotonic seconds.

    Attributes:
        book: The requests.
        samples: Their samples.
        errands: What is to be done between steps or while nothing runs.
        pace: What recent work took.
        to_encode: Requests that were taken up, with their attempt.
        to_decode: Samples that had their last step.
        is_encoding: Whether a request is in the encoder, or about to be.
        num_decoding: Samples in the decoder, or about to be.
        dropped: Samples that were running and have left; the loop tells whom it concerns.
        pause: How generation is paused; None: it is not.
        is_holding: Whether no sample may start, since the weights are being exchanged bucket by bucket.
        stopped: Why nothing is accepted any more; None: requests are taken.
        wake: Makes the other threads look for work.
    """

    def __init__(self, limits: BatchLimits, *, max_running_requests: int | None, clock: Callable[[], float]) -> None:
        self.limits, self.clock = limits, clock
        self._max_running_requests = max_running_requests
        self._lock = threading.Lock()
        self.book = Book(clock, self._leave)
        self.samples = Samples(limits)
        self.errands = Errands()
        self.pace = Pace()
        self.to_encode: deque[tuple[Job, int]] = deque()
        self.to_decode: deque[RunningSample] = deque()
        self.is_encoding = False
        self.num_decoding = 0
        self.dropped: list[RunningSample] = []
        self.pause: PauseMode | None = None
        self.is_holding = False
        self.stopped: FlowrollError | None = None
        self.wake: Callable[[], None] = lambda: None

    @contextmanager
    def change(self) -> Iterator[None]:
        """Holds the lock; afterwards requests are taken up as there is room, threads wake, and what ended is told so."""
        with self._lock:
            yield
            while self.book.num_waiting and self.has_room() and (job := self.book.take_up()) is not None:
                self.errands.note_taken_up()
                self.is_encoding = True
                self.to_encode.append((job, job.attempt))
            ends = self.book.ends()
        self.wake()
        for end in ends:
            end.carry_out()

    @contextmanager
    def look(self) -> Iterator[None]:
        """Holds the lock to read, or to change what nobody waits for."""
        with self._lock:
            yield

    def has_room(self) -> bool:
        """Whether a request may be taken up: one is encoded ahead of what runs."""
        return (
            self.pause is None
            and not self.is_holding
            and self.stopped is None
            and not self.errands.needs_rest
            and not self.is_encoding
            and self.samples.num_ready < self.limits.max_batch_samples
            and (self._max_running_requests is None or self.book.num_running < self._max_running_requests)
        )

    def is_at_rest(self) -> bool:
        """Whether nothing works for a request, not even for one that has ended."""
        return not (self.book.num_running or self.is_encoding or self.num_decoding)

    def is_awaited(self) -> bool:
        """Whether a request waits that nothing but an errand keeps from being taken up."""
        return self.pause is None and not self.is_holding and self.book.num_waiting > 0

    def note_piece(self, started_s: float, *, running_pixels: int = 0) -> None:
        """A piece of work that was begun then has come to an end; a step with the pixels that ran."""
        now_s = self.clock()
        self.pace.note_piece(now_s - started_s, now_s, running_pixels)

    def check_running(self) -> None:
        """Raises what the batcher was stopped with.

        Raises:
            FlowrollError: It was.
        """
        if self.stopped is not None:
            raise fresh(self.stopped)

    def _leave(self, job: Job) -> None:
        """A request runs no more."""
        self.dropped += self.samples.drop(job)
