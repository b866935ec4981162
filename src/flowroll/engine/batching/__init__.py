"""Requests that share forwards: accepted, encoded, denoised step by step beside others, decoded, ended.

One noun per file. Callers' side on top, then the lines of work, then what they share; what is below the line knows no threads.

    batcher.py   what callers may ask for: submit, cancel, pause, errands, stop
    threads.py   a thread that drives a line
    lines.py     the three lines of work: encode, step, decode
    floor.py     what callers and lines share, with its lock
    ----------
    book.py      every accepted request until its one end
    samples.py   the samples that are ready, running and being decoded
    turns.py     whose step is next
    steps.py     one shared step, and what fails with it
    room.py      how many samples fit into one forward
    errands.py   what is to be done between steps, or while nothing runs
    jobs.py      an accepted request; a running sample of it
    limits.py    how much runs at once
    pace.py      how long things take
    ledger.py    how many there were, how they ended, where the time went
"""

from flowroll.engine.batching.batcher import Batcher
from flowroll.engine.batching.errands import ExclusiveMode
from flowroll.engine.batching.floor import PauseMode
from flowroll.engine.batching.jobs import Accepted
from flowroll.engine.batching.ledger import STAGES, LoadStats, Stretch, Timing, WorkerStats
from flowroll.engine.batching.limits import BatchLimits

__all__ = [
    "STAGES",
    "Accepted",
    "BatchLimits",
    "Batcher",
    "ExclusiveMode",
    "LoadStats",
    "PauseMode",
    "Stretch",
    "Timing",
    "WorkerStats",
]
