"""Batchers that are driven by hand over the work of a real tiny engine, with a clock of their own."""

from collections.abc import Callable
from typing import Any

from tests.driving import drive, work_once
from torch import Tensor

from flowroll import SamplingParams
from flowroll.engine import Accepted, BatchLimits, Engine, RequestPlan
from flowroll.engine.batching import Batcher
from flowroll.engine.batching.steps import Steps
from flowroll.engine.denoising import DenoisingTask, Sample

SMALL: dict[str, Any] = {"prompt": "a bowl", "height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 0.0}
ALL: dict[str, Any] = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Work:
    """An engine's own work, with something to do before."""

    def __init__(self, engine: Engine) -> None:
        self._work = engine._work
        self.device = engine._work.device
        self.before_encode: Callable[[RequestPlan], object] = lambda plan: None
        self.before_decode: Callable[[DenoisingTask, Sample], object] = lambda task, sample: None

    def encode(self, plan: RequestPlan) -> DenoisingTask:
        self.before_encode(plan)
        return self._work.encode(plan)

    def decode(self, task: DenoisingTask, sample: Sample) -> Tensor:
        self.before_decode(task, sample)
        return self._work.decode(task, sample)


class Hand:
    """One batcher and the hand that drives it.

    Args:
        engine: Does the work; none of its own threads is used.
        limits: Fields of `BatchLimits`.
    """

    def __init__(self, engine: Engine, *, steps: Steps | None = None, **limits: int) -> None:
        self.engine = engine
        self.work, self.clock = Work(engine), Clock()
        self.batcher = Batcher(self.work, BatchLimits(**limits), steps=steps, clock=self.clock)

    def submit(self, *, timeout_s: float | None = None, max_waiting: int | None = None, **fields: Any) -> Accepted[Any]:
        """A request of `SMALL` with these fields on top."""
        seed = {} if "seeds" in fields else {"seed": 1}
        plan = self.engine.plan(SamplingParams(**{**SMALL, **seed, **fields}))
        finish = self.engine._as_rollout
        return self.batcher.submit(plan, finish, timeout_s=timeout_s, max_waiting=max_waiting)

    def step(self, times: int = 1) -> None:
        """Turns of the loop alone."""
        for _ in range(times):
            self.batcher.stepping.work()

    def begin(self, *fields: dict[str, Any]) -> list[Accepted[Any]]:
        """Requests that have had their conditioning made, and no step."""
        accepted = [self.submit(**own) for own in fields]
        while self.batcher.encoding.work():
            pass
        return accepted

    def finish(self, *accepted: Accepted[Any]) -> list[Any]:
        """Works until these have ended, and gives what they ended in: results or the exception."""
        drive(self.batcher, lambda: all(one.done() for one in accepted))
        return [one.exception() or one.result() for one in accepted]

    def alone(self, **fields: Any) -> list[Any]:
        """What a request gives that runs alone, one sample at a time."""
        other = Hand(self.engine, max_batch_samples=1, max_running_samples=1)
        return other.finish(other.submit(**fields))[0]

    def drain(self) -> None:
        """Works until nothing is left to do."""
        while work_once(self.batcher):
            pass

    def stats(self) -> dict[str, int]:
        """The counters, which balance."""
        stats = self.batcher.load().requests
        assert stats.accepted == stats.completed + stats.failed + stats.pending + stats.running
        return {name: getattr(stats, name) for name in ("accepted", "completed", "failed", "pending", "running")}
