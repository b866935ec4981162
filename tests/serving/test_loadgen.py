"""The load generator against a real server, and against one that knows nothing of flowroll."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from tests.scripted import scripted_server
from tests.serving.servers import WAIT_S, Gate, HookedEngine, serving, until
from typer.testing import CliRunner

from flowroll.cli.app import app
from flowroll.engine.service import EngineService
from flowroll.errors import ServerConnectionError
from flowroll.loadgen import Load, LoadReport, Mix, Outcome, run_load

MIX = Mix(prompts=("a red fox",), sizes=((64, 64),), steps=(1, 2), group_sizes=(1, 2), dynamics=("sde", "ode"))


def test_good_and_rejected_requests_balance(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()

    async def run(http: httpx.Client) -> LoadReport:
        first = asyncio.create_task(run_load(str(http.base_url), MIX, Load(concurrency=1, num_requests=1)))
        # It is being encoded: from now on two wait, one ahead of the loop and one in the queue.
        await asyncio.to_thread(gate.entered.wait, WAIT_S)
        load = Load(rate=1000.0, num_requests=6)
        running = asyncio.create_task(run_load(str(http.base_url), MIX, load))
        await asyncio.to_thread(until, lambda: 'code="429",route="/rollout/generate"} 5.0' in http.get("/metrics").text)
        gate.opened.set()
        assert (await first).completed == 1
        return await running

    with EngineService(hooked, max_queue=1) as service, serving(service) as http:
        report = asyncio.run(run(http))
    assert (report.sent, report.completed, report.rejected, report.failed, report.rejections) == (6, 1, 5, 0, 5)
    assert report.errors == {"429 queue_full": 5} and report.per_second["bytes"] > 0


@pytest.mark.parametrize(("sizes", "status"), [("64x64", 0), ("64x64,65x64", 1)])
@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_the_command_reports_what_the_server_did(
    server: httpx.Client, tmp_path: Path, sizes: str, status: int, wire_format: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red fox"}\n{"prompt": "a blue whale"}\n')
    out = tmp_path / "out.json"
    args = f"bench serve --url {server.base_url} --prompts {tmp_path}/prompts.jsonl --concurrency 2 --num-requests 8 --warmup 0"
    more = ["--steps", "1", "--sizes", sizes, "--group-sizes", "2", "--return-dit-trajectory", "--wire-format", wire_format]
    result = CliRunner().invoke(app, [*args.split(), *more, "--json", str(out)])
    assert result.exit_code == status, result.output
    report = json.loads(out.read_text())["report"]
    assert report["sent"] == 8 == report["completed"] + report["failed"]
    assert report["per_second"]["samples"] == pytest.approx(2 * report["per_second"]["requests"])
    assert (report["errors"].keys() == {"422 invalid_request"}) == bool(status)
    assert {"queue", "encode", "serialise"} <= report["stages_s"].keys()
    assert "latency p99" in result.output and "serialise p99" in result.output


def test_a_server_without_anything_of_flowrolls_is_measured_too() -> None:
    sent: list[dict] = []
    answers = [
        (200, {}, [{"generated_output": 1}]),
        (429, {"Retry-After": "0"}, {"detail": "busy"}),
        (200, {}, [{"generated_output": 1}]),
        (200, {}, []),
        (500, {}, {"detail": "broken"}),
        (200, {"Content-Length": "1000"}, [{"generated_output": 1}]),
    ]
    with scripted_server(answers, sent) as url:
        load = Load(concurrency=1, num_requests=5, retries=1)
        mix = Mix(prompts=("a",), sizes=((64, 64),), steps=(3,), group_sizes=(1,), dynamics=("sde",))
        report = asyncio.run(run_load(url, mix, load))
    assert (report.completed, report.rejected, report.failed, report.rejections) == (2, 0, 3, 1)
    assert report.errors == {"200 wrong_answer": 1, "500 unknown": 1, "200 RemoteProtocolError": 1}
    assert report.stages_s == {} and report.latency_s.keys() == {"p50", "p90", "p99", "max"}
    assert report.per_second["steps"] == pytest.approx(3 * report.per_second["samples"])
    # Nothing is left to what a server takes for granted.
    assert sent[0].keys() == {
        *("prompt", "width", "height", "num_inference_steps", "num_outputs_per_prompt", "rollout_sde_type", "seed"),
        "rollout_debug_mode",
    }
    # A request that was refused is sent again as it was.
    assert sent[1] == sent[2]


def test_what_is_due_while_too_much_is_in_flight_is_not_sent(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()
    with EngineService(hooked, max_queue=4) as service, serving(service) as http:
        ended: list[str] = []

        def on_outcome(outcome: Outcome) -> None:
            ended.append(outcome.code)
            if len(ended) == 3:
                gate.opened.set()

        load = Load(rate=1000.0, num_requests=4, max_in_flight=1)
        report = asyncio.run(run_load(str(http.base_url), MIX, load, on_outcome=on_outcome))
    assert ended == ["not_sent"] * 3 + ["ok"]
    assert report.errors == {"no answer not_sent": 3} and report.failed == 3


def test_a_warm_up_that_fails_ends_the_run() -> None:
    with (
        scripted_server([(404, {}, {})], []) as url,
        pytest.raises(ServerConnectionError, match=r"must answer the warm-up, got 404 unknown"),
    ):
        asyncio.run(run_load(url, MIX, Load(concurrency=1, num_requests=1, warmup=1)))
