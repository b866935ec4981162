"""Whatever fails, and whenever: every request ends once, counters balance, weights are the old or the new ones.

And nothing is left of it.
The fault and its moment are drawn. Faults of a process are drawn in `test_killed_processes`.
"""

import dataclasses
import errno
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.rollouts import assert_same_bits
from tests.serving.servers import Background, serving, until
from tests.serving.test_unsent import gauge
from tests.weights import REQUEST, with_other

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.engine.runner import model_runner
from flowroll.engine.service import EngineService
from flowroll.engine.weights import staged, versions
from flowroll.serving.routers import rollout as rollout_router
from flowroll.types import ALIASES
from flowroll.wire import body
from flowroll.wire.codec import MSGPACK, decode_rollouts

FAULTS: dict[str, Callable[[], BaseException]] = {
    "no memory": lambda: MemoryError("drawn"),
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "no input or output": lambda: OSError(errno.EIO, "Input/output error"),
    "the thread's end": lambda: SystemExit(3),
}
SEEDS = (3, 4, 5)
# The same request, by the names of the wire.
SENT = {ALIASES.get(name, name): value for name, value in REQUEST.items()}


@dataclasses.dataclass
class Scene:
    """One server, and what its answers must be.

    Attributes:
        engine: Runs the model.
        service: Of it.
        http: A client of the server.
        folders: The old weights and the new ones.
        expected: What each seed gives with either.
        sums: The checksum of either.
    """

    engine: Engine
    service: EngineService
    http: httpx.Client
    folders: list[Path]
    expected: list[dict[int, Rollout]]
    sums: list[str]

    def rollout(self, seed: int) -> httpx.Response:
        headers = {"accept": MSGPACK}
        try:
            return self.http.post("/rollout/generate", json={**SENT, "seed": seed}, headers=headers)
        except httpx.TransportError:
            # The answer was broken off: an end, too.
            return httpx.Response(599)

    def update(self, which: int) -> httpx.Response:
        sent = {"model_path": str(self.folders[which]), "mode": "abort"}
        return self.http.post("/update_weights_from_disk", json=sent)


def moments(scene: Scene) -> dict[str, tuple[Any, str]]:
    """What is called at each moment."""
    return {
        "encoding": (scene.engine._work, "encode"),
        "stepping": (model_runner, "forward"),
        "decoding": (scene.engine._work, "decode"),
        "answering": (rollout_router, "encode_rollouts"),
        "sending": (body.Segment, "piece"),
        "reading weights": (staged, "_read_tensor"),
        "committing": (versions.VersionState, "after"),
    }


MOMENTS = ("encoding", "stepping", "decoding", "answering", "sending", "reading weights", "committing")
DRAWN = st.tuples(st.sampled_from(MOMENTS), st.sampled_from(sorted(FAULTS)), st.integers(0, 5), st.booleans())


@pytest.fixture(scope="module")
def scene(z_image_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folders = [z_image_checkpoint, with_other(z_image_checkpoint, tmp_path_factory.mktemp("new") / "other")]
    expected, sums = [], []
    for folder in folders:
        with Engine(folder, device="cpu") as alone:
            expected.append({seed: alone.rollout(**{**REQUEST, "seed": seed})[0] for seed in SEEDS})
            sums.append(alone.weights_checksum())
    with (
        pytest.MonkeyPatch.context() as patch,
        Engine(z_image_checkpoint, device="cpu") as engine,
        EngineService(engine, max_queue=8) as service,
        serving(service, weights_roots=tuple(map(str, folders))) as http,
    ):
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield Scene(engine, service, http, folders, expected, sums)


def check(scene: Scene, drawn: tuple[str, str, int, bool]) -> bool:
    """Three requests and an update, with the fault in the middle of them; whether it came to that moment."""
    moment, fault, skipped, is_updated_first = drawn
    if moment in ("answering", "sending") and fault == "the thread's end":
        fault = "no memory"  # of the web framework's threads none is ours to end
    num_files = _held()
    counts = scene.service.status().counts
    which = scene.sums.index(scene.engine.weights_checksum())
    with pytest.MonkeyPatch.context() as patch:
        raised = _inject(patch, *moments(scene)[moment], skipped, FAULTS[fault])
        requests = [] if is_updated_first else _begin(scene)
        updating = Background(lambda: scene.update(1 - which))
        requests += _begin(scene) if is_updated_first else []
        answers = [request.answer() for request in requests]
        update = updating.answer()
    _check_ends(scene, answers, update, which)
    until(lambda: scene.service.status().counts.running == scene.service.status().counts.pending == 0)
    after = scene.service.status()
    assert after.is_alive and after.counts.accepted - counts.accepted == len(SEEDS)
    assert after.counts.accepted == after.counts.completed + after.counts.failed
    until(lambda: scene.service.status().load.running_samples == 0)
    assert os.listdir(tempfile.gettempdir()) == []
    until(lambda: gauge(scene.http, "unsent") == gauge(scene.http, "expected") == 0)
    # A connection of a client, on both ends, may be another one than before.
    until(lambda: _held() <= num_files + 2 * len(SEEDS))
    # Nothing is left that would stop, or change, the next one.
    again = scene.rollout(SEEDS[0])
    assert again.status_code == 200
    _check_bits(scene, again)
    return bool(raised)


def _begin(scene: Scene) -> list[Background]:
    return [Background(lambda seed=seed: scene.rollout(seed)) for seed in SEEDS]


def _inject(
    patch: pytest.MonkeyPatch, owner: Any, name: str, skipped: int, fault: Callable[[], BaseException]
) -> list[BaseException]:
    """Has the call after so many fail, and no other; gives what was raised."""
    original, calls, raised = getattr(owner, name), itertools.count(), []

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == skipped:
            raised.append(fault())
            raise raised[-1]
        return original(*arguments, **options)

    patch.setattr(owner, name, failing)
    return raised


def _check_ends(scene: Scene, answers: list[httpx.Response], update: httpx.Response, which: int) -> None:
    assert len(answers) == len(SEEDS)
    for answer in answers:
        assert answer.status_code in (200, 500, 599), answer.text
        if answer.status_code == 200:
            _check_bits(scene, answer)
        assert "Traceback" not in answer.text
    assert update.status_code in (200, 422, 500), update.text
    # The new weights, all of them, where the trainer was told so, and the old ones, all of them, where it was not.
    now = scene.sums.index(scene.engine.weights_checksum())
    assert now == (1 - which if update.status_code == 200 else which)
    if update.status_code == 200:
        assert update.json()["weight_version"] == scene.engine.weight_version


def _check_bits(scene: Scene, answer: httpx.Response) -> None:
    """The whole sample is one that the old weights give, or one that the new weights give."""
    (sample,) = decode_rollouts(bytearray(answer.content), MSGPACK)
    same = [torch.equal(sample.image, expected[sample.seed].image) for expected in scene.expected]
    assert sum(same) == 1
    assert_same_bits(sample, scene.expected[same.index(True)][sample.seed])


def _held() -> int:
    """Open files of this process, which is the server's, the engine's and the clients'."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "drawn",
    [
        ("encoding", "no memory", 1, False),
        ("stepping", "the thread's end", 1, True),
        ("decoding", "no space", 0, False),
        ("sending", "no input or output", 1, True),
        ("committing", "no memory", 0, True),
    ],
)
def test_a_fault_at_any_moment_leaves_nothing_but_its_own_error(scene: Scene, drawn: tuple[str, str, int, bool]) -> None:
    assert check(scene, drawn)


@pytest.mark.proof
def test_a_fault_that_is_drawn_leaves_nothing_but_its_own_error(scene: Scene) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(DRAWN)
    def prove(drawn: tuple[str, str, int, bool]) -> None:
        check(scene, drawn)

    prove()


@pytest.mark.parametrize("stage", ["flowroll-encode", "flowroll-decode"])
def test_a_stage_whose_thread_dies_between_two_pieces_of_work_keeps_nobody_waiting(
    z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Its requests waited for ever, and so did those that came later."""
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=8) as service:
        inbox, put = engine.scheduler._inbox, engine.scheduler._inbox.put
        refused: list[Any] = []

        def failing(message: Any) -> None:
            # The first message of the stage's thread is a result; the next one tells of its death.
            if threading.current_thread().name == stage and not refused:
                refused.append(message)
                raise MemoryError("no memory for a message")
            put(message)

        monkeypatch.setattr(inbox, "put", failing)
        with serving(service) as http:
            requests = [Background(lambda: http.post("/rollout/generate", json=SENT)) for _ in range(2)]
            for answer in [request.answer() for request in requests]:
                assert answer.status_code == 500 and "no memory for a message" in answer.text
            assert http.post("/rollout/generate", json=SENT).status_code == 500
            assert http.get("/health").status_code == 503
            counts = service.status().counts
            assert (counts.pending, counts.running) == (0, 0) and counts.accepted == counts.failed
