"""The service's promise: every accepted request ends in exactly one result or one error."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.hooked import WAIT_S, Gate, HookedEngine
from tests.rollouts import assert_same_bits

from flowroll import Rollout, SamplingParams
from flowroll.engine import Engine, RequestPlan
from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.engine.service.service import blocking
from flowroll.errors import EngineError, InvalidRequestError, QueueFullError, ShuttingDownError

QUEUE = "flowroll.engine.scheduler.queue"


@pytest.fixture
def engine(qwen_checkpoint: Path) -> Iterator[HookedEngine]:
    with HookedEngine(qwen_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture
def plan(engine: Engine) -> RequestPlan:
    return engine.plan(SamplingParams(prompt="a cat", seed=1, height=32, width=32, num_inference_steps=2))


def test_an_error_that_is_none_of_ours_becomes_one_so_that_another_process_can_make_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Exception):
        """Cannot be made of its text alone, as `pickle` would."""

        def __init__(self, one: str, other: str) -> None:
            super().__init__(f"{one}{other}")

    def leave_groups(service: EngineService) -> None:
        raise Odd("a", "b")

    monkeypatch.setattr(EngineService, "leave_groups", blocking(leave_groups))
    with EngineService(engine, max_queue=1) as service:
        error = InProcessEngine(service).call(leave_groups).exception(WAIT_S)
        assert type(error) is EngineError and "Odd: ab" in error.message


def assert_balanced(service: EngineService) -> None:
    stats = service.status().counts
    assert stats.accepted == stats.completed + stats.failed + stats.pending + stats.running


def test_a_rollout_through_the_worker_has_the_bits_of_the_engine(engine: Engine) -> None:
    params = SamplingParams(prompt="a cat", seed=5, height=32, width=32, num_inference_steps=2, return_dit_trajectory=True)
    expected = engine.rollout(params)
    with EngineService(engine, max_queue=1) as service:
        (through_worker,) = service.submit(engine.plan(params), "rollout").result(WAIT_S)
        plain = SamplingParams(prompt="a cat", seed=5, height=32, width=32, num_inference_steps=2, rollout=False)
        (image,) = service.submit(engine.plan(plain), "generate").result(WAIT_S)
    assert_same_bits(through_worker, expected[0])
    assert image.seed == 5


def test_requests_run_on_threads_of_the_engines_own(engine: HookedEngine, plan: RequestPlan) -> None:
    threads: set[int] = set()
    engine.hook = lambda plan: threads.add(threading.get_ident())
    with EngineService(engine, max_queue=8) as service:
        for future in [service.submit(plan, "rollout") for _ in range(4)]:
            future.result(WAIT_S)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_queue_takes_what_can_run_and_max_queue_waiting_requests_and_refuses_the_next(
    engine: HookedEngine, plan: RequestPlan
) -> None:
    engine.hook = gate = Gate()
    with EngineService(engine, max_queue=2) as service:
        futures = [service.submit(plan, "rollout") for _ in range(3)]
        with pytest.raises(QueueFullError, match="2 waiting") as refused:
            service.submit(plan, "rollout")
        assert refused.value.retry_after_s >= 1
        _until(lambda: (service.status().counts.pending, service.status().counts.running) == (2, 1))
        with pytest.raises(QueueFullError, match="2 waiting"):
            service.submit(plan, "rollout")
        gate.opened.set()
        for future in futures:
            assert len(future.result(WAIT_S)) == 1
        assert service.status().counts.accepted == 3
        assert_balanced(service)


def test_an_unexpected_exception_fails_its_request_alone_and_its_trace_goes_to_the_log(
    engine: HookedEngine, plan: RequestPlan, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[BaseException | None] = [RuntimeError("kernel went away\nwith details"), None]

    def script(_: RequestPlan) -> None:
        if outcome := outcomes.pop(0):
            raise outcome

    engine.hook = script
    with EngineService(engine, max_queue=2) as service, caplog.at_level(logging.ERROR):
        broken, fine = service.submit(plan, "rollout"), service.submit(plan, "rollout")
        with pytest.raises(EngineError, match="RuntimeError: kernel went away") as raised:
            broken.result(WAIT_S)
        assert len(fine.result(WAIT_S)) == 1
        assert (service.status().counts.completed, service.status().counts.failed) == (1, 1)
    assert "details" not in raised.value.message
    assert "Traceback" not in raised.value.message
    assert raised.value.__cause__ is None
    (record,) = [record for record in caplog.records if record.name == QUEUE]
    assert record.request_id == plan.request_id
    assert record.exc_info is not None


def test_even_a_request_that_ends_its_thread_leaves_the_worker_running(engine: HookedEngine, plan: RequestPlan) -> None:
    outcomes = [SystemExit(3), None]

    def script(_: RequestPlan) -> None:
        if outcome := outcomes.pop(0):
            raise outcome

    engine.hook = script
    with EngineService(engine, max_queue=1) as service:
        with pytest.raises(EngineError, match="SystemExit"):
            service.submit(plan, "rollout").result(WAIT_S)
        assert len(service.submit(plan, "rollout").result(WAIT_S)) == 1


def test_our_own_errors_pass_through_as_they_are(engine: HookedEngine, plan: RequestPlan) -> None:
    error = InvalidRequestError("prompt must be short, got long; cut it.", field="prompt")

    def script(_: RequestPlan) -> None:
        raise error

    engine.hook = script
    with EngineService(engine, max_queue=1) as service:
        assert service.submit(plan, "rollout").exception(WAIT_S) is error


def test_close_interrupts_running_requests_and_fails_the_waiting_ones(engine: Engine) -> None:
    long = engine.plan(SamplingParams(prompt="a cat", height=32, width=32, num_inference_steps=1000, seeds=tuple(range(64))))
    service = EngineService(engine, max_queue=4)
    futures = [service.submit(long, "rollout") for _ in range(3)]
    _until(lambda: service.status().load.running_samples > 0)
    assert service.close()
    for future in futures:
        with pytest.raises(ShuttingDownError):
            future.result(0)
    assert not service.status().is_alive
    assert service.status().counts.failed == 3
    assert_balanced(service)
    with pytest.raises(ShuttingDownError):
        service.submit(long, "rollout")
    assert service.close()


def test_close_gives_up_on_an_engine_that_does_not_react_and_its_late_result_is_dropped(
    engine: HookedEngine, plan: RequestPlan
) -> None:
    engine.hook = gate = Gate()
    service = EngineService(engine, max_queue=1)
    running = service.submit(plan, "rollout")
    assert gate.entered.wait(WAIT_S)
    assert not service.close(timeout_s=0.05)
    with pytest.raises(ShuttingDownError):
        running.result(0)
    gate.opened.set()
    assert service.close(timeout_s=WAIT_S)
    assert (service.status().counts.completed, service.status().counts.failed) == (0, 1)


def test_drain_refuses_new_requests_and_finishes_the_accepted_ones(engine: HookedEngine, plan: RequestPlan) -> None:
    engine.hook = gate = Gate()
    with EngineService(engine, max_queue=1) as service:
        futures = [service.submit(plan, "rollout") for _ in range(2)]
        service.drain()
        assert not service.status().is_accepting
        with pytest.raises(ShuttingDownError):
            service.submit(plan, "rollout")
        gate.opened.set()
        assert [len(future.result(WAIT_S)) for future in futures] == [1, 1]


def test_a_request_cancelled_while_it_waits_never_runs(engine: HookedEngine, plan: RequestPlan) -> None:
    gate, ran = Gate(), []

    def script(plan: RequestPlan) -> None:
        ran.append(plan)
        gate(plan)

    engine.hook = script
    with EngineService(engine, max_queue=1) as service:
        first, second = service.submit(plan, "rollout"), service.submit(plan, "rollout")
        assert gate.entered.wait(WAIT_S)
        assert not first.cancel()
        assert second.cancel()
        gate.opened.set()
        assert len(first.result(WAIT_S)) == 1
        _until(lambda: service.status().counts.pending == 0)
        with pytest.raises(CancelledError):
            second.result(0)
        assert len(ran) == 1
        assert (service.status().counts.completed, service.status().counts.failed) == (1, 1)


def test_counters_balance_while_many_threads_submit_and_the_worker_closes(engine: HookedEngine, plan: RequestPlan) -> None:
    turns = iter(range(100_000))

    def script(_: RequestPlan) -> None:
        if next(turns) % 3 == 0:
            raise RuntimeError("every third fails")

    engine.hook = script
    service = EngineService(engine, max_queue=8)
    logging.getLogger(QUEUE).setLevel(logging.CRITICAL)

    def submit_many(_: int) -> list[Future[list[Rollout]]]:
        taken: list[Future[list[Rollout]]] = []
        for _ in range(100):
            try:
                taken.append(service.submit(plan, "rollout"))
            except (QueueFullError, ShuttingDownError):
                time.sleep(0.0005)
            assert_balanced(service)
        return taken

    try:
        with ThreadPoolExecutor(4) as pool:
            batches = [pool.submit(submit_many, index) for index in range(4)]
            time.sleep(0.2)
            service.close()
            futures = [future for batch in batches for future in batch.result(WAIT_S)]
    finally:
        logging.getLogger(QUEUE).setLevel(logging.NOTSET)
    stats = service.status().counts
    assert all(future.done() for future in futures)
    assert stats.accepted == len(futures) == stats.completed + stats.failed
    assert sum(future.exception() is None for future in futures) == stats.completed


def test_what_is_to_be_done_between_requests_goes_before_those_that_wait_and_counts_as_none(
    engine: HookedEngine, plan: RequestPlan
) -> None:
    gate, done = Gate(), []

    def script(plan: RequestPlan) -> None:
        done.append("request")
        gate(plan)

    engine.hook = script
    with EngineService(engine, max_queue=2) as service:
        requests = [service.submit(plan, "rollout") for _ in range(2)]
        assert gate.entered.wait(WAIT_S)
        exclusive = service.engine.scheduler.exclusive
        tasks = [exclusive(lambda name=name: done.append(name) or name) for name in ("first", "second")]
        assert not any(task.done() for task in tasks)
        _until(lambda: (service.status().counts.pending, service.status().counts.running) == (1, 1))
        gate.opened.set()
        assert [task.result(WAIT_S) for task in tasks] == ["first", "second"]
        for request in requests:
            request.result(WAIT_S)
        assert done == ["request", "first", "second", "request"]
        assert (service.status().counts.accepted, service.status().counts.completed) == (2, 2)
        assert_balanced(service)


def test_what_fails_in_a_call_ends_that_call_and_the_engine_goes_on(
    engine: HookedEngine, plan: RequestPlan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(modules: list[str]) -> None:
        raise RuntimeError("no such tensor")

    with EngineService(engine, max_queue=1) as service:
        client = InProcessEngine(service)
        with pytest.raises(InvalidRequestError, match="module must be one of"):
            client.call(EngineService.checksums, ["unet"]).result(WAIT_S)
        with monkeypatch.context() as patch, pytest.raises(EngineError, match="RuntimeError: no such tensor"):
            patch.setattr(engine._weights, "checksums", fail)
            client.call(EngineService.checksums, ["vae"]).result(WAIT_S)
        assert len(service.submit(plan, "rollout").result(WAIT_S)) == 1
        assert service.status().counts.failed == 0
    assert "no such tensor" in caplog.text


def test_a_change_of_the_model_is_refused_once_the_service_drains(engine: HookedEngine) -> None:
    with EngineService(engine, max_queue=1) as service:
        client = InProcessEngine(service)
        service.drain()
        for call in (
            client.call(EngineService.sleep, "offload"),
            client.call(EngineService.copy_policy, "old", source=None, mode="drain"),
            client.call(EngineService.unload_adapter, "old", weight_version=None, mode="drain"),
        ):
            with pytest.raises(ShuttingDownError):
                call.result(WAIT_S)
        assert not engine.is_asleep and not engine.policies()
        client.call(EngineService.leave_groups).result(WAIT_S)


def test_a_change_that_fails_in_an_odd_way_is_an_error_of_the_engine_for_who_awaits_it(
    engine: HookedEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, **options: object) -> None:
        raise RuntimeError("no such address")

    async def ask(client: InProcessEngine) -> object:
        await client.call(EngineService.status)
        return await client.call(EngineService.copy_policy, "old", source=None, mode="drain")

    monkeypatch.setattr(engine, "copy_policy", fail)
    with EngineService(engine, max_queue=1) as service:
        with pytest.raises(EngineError, match="RuntimeError: no such address") as raised:
            asyncio.run(ask(InProcessEngine(service)))
        assert raised.value.__cause__ is None
    assert caplog.text.count("a call of the engine failed") == 1


def test_close_ends_calls_that_wait_or_hang(engine: HookedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, opened = threading.Event(), threading.Event()
    service = EngineService(engine, max_queue=1)
    client = InProcessEngine(service)

    def hang(modules: list[str]) -> dict[str, str]:
        entered.set()
        assert opened.wait(WAIT_S)
        return {}

    monkeypatch.setattr(engine._weights, "checksums", hang)
    hanging = client.call(EngineService.checksums, ["vae"])
    assert entered.wait(WAIT_S)
    assert service.status().counts.running == 0 and engine.scheduler.is_progressing()
    waiting = client.call(EngineService.checksums, ["vae"])
    assert not service.close(timeout_s=0.05)
    for call in (hanging, waiting, client.call(EngineService.checksums, ["vae"])):
        with pytest.raises(ShuttingDownError):
            call.result(WAIT_S)
    opened.set()
    assert service.close(timeout_s=WAIT_S)
    assert_balanced(service)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
