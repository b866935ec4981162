"""What is freed goes back to the system when nothing has come for a while, and once."""

import threading
import time
from pathlib import Path

import pytest
from tests.serving.servers import SMALL, serving, until

from flowroll import heap
from flowroll.engine import Engine
from flowroll.engine.scheduler import scheduler
from flowroll.engine.service import EngineService
from flowroll.serving import app


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who has trimmed the heap, but for servers that other tests have left running in this process."""
    found: list[str] = []
    others = set(threading.enumerate())
    monkeypatch.setattr(scheduler, "_QUIET_S", 0.05)
    monkeypatch.setattr(app, "_TRIM_EVERY_S", 0.05)
    monkeypatch.setattr(scheduler, "trim_heap", lambda: found.append("engine"))
    monkeypatch.setattr(app, "trim_heap", lambda: threading.current_thread() in others or found.append("server"))
    return found


def test_an_engine_trims_its_heap_once_after_its_work(z_image_checkpoint: Path, trims: list[str]) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        for count in (1, 2):
            engine.rollout(**SMALL)
            until(lambda count=count: len(trims) == count)
            time.sleep(0.3)
            assert trims == ["engine"] * count


def test_a_server_trims_its_heap_now_and_then_until_it_ends(z_image_checkpoint: Path, trims: list[str]) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=4) as service, serving(service):
        until(lambda: trims.count("server") > 2)

    def rests() -> bool:
        count = trims.count("server")
        time.sleep(0.2)
        return trims.count("server") == count

    until(rests)


@pytest.mark.skipif(heap._malloc_trim is None, reason="the C library has no malloc_trim")
def test_freed_memory_goes_back() -> None:
    def resident_kib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    # Smaller than what the C library maps by itself, with holes between what stays.
    held = [bytearray(100_000) for _ in range(2000)]
    del held[::2]
    before = resident_kib()
    heap.trim_heap()
    assert before - resident_kib() > 50_000
    assert len(held) == 1000
