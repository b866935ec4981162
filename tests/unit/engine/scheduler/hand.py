"""Schedulers that are driven by hand over a real tiny engine, with a clock of their own."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from flowroll import SamplingParams
from flowroll.engine import BatchLimits, Engine, RequestFuture, RequestPlan
from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.sample import Conditioning, Sample
from flowroll.engine.scheduler import Scheduler
from flowroll.engine.scheduler.stages import Stage

SMALL: dict[str, Any] = {"prompt": "a bowl", "height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 0.0}
ALL: dict[str, Any] = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class HookedExecutor(Executor):
    """An executor of its own over an engine's model, with something to do before encoding and decoding."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine._model, engine._executor._pipeline, engine._peers, engine._offload)
        self.before_encode: Callable[[RequestPlan], object] = lambda plan: None
        self.before_decode: Callable[[Sample], object] = lambda sample: None

    def encode(self, plan: RequestPlan) -> Conditioning:
        self.before_encode(plan)
        return super().encode(plan)

    def decode(self, sample: Sample, beside: Sequence[Sample] = ()) -> Tensor:
        self.before_decode(sample)
        return super().decode(sample, beside)

    @property
    def samples(self) -> list[Sample]:
        """Those that take steps."""
        return list(self._runner._samples.values())


class HandStage(Stage):
    """A stage that does a piece of work when the test says so."""

    is_alive = True

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)

    def work(self) -> bool:
        """Does one piece; False: there was none."""
        if not self._waiting:
            return False
        self._waiting.popleft()()
        return True

    def start(self) -> None:
        raise AssertionError("a test drives this stage")

    def stop(self) -> None:
        """There is no thread."""

    def join(self, timeout_s: float | None) -> bool:
        return True


class Hand:
    """One scheduler and the hand that drives it.

    Args:
        engine: Its model is used; none of its own threads.
        threads: Whether the scheduler has threads of its own after all.
        limits: Fields of `BatchLimits`.
    """

    def __init__(self, engine: Engine, *, threads: bool = False, **limits: int) -> None:
        self.engine = engine
        self.work, self.clock = HookedExecutor(engine), Clock()
        self._encoder, self._decoder = (None, None) if threads else (HandStage(), HandStage())
        stages = {} if threads else {"encoder": self._encoder, "decoder": self._decoder}
        self.scheduler = Scheduler(self.work, BatchLimits(**limits), clock=self.clock, **stages)
        self._has_threads = threads
        self._is_turning = False

    def submit(self, *, timeout_s: float | None = None, max_waiting: int | None = None, **fields: Any) -> RequestFuture[Any]:
        """A request of `SMALL` with these fields on top."""
        seed = {} if "seeds" in fields else {"seed": 1}
        plan = self.engine.plan(SamplingParams(**{**SMALL, **seed, **fields}))
        future = self.scheduler.submit(plan, self.engine._as_rollout, timeout_s=timeout_s, max_waiting=max_waiting)
        self.settle()
        return future

    def cancel(self, future: Future[Any]) -> None:
        self.scheduler.cancel(future)
        self.settle()

    def abort(self, request_id: str | None, **options: Any) -> int:
        count = self.scheduler.abort(request_id, **options)
        self.settle()
        return count.result(0)

    def pause(self, mode: Any) -> None:
        self.scheduler.pause(mode)
        self.settle()

    def resume(self) -> None:
        self.scheduler.resume()
        self.settle()

    def exclusive(self, action: Callable[[], Any], **options: Any) -> Future[Any]:
        done: Future[Any] = self.scheduler.exclusive(action, **options)
        self.settle()
        return done

    def between_steps(self, action: Callable[[], Any], **options: Any) -> Future[Any]:
        done: Future[Any] = self.scheduler.between_steps(action, **options)
        self.settle()
        return done

    def settle(self) -> None:
        """Lets the loop take what came in, unless it has a thread."""
        if not self._has_threads and not self._is_turning:
            self.scheduler.loop.settle()

    def encode(self) -> bool:
        """Encodes for one request; False: there was none."""
        assert self._encoder is not None
        worked = self._encoder.work()
        self.settle()
        return worked

    def step(self, times: int = 1) -> None:
        """Turns of the loop alone."""
        for _ in range(times):
            self._turn()

    def _turn(self) -> bool:
        self._is_turning = True
        try:
            return self.scheduler.loop.turn()
        finally:
            self._is_turning = False

    def decode(self) -> bool:
        """Decodes one sample; False: there was none."""
        assert self._decoder is not None
        worked = self._decoder.work()
        self.settle()
        return worked

    def begin(self, *fields: dict[str, Any]) -> list[RequestFuture[Any]]:
        """Requests that have had their conditioning made, and no step."""
        futures = [self.submit(**own) for own in fields]
        while self.encode():
            pass
        return futures

    def work_once(self) -> bool:
        """One piece of work of the loop and each stage; False: there was none."""
        return any([self.encode(), self._turn(), self.decode()])

    def finish(self, *futures: Future[Any]) -> list[Any]:
        """Works until these have ended, and gives what they ended in: results or the exception."""
        while not all(future.done() for future in futures):
            assert self.work_once() or all(future.done() for future in futures), "nothing is left to do"
        return [future.exception() or future.result() for future in futures]

    def alone(self, **fields: Any) -> list[Any]:
        """What a request gives that runs alone, one sample at a time."""
        other = Hand(self.engine, max_batch_samples=1, max_running_samples=1)
        return other.finish(other.submit(**fields))[0]

    def drain(self) -> None:
        """Works until nothing is left to do."""
        while self.work_once():
            pass

    def stats(self) -> dict[str, int]:
        """The counters, which balance."""
        stats = self.scheduler.load().requests
        assert stats.accepted == stats.completed + stats.failed + stats.pending + stats.running
        return {name: getattr(stats, name) for name in ("accepted", "completed", "failed", "pending", "running")}
