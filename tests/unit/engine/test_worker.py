"""The worker's promise: every accepted request ends in exactly one result or one error."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.rollouts import assert_same_bits

from flowroll import Rollout, SamplingParams
from flowroll.engine import Engine, RequestPlan
from flowroll.engine.worker import EngineWorker
from flowroll.errors import EngineError, InvalidRequestError, QueueFullError, ShuttingDownError

WAIT_S = 10.0


class ScriptedEngine(Engine):
    """Answers as the test says, and stops at an interrupt as the engine does: at its next step."""

    def __init__(self, script: Callable[[RequestPlan], list[Rollout]]) -> None:
        self._script = script
        self.interrupted = threading.Event()
        self.threads: set[int] = set()

    def rollout(self, params: Any = None, /, **values: Any) -> list[Rollout]:
        self.threads.add(threading.get_ident())
        return self._script(params)

    def interrupt(self) -> None:
        self.interrupted.set()


@pytest.fixture(scope="module")
def engine(qwen_checkpoint: Path) -> Iterator[Engine]:
    with Engine(qwen_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def plan(engine: Engine) -> RequestPlan:
    return engine.plan(SamplingParams(prompt="a cat", seed=1, height=32, width=32, num_inference_steps=2))


class Gate:
    """A request that runs until the test opens it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, plan: RequestPlan) -> list[Rollout]:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        return []


def assert_balanced(worker: EngineWorker) -> None:
    stats = worker.stats()
    assert stats.accepted == stats.completed + stats.failed + stats.pending + stats.running


def test_a_rollout_through_the_worker_has_the_bits_of_the_engine(qwen_checkpoint: Path) -> None:
    params = SamplingParams(prompt="a cat", seed=5, height=32, width=32, num_inference_steps=2, return_dit_trajectory=True)
    with Engine(qwen_checkpoint, device="cpu") as engine:
        expected = engine.rollout(params)
        with EngineWorker(engine, max_queue=1) as worker:
            (through_worker,) = worker.submit(engine.plan(params), "rollout").result(WAIT_S)
            (image,) = worker.submit(
                engine.plan(SamplingParams(prompt="a cat", seed=5, height=32, width=32, num_inference_steps=2, rollout=False)),
                "generate",
            ).result(WAIT_S)
    assert_same_bits(through_worker, expected[0])
    assert image.seed == 5


def test_all_requests_run_on_one_thread_of_the_workers_own(plan: RequestPlan) -> None:
    engine = ScriptedEngine(lambda _: [])
    with EngineWorker(engine, max_queue=8) as worker:
        for future in [worker.submit(plan, "rollout") for _ in range(4)]:
            future.result(WAIT_S)
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_queue_takes_one_running_and_max_queue_waiting_requests_and_refuses_the_next(plan: RequestPlan) -> None:
    gate = Gate()
    with EngineWorker(ScriptedEngine(gate), max_queue=2) as worker:
        futures = [worker.submit(plan, "rollout") for _ in range(3)]
        assert gate.entered.wait(WAIT_S)
        with pytest.raises(QueueFullError, match="2 waiting") as refused:
            worker.submit(plan, "rollout")
        assert refused.value.retry_after_s >= 1
        assert (worker.pending, worker.running) == (2, 1)
        gate.opened.set()
        for future in futures:
            assert future.result(WAIT_S) == []
        assert worker.stats().accepted == 3
        assert_balanced(worker)


def test_retry_after_follows_from_how_long_recent_requests_of_that_size_took(plan: RequestPlan) -> None:
    slow = Gate()
    script: list[Callable[[RequestPlan], list[Rollout]]] = [lambda _: time.sleep(0.4) or [], slow]
    with EngineWorker(ScriptedEngine(lambda plan: script.pop(0)(plan)), max_queue=0) as worker:
        small = _with_seeds(plan, (1,))
        worker.submit(small, "rollout").result(WAIT_S)
        large = _with_seeds(plan, tuple(range(10)))
        running = worker.submit(large, "rollout")
        assert slow.entered.wait(WAIT_S)
        with pytest.raises(QueueFullError) as refused:
            worker.submit(small, "rollout")
        slow.opened.set()
        running.result(WAIT_S)
    # One sample took 0.4 s, so ten take about 4 s.
    assert 3.0 < refused.value.retry_after_s < 8.0


def test_an_unexpected_exception_fails_its_request_alone_and_its_trace_goes_to_the_log(
    plan: RequestPlan, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Any] = [RuntimeError("kernel went away\nwith details"), []]

    def script(_: RequestPlan) -> list[Rollout]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with EngineWorker(ScriptedEngine(script), max_queue=2) as worker, caplog.at_level(logging.ERROR):
        broken, fine = worker.submit(plan, "rollout"), worker.submit(plan, "rollout")
        with pytest.raises(EngineError, match="RuntimeError: kernel went away") as raised:
            broken.result(WAIT_S)
        assert fine.result(WAIT_S) == []
        assert (worker.stats().completed, worker.stats().failed) == (1, 1)
    assert "details" not in raised.value.message
    assert "Traceback" not in raised.value.message
    assert raised.value.__cause__ is None
    (record,) = [record for record in caplog.records if record.name == "flowroll.engine.worker"]
    assert plan.request_id in record.getMessage()
    assert record.exc_info is not None


def test_even_a_request_that_ends_its_thread_leaves_the_worker_running(plan: RequestPlan) -> None:
    outcomes = [SystemExit(3), None]

    def script(_: RequestPlan) -> list[Rollout]:
        if outcome := outcomes.pop(0):
            raise outcome
        return []

    with EngineWorker(ScriptedEngine(script), max_queue=1) as worker:
        with pytest.raises(EngineError, match="SystemExit"):
            worker.submit(plan, "rollout").result(WAIT_S)
        assert worker.submit(plan, "rollout").result(WAIT_S) == []


def test_our_own_errors_pass_through_as_they_are(plan: RequestPlan) -> None:
    error = InvalidRequestError("prompt must be short, got long; cut it.", field="prompt")

    def script(_: RequestPlan) -> list[Rollout]:
        raise error

    with EngineWorker(ScriptedEngine(script), max_queue=1) as worker:
        assert worker.submit(plan, "rollout").exception(WAIT_S) is error


def test_close_interrupts_the_running_request_and_fails_the_waiting_ones(qwen_checkpoint: Path) -> None:
    with Engine(qwen_checkpoint, device="cpu") as engine:
        long = engine.plan(
            SamplingParams(prompt="a cat", height=32, width=32, num_inference_steps=1000, seeds=tuple(range(64)))
        )
        worker = EngineWorker(engine, max_queue=4)
        futures = [worker.submit(long, "rollout") for _ in range(3)]
        _until(lambda: worker.running == 1)
        started = time.monotonic()
        worker.close()
        assert time.monotonic() - started < 5
        for future in futures:
            with pytest.raises(ShuttingDownError):
                future.result(0)
        assert not worker.is_alive
        assert worker.stats().failed == 3
        assert_balanced(worker)
        with pytest.raises(ShuttingDownError):
            worker.submit(long, "rollout")
        worker.close()


def test_close_gives_up_on_an_engine_that_does_not_react_and_its_late_result_is_dropped(plan: RequestPlan) -> None:
    gate = Gate()
    worker = EngineWorker(ScriptedEngine(gate), max_queue=1)
    running = worker.submit(plan, "rollout")
    assert gate.entered.wait(WAIT_S)
    worker.close(timeout_s=0.05)
    with pytest.raises(ShuttingDownError):
        running.result(0)
    assert worker.is_alive
    gate.opened.set()
    _until(lambda: not worker.is_alive)
    assert (worker.stats().completed, worker.stats().failed) == (0, 1)


def test_drain_refuses_new_requests_and_finishes_the_accepted_ones(plan: RequestPlan) -> None:
    gate = Gate()
    with EngineWorker(ScriptedEngine(gate), max_queue=1) as worker:
        futures = [worker.submit(plan, "rollout") for _ in range(2)]
        worker.drain()
        assert not worker.is_accepting
        with pytest.raises(ShuttingDownError):
            worker.submit(plan, "rollout")
        gate.opened.set()
        assert [future.result(WAIT_S) for future in futures] == [[], []]


def test_a_request_cancelled_while_it_waits_never_runs(plan: RequestPlan) -> None:
    gate, ran = Gate(), []

    def script(plan: RequestPlan) -> list[Rollout]:
        ran.append(plan)
        return gate(plan)

    with EngineWorker(ScriptedEngine(script), max_queue=1) as worker:
        first, second = worker.submit(plan, "rollout"), worker.submit(plan, "rollout")
        assert gate.entered.wait(WAIT_S)
        assert not first.cancel()
        assert second.cancel()
        gate.opened.set()
        assert first.result(WAIT_S) == []
        _until(lambda: worker.pending == 0)
        with pytest.raises(CancelledError):
            second.result(0)
        assert len(ran) == 1
        assert (worker.stats().completed, worker.stats().failed) == (1, 1)


def test_counters_balance_while_many_threads_submit_and_the_worker_closes(plan: RequestPlan) -> None:
    def script(_: RequestPlan) -> list[Rollout]:
        time.sleep(0.0005)
        if next(turns) % 3 == 0:
            raise RuntimeError("every third fails")
        return []

    turns = iter(range(100_000))
    worker = EngineWorker(ScriptedEngine(script), max_queue=8)
    logging.getLogger("flowroll.engine.worker").setLevel(logging.CRITICAL)

    def submit_many(_: int) -> list[Future[list[Rollout]]]:
        taken = []
        for _ in range(100):
            try:
                taken.append(worker.submit(plan, "rollout"))
            except (QueueFullError, ShuttingDownError):
                time.sleep(0.0005)
            assert_balanced(worker)
        return taken

    try:
        with ThreadPoolExecutor(4) as pool:
            batches = [pool.submit(submit_many, index) for index in range(4)]
            time.sleep(0.1)
            worker.close()
            futures = [future for batch in batches for future in batch.result(WAIT_S)]
    finally:
        logging.getLogger("flowroll.engine.worker").setLevel(logging.NOTSET)
    stats = worker.stats()
    assert all(future.done() for future in futures)
    assert stats.accepted == len(futures) == stats.completed + stats.failed
    assert sum(future.exception() is None for future in futures) == stats.completed


def test_a_request_counts_as_stuck_only_far_beyond_what_its_size_explains(
    plan: RequestPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    script: list[Callable[[RequestPlan], list[Rollout]]] = [lambda _: time.sleep(0.01) or [], gate]
    now = time.monotonic()
    with EngineWorker(ScriptedEngine(lambda plan: script.pop(0)(plan)), max_queue=1) as worker:
        assert not worker.is_progressing()
        assert worker.seconds_since_success() is None
        worker.submit(plan, "rollout").result(WAIT_S)
        assert worker.seconds_since_success() < WAIT_S  # type: ignore[operator]
        worker.submit(plan, "rollout")
        assert gate.entered.wait(WAIT_S)
        assert worker.is_progressing()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1000.0)
        assert not worker.is_progressing()
        monkeypatch.undo()
        gate.opened.set()


def _with_seeds(plan: RequestPlan, seeds: tuple[int, ...]) -> RequestPlan:
    from dataclasses import replace

    return replace(plan, seeds=seeds)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_to_be_done_between_requests_goes_before_those_that_wait_and_counts_as_none(plan: RequestPlan) -> None:
    gate, done = Gate(), []

    def script(plan: RequestPlan) -> list[Rollout]:
        done.append("request")
        return gate(plan)

    with EngineWorker(ScriptedEngine(script), max_queue=2) as worker:
        requests = [worker.submit(plan, "rollout") for _ in range(2)]
        assert gate.entered.wait(WAIT_S)
        errands = [worker.between_requests(lambda name=name: done.append(name) or name) for name in ("first", "second")]
        assert not any(errand.done() for errand in errands)
        assert (worker.pending, worker.running) == (1, 1)
        gate.opened.set()
        assert [errand.result(WAIT_S) for errand in errands] == ["first", "second"]
        for request in requests:
            request.result(WAIT_S)
        assert done == ["request", "first", "second", "request"]
        assert (worker.stats().accepted, worker.stats().completed) == (2, 2)
        assert_balanced(worker)


def test_an_errand_ends_in_its_error_and_the_thread_goes_on(plan: RequestPlan) -> None:
    refused = InvalidRequestError("module must be one, got two; choose.", field="module")

    def refuse() -> None:
        raise refused

    def fail() -> None:
        raise RuntimeError("no such tensor")

    with EngineWorker(ScriptedEngine(lambda _: []), max_queue=1) as worker:
        assert worker.between_requests(refuse).exception(WAIT_S) is refused
        logging.getLogger("flowroll.engine.worker").setLevel(logging.CRITICAL)
        with pytest.raises(EngineError, match="RuntimeError: no such tensor"):
            worker.between_requests(fail).result(WAIT_S)
        logging.getLogger("flowroll.engine.worker").setLevel(logging.NOTSET)
        assert worker.submit(plan, "rollout").result(WAIT_S) == []
        assert worker.stats().failed == 0


def test_close_ends_errands_that_wait_or_hang(plan: RequestPlan) -> None:
    entered, opened = threading.Event(), threading.Event()
    worker = EngineWorker(ScriptedEngine(lambda _: []), max_queue=1)

    def hang() -> None:
        entered.set()
        assert opened.wait(WAIT_S)

    hanging = worker.between_requests(hang)
    assert entered.wait(WAIT_S)
    assert worker.running == 0 and worker.is_progressing()
    waiting = worker.between_requests(lambda: None)
    worker.close(timeout_s=0.05)
    for errand in (hanging, waiting):
        with pytest.raises(ShuttingDownError):
            errand.result(0)
    with pytest.raises(ShuttingDownError):
        worker.between_requests(lambda: None)
    opened.set()
    _until(lambda: not worker.is_alive)
    assert_balanced(worker)
