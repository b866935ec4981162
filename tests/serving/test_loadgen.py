"""The load generator against a real server."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from tests.serving.servers import Gate, HookedEngine, serving, until
from typer.testing import CliRunner

from flowroll.cli.app import app
from flowroll.engine.worker import EngineWorker
from flowroll.loadgen.plan import Load, Mix
from flowroll.loadgen.run import run_load

MIX = Mix(prompts=("a red fox",), sizes=((64, 64),), steps=(1, 2), group_sizes=(1, 2), dynamics=("sde", "ode"))


def test_good_and_rejected_requests_balance(hooked: HookedEngine) -> None:
    hooked.hook = gate = Gate()

    async def run(http: httpx.Client) -> None:
        load = Load(rate=1000.0, num_requests=6)
        running = asyncio.create_task(run_load(str(http.base_url), MIX, load))
        # One runs and one waits until the other four were refused.
        await asyncio.to_thread(until, lambda: 'code="429",route="/rollout/generate"} 4.0' in http.get("/metrics").text)
        gate.opened.set()
        report = await running
        assert (report.sent, report.completed, report.rejected, report.failed, report.rejections) == (6, 2, 4, 0, 4)
        assert report.errors == {"queue_full": 4} and report.per_second["bytes"] > 0

    with EngineWorker(hooked, max_queue=1) as worker, serving(worker) as http:
        asyncio.run(run(http))


@pytest.mark.parametrize(("sizes", "status"), [("64x64", 0), ("64x64,65x64", 1)])
def test_the_command_reports_what_the_server_did(server: httpx.Client, tmp_path: Path, sizes: str, status: int) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    out = tmp_path / "out.json"
    args = f"bench serve --url {server.base_url} --prompts {tmp_path}/prompts.txt --concurrency 2 --num-requests 8 --warmup 0"
    result = CliRunner().invoke(app, [*args.split(), "--steps", "1", "--sizes", sizes, "--json", str(out)])
    assert result.exit_code == status, result.output
    report = json.loads(out.read_text())["report"]
    assert report["sent"] == 8 == report["completed"] + report["failed"]
    assert (report["errors"].keys() == {"invalid_request"}) == bool(status)
    assert "latency p99" in result.output
