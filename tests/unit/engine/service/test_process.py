"""An engine in a process of its own: the bits of an engine in this one, and an end that both sides notice."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from tests.hooked import WAIT_S
from tests.proofs.doors import assert_same_samples

from flowroll import Rollout, SamplingParams
from flowroll.engine import AdapterLimits, BatchLimits, Engine, Limits
from flowroll.engine.plan import plan_request
from flowroll.engine.service import CallFuture, EngineOptions, EngineProcess, EngineService, EngineStatus, SharedMemory
from flowroll.errors import CheckpointError, EngineError, InvalidRequestError, QueueFullError, RankLostError, ShuttingDownError
from flowroll.types import Layout

SMALL = SamplingParams(
    prompt="a red fox", seed=3, height=64, width=64, num_inference_steps=2, num_outputs_per_prompt=2, return_dit_trajectory=True
)
LONG = SamplingParams(prompt="a red fox", seed=3, height=64, width=64, num_inference_steps=1000, rollout=False)


def options(model: Path, **changes: object) -> EngineOptions:
    chosen = {
        "model": str(model),
        "variant": None,
        "dtype": "auto",
        "device": "cpu",
        "layout": Layout(),
        "limits": Limits(),
        "batching": BatchLimits(),
        "adapter_limits": AdapterLimits(),
        "rank_timeout_s": 30.0,
        "max_queue": 0,
        "log_level": "warning",
        "log_format": "text",
    }
    return EngineOptions(**{**chosen, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def started(z_image_checkpoint: Path) -> Iterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        # Threads shape the bits: one, as the engine that it is compared with.
        patch.setenv("OMP_NUM_THREADS", "1")
        process = EngineProcess(options(z_image_checkpoint))
    with process:
        process.wait()
        yield process


@pytest.fixture
def lone(z_image_checkpoint: Path) -> Iterator[EngineProcess]:
    with EngineProcess(options(z_image_checkpoint)) as process:
        process.wait()
        yield process


def rollouts(process: EngineProcess, params: SamplingParams = SMALL) -> list[Rollout]:
    plan = plan_request(params, process.facts.model, process.facts.info.limits)
    return process.call(EngineService.submit, plan, "rollout").result(WAIT_S)


def test_a_rollout_has_the_bits_of_an_engine_in_this_process(started: EngineProcess, z_image_checkpoint: Path) -> None:
    threads = torch.get_num_threads()
    with Engine(z_image_checkpoint, device="cpu") as engine:
        torch.set_num_threads(1)
        expected = engine.rollout(SMALL)
        torch.set_num_threads(threads)
        assert_same_samples(rollouts(started), expected)
        assert started.call(EngineService.checksums, ["transformer"]).result(WAIT_S) == {
            "transformer": engine.weights_checksum()
        }
        assert started.facts.info.family == engine.info.family and started.facts.pid == started.pid != os.getpid()


def test_a_request_notes_where_its_time_went(started: EngineProcess) -> None:
    plan = plan_request(SMALL, started.facts.model, started.facts.info.limits)
    before_s = time.monotonic()
    future = started.call(EngineService.submit, plan, "rollout")
    future.result(WAIT_S)
    assert [span.stage for span in future.spans] == ["queue", "encode", "queue", "denoise", "decode"]
    assert before_s <= future.spans[0].start_s <= future.spans[-1].end_s <= time.monotonic()


def test_errors_are_those_of_the_engine(started: EngineProcess) -> None:
    with pytest.raises(InvalidRequestError, match="lora_name must be") as caught:
        rollouts(started, SamplingParams(prompt="a", lora_name="none"))
    assert caught.value.field == "lora_name"
    with pytest.raises(InvalidRequestError, match="module must be one of"):
        started.call(EngineService.checksums, ["unet"]).result(WAIT_S)


def test_a_request_whose_caller_goes_leaves_the_engine(started: EngineProcess) -> None:
    plan = plan_request(LONG, started.facts.model, started.facts.info.limits)
    future = started.call(EngineService.submit, plan, "generate")
    _until(lambda: started.call(EngineService.status).result(WAIT_S).load.running_samples == 1)
    others = [started.call(EngineService.submit, plan, "generate") for _ in range(40)]
    _until(lambda: any(isinstance(error, QueueFullError) and error.retry_after_s > 0 for error in map(_error, others)))
    started.call(EngineService.abort, None).result(WAIT_S)
    _until(lambda: started.call(EngineService.status).result(WAIT_S).load.running_samples == 0)
    assert future.exception(WAIT_S) is not None
    again = started.call(EngineService.submit, plan, "generate")
    _until(lambda: started.call(EngineService.status).result(WAIT_S).load.running_samples == 1)
    started.cancel(again)
    assert again.exception(WAIT_S) is not None
    _until(lambda: started.call(EngineService.status).result(WAIT_S).load.running_samples == 0)


def test_a_process_that_is_killed_ends_every_call_with_its_reason_and_tells_the_server(lone: EngineProcess) -> None:
    told: list[Exception] = []
    lone.on_failure(told.append)
    plan = plan_request(LONG, lone.facts.model, lone.facts.info.limits)
    future = lone.call(EngineService.submit, plan, "generate")
    _until(lambda: lone.call(EngineService.status).result(WAIT_S).load.running_samples == 1)
    os.kill(lone.pid, signal.SIGKILL)
    for ended in (future, lone.call(EngineService.status)):
        with pytest.raises(RankLostError, match="the engine's process must live to answer, got its end by SIGKILL"):
            ended.result(WAIT_S)
    _until(lambda: bool(told))
    assert isinstance(lone.failure, RankLostError)


@pytest.mark.slow
def test_a_close_ends_what_runs_and_the_process(lone: EngineProcess) -> None:
    plan = plan_request(LONG, lone.facts.model, lone.facts.info.limits)
    future = lone.call(EngineService.submit, plan, "generate")
    _until(lambda: lone.call(EngineService.status).result(WAIT_S).load.running_samples == 1)
    assert lone.close(timeout_s=WAIT_S)
    assert isinstance(future.exception(WAIT_S), ShuttingDownError)
    assert isinstance(lone.call(EngineService.status).exception(WAIT_S), ShuttingDownError)
    assert lone.failure is None and not Path(f"/proc/{lone.pid}").exists()


def test_a_stopped_process_holds_up_no_caller_and_is_ended_all_the_same(lone: EngineProcess) -> None:
    os.kill(lone.pid, signal.SIGSTOP)
    futures: list[CallFuture[EngineStatus]] = []
    # More than its socket holds.
    caller = threading.Thread(target=lambda: futures.extend(lone.call(EngineService.status) for _ in range(5000)), daemon=True)
    caller.start()
    caller.join(WAIT_S)
    assert not caller.is_alive() and not any(future.done() for future in futures)
    assert not lone.close(timeout_s=0.1)
    assert all(isinstance(future.exception(WAIT_S), ShuttingDownError) for future in futures)


@pytest.mark.slow
def test_a_process_that_is_stopped_ends_every_call_with_its_reason(z_image_checkpoint: Path) -> None:
    with EngineProcess(options(z_image_checkpoint, rank_timeout_s=2.0)) as process:
        process.wait()
        told: list[Exception] = []
        process.on_failure(told.append)
        time.sleep(4.0)  # one that answers lives longer than its patience
        assert process.failure is None
        os.kill(process.pid, signal.SIGSTOP)
        _until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        with pytest.raises(RankLostError, match="must give a sign of life within 2 s, got silence"):
            process.call(EngineService.status).result(WAIT_S)
        _until(lambda: bool(told))
        assert not _lives(process.pid)


def test_a_call_that_cannot_be_sent_ends_in_an_error_and_the_next_is_answered(
    started: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(num_bytes: int) -> SharedMemory:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(SharedMemory, "create", full)
    future = started.call(EngineService.checksums, torch.ones(100_000))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="Too many open files"):
        future.result(WAIT_S)
    assert started.call(EngineService.status).result(WAIT_S).is_alive


def test_a_checkpoint_that_cannot_be_loaded_is_said_so(tmp_path: Path) -> None:
    with EngineProcess(options(tmp_path)) as process, pytest.raises(CheckpointError, match=r"model_index\.json"):
        process.wait()


@pytest.mark.slow
def test_a_file_of_the_working_folder_is_not_taken_for_a_module(
    z_image_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    # Two ranks: both processes are started in the same way.
    with EngineProcess(options(z_image_checkpoint, layout=Layout.parse("sp2"))) as process:
        process.wait()


def test_an_engine_ends_with_the_process_of_its_server(z_image_checkpoint: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.unit.engine.service.test_process import options; "
        "from flowroll.engine.service import EngineProcess; process = EngineProcess(options(Path(sys.argv[1]))); "
        "process.wait(); print(process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(z_image_checkpoint)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        server.kill()
        _until(lambda: not _lives(pid))


def _error(future: Future[object]) -> BaseException | None:
    return future.exception() if future.done() else None


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(condition: object) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
