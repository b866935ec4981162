"""Requests that share forwards: accepted, encoded, denoised step by step beside others, decoded, ended.

scheduler.py   the callers' side: submit, cancel, pause, control tasks, stop
inbox.py       what callers and stages tell the loop
loop.py        the loop: one thread owns all state, and does one piece of work a turn
stages.py      encoding and decoding, beside the loop
queue.py       every accepted request until its one end
request.py     a request, its future, its samples
tasks.py       what is done to the model between steps, or while nothing runs
policy.py      how much runs at once, whose step is next, when a forward is too large, when something is stuck
counters.py    how many requests there were, how they ended, where the time went
runner.py      what the loop asks of whoever runs the model
"""

from flowroll.engine.scheduler.counters import STAGES, LoadStats, RequestCounts, StageSpan, Timing
from flowroll.engine.scheduler.inbox import PauseMode
from flowroll.engine.scheduler.policy import BatchLimits
from flowroll.engine.scheduler.request import RequestFuture
from flowroll.engine.scheduler.scheduler import Scheduler
from flowroll.engine.scheduler.tasks import ExclusiveMode

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
