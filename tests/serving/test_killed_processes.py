"""A server, its engine or a rank is killed at a drawn moment: every request ends, answers are whole, and nothing is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.rollouts import assert_same_bits
from tests.serving.servers import Background, ServerProcess, until
from tests.serving.striking import children_of
from tests.weights import REQUEST, with_other

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.errors import ServerConnectionError
from flowroll.types import ALIASES
from flowroll.wire.codec import MSGPACK, decode_rollouts

SEEDS = (3, 4, 5)
# 144 image tokens, which ranks can share.
ASKED = {**REQUEST, "height": 192, "width": 192, "guidance_scale": 4.0}
# The same request, by the names of the wire.
SENT = {ALIASES.get(name, name): value for name, value in ASKED.items()}
DOWN_S = 30.0
Drawn = tuple[str, str, str, str, int]


class StruckServer(ServerProcess):
    """A server that `tests.serving.striking` starts."""

    def __init__(self, log: Path, drawn: Drawn, folder: Path, **options: Any) -> None:
        self._log = log
        layout, moment, target, sig, skipped = drawn
        command = [sys.executable, "-m", "tests.serving.striking", moment, target, sig, str(skipped)]
        sent = json.dumps({"port": 0, "device": "cpu", "layout": layout, "grace_s": 5.0, **options})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with log.open("w") as stderr:
            self.process = subprocess.Popen([*command, sent], stderr=stderr, env=environment)


@pytest.fixture(scope="module")
def folders(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [z_image_checkpoint, with_other(z_image_checkpoint, tmp_path_factory.mktemp("new") / "other")]


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> Iterator[list[dict[int, Rollout]]]:
    found = []
    for folder in folders:
        with Engine(folder, device="cpu") as alone:
            found.append({seed: alone.rollout(**{**ASKED, "seed": seed})[0] for seed in SEEDS})
    yield found


def check(drawn: Drawn, folders: list[Path], expected: list[dict[int, Rollout]], tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir(parents=True)
    with StruckServer(
        tmp_path / "log", drawn, temporary, model=str(folders[0]), weights_roots=list(map(str, folders))
    ) as server:
        with server.client() as client:
            processes = _all_below(server.process.pid)
            requests = [
                Background(lambda seed=seed: _ended(client, "/rollout/generate", {**SENT, "seed": seed})) for seed in SEEDS
            ]
            sent = {"model_path": str(folders[1]), "mode": "abort"}
            update = Background(lambda: _ended(client, "/update_weights_from_disk", sent))
            answers = [request.answer() for request in requests]
            _check_answers(answers, expected)
            assert update.answer().status_code in (200, 422, 500, 503, 599)
            port = client.base_url.port
        _check_server(server, drawn)
        until(lambda: not any(map(_lives, processes)))
    assert os.listdir(temporary) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def _ended(client: httpx.Client, path: str, sent: dict[str, Any]) -> httpx.Response:
    try:
        return client.post(path, json=sent, headers={"accept": f"{MSGPACK}, application/json;q=0.5"})
    except httpx.TransportError:
        return httpx.Response(599)


def _check_answers(answers: list[httpx.Response], expected: list[dict[int, Rollout]]) -> None:
    for answer in answers:
        assert answer.status_code in (200, 500, 503, 599), answer.text
        if answer.status_code == 200:
            try:
                (sample,) = decode_rollouts(bytearray(answer.content), answer.headers["content-type"])
            except ServerConnectionError:
                continue
            same = [torch.equal(sample.image, each[sample.seed].image) for each in expected]
            assert sum(same) == 1
            assert_same_bits(sample, expected[same.index(True)][sample.seed])


def _check_server(server: ServerProcess, drawn: Drawn) -> None:
    """What was killed ends the server, or has; what was asked to end does so in order; otherwise it is asked now."""
    _, _, target, sig, _ = drawn
    is_over = sig == "SIGKILL" or target in ("server", "rank")
    if not is_over:
        # An engine leaves signals to its server.
        time.sleep(0.5)
        assert server.process.poll() is None
        server.stop()
    status = server.process.wait(DOWN_S)
    expected = {"SIGTERM": 0 if target != "rank" else 1, "SIGKILL": -signal.SIGKILL if target == "server" else 1}
    assert status == expected[sig], server.log
    assert "Traceback" not in server.log


def _all_below(pid: int) -> list[int]:
    below = children_of(pid)
    return below + [each for child in below for each in _all_below(child)]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    "drawn",
    [
        ("tp2", "committing", "rank", "SIGKILL", 0),
        pytest.param(("single", "sending", "engine", "SIGKILL", 1), marks=pytest.mark.proof),
        pytest.param(("cfg2", "stepping", "server", "SIGTERM", 1), marks=pytest.mark.proof),
    ],
    ids=lambda drawn: "-".join(map(str, drawn)),
)
def test_what_is_killed_at_any_moment_ends_every_request_and_leaves_nothing(
    drawn: Drawn, folders: list[Path], expected: list[dict[int, Rollout]], tmp_path: Path
) -> None:
    check(drawn, folders, expected, tmp_path)


LAYOUTS = st.sampled_from(["single", "tp2", "cfg2", "tp2xcfg2"])
MOMENTS = st.sampled_from(["encoding", "stepping", "decoding", "sending", "committing"])
SIGNALS = st.sampled_from(["SIGTERM", "SIGKILL"])


@pytest.mark.proof
def test_what_is_killed_at_a_drawn_moment_ends_every_request_and_leaves_nothing(
    folders: list[Path], expected: list[dict[int, Rollout]], tmp_path: Path
) -> None:
    numbers = iter(range(10**6))

    @settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(LAYOUTS, MOMENTS, st.sampled_from(["server", "engine", "rank"]), SIGNALS, st.integers(0, 2))
    def prove(layout: str, moment: str, target: str, sig: str, skipped: int) -> None:
        target = "engine" if layout == "single" and target == "rank" else target
        # One commit, and as many encodings and decodings as requests.
        skipped = 0 if moment == "committing" else skipped
        check((layout, moment, target, sig, skipped), folders, expected, tmp_path / str(next(numbers)))

    prove()
