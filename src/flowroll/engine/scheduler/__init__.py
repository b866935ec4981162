"""The request scheduler: accepts requests, encodes them, denoises them in shared forwards, decodes and ends them.

scheduler.py   the interface for callers: submit, cancel, pause, control tasks, stop
inbox.py       the messages to the loop, from callers and from the stages
loop.py        the loop: one thread owns all state and does one piece of work per turn
stages.py      the encode and decode stages, which work beside the loop
queue.py       all accepted requests, from their acceptance to their end
request.py     a request, its future and its samples
tasks.py       control tasks, which run between steps or while no request runs
samples.py     the samples in memory: ready to start, taking steps, or being decoded
policy.py      the rules: batch limits, whose step is next, back-off when memory runs out, and when something is stuck
counters.py    the numbers of requests, how they ended, and how their time was spent
"""

from flowroll.engine.scheduler.counters import STAGES, LoadStats, RequestCounts, StageSpan, Timing
from flowroll.engine.scheduler.policy import BatchLimits
from flowroll.engine.scheduler.request import RequestFuture
from flowroll.engine.scheduler.scheduler import Scheduler
from flowroll.engine.scheduler.tasks import ExclusiveMode, PauseMode

__all__ = [
    "STAGES",
    "BatchLimits",
    "ExclusiveMode",
    "LoadStats",
    "PauseMode",
    "RequestCounts",
    "RequestFuture",
    "Scheduler",
    "StageSpan",
    "Timing",
]
