"""A server in the fast mode says so in every answer, and shows how far off it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serving.servers import SMALL, ServerProcess, serving

from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.engine.service import EngineService

HEADER = "x-flowroll-exactness"
RECORDED: dict[str, Any] = {"return_denoising_env": True, "return_dit_trajectory": True}
PICTURES = {"prompt": SMALL["prompt"], "seed": 7, "size": "64x64", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def fast(qwen_checkpoint: Path) -> Iterator[httpx.Client]:
    with (
        Engine(qwen_checkpoint, device="cpu", exactness="fast") as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/rollout/generate", SMALL),
        ("POST", "/generate", SMALL),
        ("POST", "/v1/images/generations", PICTURES),
        ("GET", "/server_info", None),
        ("GET", "/metrics", None),
        ("POST", "/generate", {}),
        ("GET", "/nowhere", None),
    ],
)
def test_every_answer_names_the_mode_in_its_head(
    fast: httpx.Client, server: httpx.Client, method: str, path: str, body: Any
) -> None:
    assert fast.request(method, path, json=body).headers[HEADER] == "fast"
    assert HEADER not in server.request(method, path, json=body).headers


@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_clients_read_the_mode_of_samples_pictures_and_scores(
    fast: httpx.Client, server: httpx.Client, wire_format: Any
) -> None:
    for http, mode in ((fast, "fast"), (server, "exact")):
        with Client(str(http.base_url), wire_format=wire_format) as client:
            rollouts = client.rollout("a cat", height=64, width=64, num_inference_steps=2, **RECORDED)
            (image,) = client.generate("a cat", height=64, width=64, num_inference_steps=2)
            scores = client.score(rollouts)
        proof = rollouts[0].provenance
        assert proof is not None and (proof.exactness, image.exactness, scores.exactness) == (mode, mode, mode)
        assert proof.fast_parts == (("batch",) if mode == "fast" else ())


@pytest.mark.parametrize("dialect", ["native", "sglang"])
def test_both_dialects_carry_it(fast: httpx.Client, dialect: str) -> None:
    (sample,) = fast.post("/rollout/generate", json=SMALL, headers={"x-flowroll-dialect": dialect}).json()
    assert sample["provenance"]["exactness"] == "fast" and sample["provenance"]["fast_parts"] == ["batch"]


def test_the_mismatch_is_in_the_info_and_in_the_metrics(fast: httpx.Client, server: httpx.Client) -> None:
    info = fast.get("/server_info").json()
    assert info["exactness"] == "fast" and info["fast"]["parts"] == ["batch"]
    mismatch = info["fast"]["mismatch"]
    assert len(mismatch["max_log_prob_by_step"]) == mismatch["num_steps"] == 4
    metrics = fast.get("/metrics").text
    for of in ("log_prob", "ratio"):
        for statistic in ("max", "mean"):
            line = f'flowroll_fast_mismatch{{of="{of}",statistic="{statistic}"}} '
            (value,) = [one.removeprefix(line) for one in metrics.splitlines() if one.startswith(line)]
            assert float(value) == mismatch[f"{statistic}_{of}"]
    exact = server.get("/server_info").json()
    assert (exact["exactness"], exact["fast"]) == ("exact", None)
    assert "flowroll_fast_mismatch" not in server.get("/metrics").text


def test_a_server_process_starts_fast_and_its_table_shows_the_mismatch(qwen_checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"model": str(qwen_checkpoint), "exactness": "fast", "fast_parts": ("batch", "fp8")}
    with ServerProcess(log, **options) as server, server.client() as http, Client(str(http.base_url)) as client:
        (rollout,) = client.rollout("a cat", height=64, width=64, num_inference_steps=1)
    assert rollout.provenance is not None and rollout.provenance.fast_parts == ("batch", "fp8=float8_e4m3fn")
    text = log.read_text()
    assert "exactness" in text and "parts batch, fp8=float8_e4m3fn, mismatch num_samples 4, num_steps 4" in text
