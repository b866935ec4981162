"""How the ranks of an engine come up, what happens when one is lost, and that none is ever left behind."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.serving.servers import LONG, SMALL, Background, ServerProcess, error_of, until

from flowroll.engine import Engine, Limits, follow
from flowroll.engine.runner import model_runner, rank_group
from flowroll.errors import CheckpointError, EngineError, FlowrollError, InvalidRequestError, RankLostError, ShuttingDownError
from flowroll.parallel import processes
from flowroll.types import Layout

SP2 = Layout(sp=2)
# 144 image tokens: two ranks share them.
REQUEST: dict[str, Any] = {"prompt": "a cat", "seed": 3, "height": 192, "width": 192, "num_inference_steps": 2}
BODY = {**LONG, "height": 192, "width": 192}
DOWN_S = 10.0
ORPHAN_S = 2.0


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the suite itself run under torchrun, its engines start their own ranks all the same."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_process(server: ServerProcess) -> int:
    """The process of rank 1, which rank 0, the server's engine, has started."""
    (engine,) = children_of(server.process.pid)
    (pid,) = children_of(engine)
    return pid


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("killed", ["engine", pytest.param("server", marks=pytest.mark.slow)])
def test_orphans_die_while_they_load(killed: str, z_image_checkpoint: Path, tmp_path: Path) -> None:
    """They are in the middle of imports of seconds, or of reading weights."""
    with ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), layout="sp2") as server:
        until(lambda: bool(children_of(server.process.pid)))
        (engine,) = children_of(server.process.pid)
        until(lambda: bool(children_of(engine)))
        rank = rank_process(server)
        os.kill(engine if killed == "engine" else server.process.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        until(lambda: is_gone(rank) and is_gone(engine))
        assert time.monotonic() - killed_s < ORPHAN_S


def running(client: httpx.Client, count: int) -> bool:
    queue = client.get("/server_info").json()["queue"]
    return bool(queue["running"] + queue["pending"] == count)


def two_requests(client: httpx.Client) -> list[Background]:
    """One that runs and one that waits."""
    requests = [Background(lambda: client.post("/rollout/generate", json=BODY)) for _ in range(2)]
    until(lambda: running(client, 2))
    time.sleep(0.3)
    return requests


def test_an_error_in_the_middle_of_a_step_takes_the_engine_down(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[FlowrollError] = []
    with Engine(z_image_checkpoint, device="cpu", layout=SP2, rank_timeout_s=30.0) as engine:
        engine.on_failure(heard.append)
        (pid,) = engine.rank_pids.values()

        def break_down(*_: object) -> None:
            raise MemoryError("no memory left")

        monkeypatch.setattr(model_runner, "forward", break_down)
        with pytest.raises(RankLostError, match="MemoryError: no memory left"):
            engine.rollout(**REQUEST)
        monkeypatch.undo()
        assert heard == [engine.failure]
        with pytest.raises(RankLostError, match="no memory left"):
            engine.rollout(**REQUEST)
        until(lambda: is_gone(pid))


def test_a_killed_rank_ends_the_running_and_the_waiting_request_with_its_reason_and_takes_the_server_down(
    z_image_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), layout="sp2") as server,
        server.client() as client,
    ):
        pid = rank_process(server)
        requests = two_requests(client)
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        for request in requests:
            answer = request.answer()
            assert (answer.status_code, error_of(answer)["code"]) == (503, "rank_lost")
            assert "rank 1 must live as long as its engine, got its end by signal 9" in error_of(answer)["message"]
        assert server.process.wait(DOWN_S) == 1
        assert time.monotonic() - killed_s < DOWN_S
    assert [line for line in server.log.splitlines() if line.startswith("Error: rank 1 must live")]
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_a_rank_that_dies_while_nothing_runs_takes_the_server_down_too(z_image_checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), layout="sp2") as server, server.client():
        os.kill(rank_process(server), signal.SIGTERM)
        assert server.process.wait(DOWN_S) == 1
    assert "got its end by signal 15" in server.log


@pytest.mark.slow
def test_a_rank_that_stalls_ends_the_request_after_the_timeout_and_nothing_is_left(
    z_image_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), layout="sp2", rank_timeout_s=4.0) as server,
        server.client() as client,
    ):
        pid = rank_process(server)
        requests = two_requests(client)
        os.kill(pid, signal.SIGSTOP)
        for request in requests:
            answer = request.answer()
            assert (answer.status_code, error_of(answer)["code"]) == (503, "rank_lost")
            assert "within 4 s" in error_of(answer)["message"]
        assert server.process.wait(DOWN_S) == 1
        assert is_gone(pid)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["the server", "its engine"])
def test_no_rank_outlives_a_killed_rank_0_or_server(z_image_checkpoint: Path, tmp_path: Path, which: str) -> None:
    with (
        ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), layout="sp2") as server,
        server.client() as client,
    ):
        pid, (engine,) = rank_process(server), children_of(server.process.pid)
        request = Background(lambda: _swallow(client))
        until(lambda: running(client, 1))
        os.kill(server.process.pid if which == "the server" else engine, signal.SIGKILL)
        until(lambda: is_gone(pid) and is_gone(engine))
        request._thread.join(DOWN_S)
        server.process.wait(DOWN_S)
    assert which == "the server" or "Error: the engine's process must live to answer, got its end by SIGKILL" in server.log


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_all_ranks_in_order(z_image_checkpoint: Path, tmp_path: Path, sig: signal.Signals) -> None:
    with (
        ServerProcess(tmp_path / "log", model=str(z_image_checkpoint), layout="cfg2", grace_s=0.5) as server,
        server.client() as client,
    ):
        pid = rank_process(server)
        info = client.get("/server_info").json()
        assert info["layout"] == {"cfg_parallel": True, "sp": 1, "tp": 1}
        requests = two_requests(client)
        server.stop(sig)
        stopped_s = time.monotonic()
        answers = [request.answer() for request in requests]
        assert [error_of(answer)["code"] for answer in answers] == ["shutting_down", "shutting_down"]
        assert server.process.wait(DOWN_S) == 0
        assert time.monotonic() - stopped_s < DOWN_S
        assert is_gone(pid)
    assert server.log.rstrip().endswith("stopped") and "Traceback" not in server.log


@pytest.mark.slow
def test_a_rank_that_stalls_alive_in_a_product_of_axes_is_noticed_in_time(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its process gives signs of life; only the collectives of one axis wait for it.
    stalling = (
        "import time; from flowroll.parallel.mesh import Mesh; gather = Mesh.gather\n"
        "def gather_or_stall(self, *a, **k): return time.sleep(600) if self.rank == 3 else gather(self, *a, **k)\n"
        "Mesh.gather = gather_or_stall\n"
        "from flowroll.engine.runner.__main__ import main; main()"
    )
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", stalling))
    layout = Layout(sp=2, cfg_parallel=True)
    with Engine(z_image_checkpoint, device="cpu", layout=layout, rank_timeout_s=3.0) as engine:
        pids = list(engine.rank_pids.values())
        started_s = time.monotonic()
        with pytest.raises(RankLostError, match=r"within 3 s|must live|Timed out waiting 3000ms"):
            engine.rollout(**REQUEST)
        assert time.monotonic() - started_s < 20.0
    assert len(pids) == 3 and all(map(is_gone, pids))


def test_a_rank_that_cannot_load_its_part_says_why(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = (
        "import flowroll.engine.runner.worker as worker; from flowroll.errors import CheckpointError\n"
        "def load(*_): raise CheckpointError('the file must be whole, got half; copy it again.')\n"
        "worker.load_transformer = load\n"
        "from flowroll.engine.runner.__main__ import main; main()"
    )
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", failing))
    with pytest.raises((CheckpointError, RankLostError), match="rank 1"):
        Engine(z_image_checkpoint, device="cpu", layout=SP2)
    assert not torch.distributed.is_initialized()


def test_a_rank_that_cannot_start_is_an_error_at_once(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", "import sys; sys.exit(3)"))
    with pytest.raises(RankLostError, match="rank 1 must live as long as its engine, got its end with status 3"):
        Engine(z_image_checkpoint, device="cpu", layout=SP2)
    assert not torch.distributed.is_initialized()


def test_a_process_group_of_somebody_else_is_left_alone(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(EngineError, match=r"must be the only user of torch\.distributed"):
        Engine(z_image_checkpoint, device="cpu", layout=SP2)


@pytest.mark.parametrize(
    ("layout", "limits", "field", "words"),
    [
        (Layout(tp=3), Limits(), "tp", r"columns of every sharded linear, got 3 .*; use 1 or 2"),
        (SP2, Limits(max_pixels=144 * 112), "sp", "leave 64 of the largest image's 63 tokens to a rank, got 2; use 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_a_process_is_started(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, limits: Limits, field: str, words: str
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(rank_group, "RankProcesses", start)
    with pytest.raises(InvalidRequestError, match=words) as refused:
        Engine(z_image_checkpoint, device="cpu", layout=layout, limits=limits)
    assert refused.value.field == field


def test_bfloat16_on_several_ranks_of_a_cpu_with_amx_is_refused(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products of some rows, or of some columns, have other bits than those of the whole (oneDNN in torch 2.13)."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(rank_group, "RankProcesses", start)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    with pytest.raises(InvalidRequestError, match="set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16") as refused:
        Engine(z_image_checkpoint, device="cpu", dtype="bfloat16", layout=SP2)
    assert refused.value.field == "dtype"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16")
    with pytest.raises(AssertionError, match="a process was started"):
        Engine(z_image_checkpoint, device="cpu", dtype="bfloat16", layout=SP2)


def test_more_ranks_than_gpus_are_refused(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidRequestError, match="at most the 1 GPUs from cuda:0 on, got 2"):
        Engine(z_image_checkpoint, device="cuda:0", layout=SP2)


def test_a_torchrun_job_of_another_size_is_refused(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequestError, match=r"processes that torchrun started, got 2 \(sp2\) for 3"):
        Engine(z_image_checkpoint, device="cpu", layout=SP2)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InvalidRequestError, match=r"got 2 \(sp2\) for 3"):
        follow(z_image_checkpoint, device="cpu", layout=SP2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidRequestError, match=r"opened on rank 0 alone, got rank 1; call flowroll\.engine\.follow"):
        Engine(z_image_checkpoint, device="cpu", layout=SP2)


def test_following_without_torchrun_is_refused(z_image_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequestError, match="rank above 0 of a torchrun job"):
        follow(z_image_checkpoint, device="cpu", layout=SP2)


@pytest.mark.slow
def test_a_closed_engine_of_several_ranks_answers_as_a_closed_engine(z_image_checkpoint: Path) -> None:
    engine = Engine(z_image_checkpoint, device="cpu", layout=SP2)
    (pid,) = engine.rank_pids.values()
    engine.close()
    assert is_gone(pid) and not torch.distributed.is_initialized()
    with pytest.raises(ShuttingDownError):
        engine.rollout(**REQUEST)
    engine.close()


def _swallow(client: httpx.Client) -> httpx.Response:
    try:
        return client.post("/rollout/generate", json={**SMALL, **BODY})
    except httpx.TransportError:
        return httpx.Response(599)
