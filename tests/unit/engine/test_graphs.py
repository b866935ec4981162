"""An engine that replays recorded forwards has the bits of one that does not, whatever happens to its weights.

On a CPU a tape stands in for CUDA graphs: it runs the same kernels on the same memory (`tests/tape.py`). New weights are copied
over the old ones, as on CUDA.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import policy, saved
from tests.guiding import PicturedEngine
from tests.rollouts import assert_same_bits
from tests.tape import TapeRecorder
from tests.weights import REQUEST, with_other

from flowroll import Rollout
from flowroll.engine import Engine, loading
from flowroll.engine import config as engine_config
from flowroll.engine.config import resolve_graphs
from flowroll.engine.service import EngineService
from flowroll.engine.weights import receiver, shares, staged
from flowroll.errors import InvalidRequestError
from flowroll.exact import cuda_graphs, graphs
from flowroll.families import FAMILIES
from flowroll.serving.metrics import EngineCollector
from flowroll.types import Layout

GROUP: dict[str, Any] = {**REQUEST, "num_inference_steps": 3, "num_outputs_per_prompt": 2}
# Its forwards keep the keys of its text in an object that no recording can be given anew.
NOT_RECORDED = {"qwen_image_21"}


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TapeRecorder]]:
    """The recorders of the engines that a test starts, in their order."""
    recorders: list[TapeRecorder] = []

    def recorder_for(_: Any) -> TapeRecorder:
        recorders.append(TapeRecorder())
        return recorders[-1]

    monkeypatch.setattr(engine_config, "recorder_for", recorder_for)
    for module in (staged, receiver, shares):
        monkeypatch.setattr(module, "is_overwritten", lambda live: True)
    yield recorders
    assert not [fault for one in recorders for fault in one.faults]


def told(engine: Engine) -> tuple[int, int, dict[str, int]]:
    """Recordings, replays, and what was dropped."""
    counts = engine.graph_counts
    return counts.recordings, counts.hits, dict(counts.dropped)


def life(engine: Engine, folder: Path, other: Path, first: Path, second: Path) -> list[Rollout]:
    """Rollouts of an engine whose weights are updated, exchanged, put to sleep and adapted."""
    found = engine.rollout(**GROUP)
    found += engine.rollout(**{**GROUP, "width": 96, "prompt": "a longer text"})
    engine.copy_policy("old")
    engine.update_weights_from_disk(other)
    found += engine.rollout(**GROUP)
    found += engine.rollout(**GROUP, policy="old")
    engine.sleep("disk")
    engine.wake()
    for adapter in (first, second):
        engine.load_lora_adapter(adapter, name="a")
        engine.load_lora_adapter(adapter, name="m", merged=True)
        for name in ("a", "m"):
            found += engine.rollout(**GROUP, lora_name=name)
    engine.update_weights_from_disk(folder)
    found += engine.rollout(**GROUP, lora_name="m")
    engine.unload_lora_adapter("a")
    engine.unload_lora_adapter("m")
    found += engine.rollout(**{**GROUP, "seed": 4})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_over_updates_sleep_policies_and_adapters_every_rollout_has_the_bits_of_eager_forwards(
    family: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_KEEP_MODULATIONS", {"cpu"})
    folder, other = checkpoints[family], with_other(checkpoints[family], tmp_path / "other")
    with PicturedEngine(folder, device="cpu", graphs="off") as engine:
        adapters = [saved(policy(engine._model.transformer, seed), tmp_path / str(seed)) for seed in range(2)]
        expected = life(engine, folder, other, *adapters)
        assert told(engine) == (0, 0, {}) and engine.info.graphs == "off"
    with PicturedEngine(folder, device="cpu") as engine:
        found = life(engine, folder, other, *adapters)
        assert (engine._model.strategy.modulations is None) == (not FAMILIES[family].modulation)
        recordings, hits, dropped = told(engine)
        assert engine.info.graphs == "on" and engine.info.max_graph_bytes == 4 * 2**30
    for one, two in zip(found, expected, strict=True):
        assert_same_bits(one, two)
    if family in NOT_RECORDED:
        assert (recordings, hits, dropped) == (0, 0, {})
    else:
        assert hits > 0 and set(dropped) <= {"asleep", "moved"} and dropped["asleep"] >= 2


def test_recordings_outlive_updates_in_place(z_image_checkpoint: Path, tmp_path: Path, as_on_cuda: list[TapeRecorder]) -> None:
    other = with_other(z_image_checkpoint, tmp_path / "other")
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.rollout(**GROUP)
        engine.update_weights_from_disk(other)
        found = engine.rollout(**GROUP)
        # The first forward of all was eager, and the second one, with which it was recorded.
        assert told(engine) == (1, 10, {}) and as_on_cuda[0].num_recorded == 1
    with Engine(other, device="cpu", graphs="off") as engine:
        for one, two in zip(found, engine.rollout(**GROUP), strict=True):
            assert_same_bits(one, two)


@pytest.mark.parametrize("policy", [None, "old"])
def test_modulations_are_those_of_the_weights_in_place(
    policy: str | None, z_image_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_KEEP_MODULATIONS", {"cpu"})
    other = with_other(z_image_checkpoint, tmp_path / "other")
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.copy_policy("old")
        (expected,) = engine.rollout(**REQUEST)
        modulations = engine._model.strategy.modulations
        assert modulations is not None and len(modulations._kept) == 2
        engine.update_weights_from_disk(other)
        assert not modulations._kept
        (found,) = engine.rollout(**REQUEST)
        if policy is not None:
            (found,) = engine.rollout(**REQUEST, policy=policy)
        engine.sleep()
        assert not modulations._kept
    if policy is None:
        with Engine(other, device="cpu", graphs="off") as engine:
            (expected,) = engine.rollout(**REQUEST)
    assert found.image is not None and torch.equal(torch.as_tensor(found.image), torch.as_tensor(expected.image))
    assert found.log_probs is not None and torch.equal(found.log_probs, torch.as_tensor(expected.log_probs))


def test_weights_that_are_exchanged_end_recordings(
    z_image_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (staged, receiver, shares):
        monkeypatch.setattr(module, "is_overwritten", lambda live: False)
    other = with_other(z_image_checkpoint, tmp_path / "other")
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.rollout(**GROUP)
        engine.update_weights_from_disk(other)
        found = engine.rollout(**GROUP)
        assert told(engine) == (1, 9, {"moved": 1})
    with Engine(other, device="cpu", graphs="off") as engine:
        for one, two in zip(found, engine.rollout(**GROUP), strict=True):
            assert_same_bits(one, two)


def test_sleep_and_a_lack_of_memory_free_what_recordings_take(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        for free in (engine.sleep, engine._executor.free_memory):
            engine.rollout(**GROUP)
            assert engine.graph_counts.num_bytes > 0
            free()
            engine.wake()
            assert engine.graph_counts.num_bytes == 0


def test_recordings_take_no_more_than_their_bound(z_image_checkpoint: Path) -> None:
    texts = ["a", "a much longer prompt that has other tokens " * 8]
    with Engine(z_image_checkpoint, device="cpu", graphs="off") as engine:
        expected = [one for text in texts * 2 for one in engine.rollout(**{**GROUP, "prompt": text})]
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.rollout(**{**GROUP, "prompt": texts[1]})
        bound = engine.graph_counts.num_bytes
    with Engine(z_image_checkpoint, device="cpu", max_graph_bytes=bound) as engine:
        found = []
        for text in texts * 2:
            found += engine.rollout(**{**GROUP, "prompt": text})
            assert 0 < engine.graph_counts.num_bytes <= bound
        assert told(engine)[2] == {"evicted": 3}
    for one, two in zip(found, expected, strict=True):
        assert_same_bits(one, two)


def test_samples_above_the_limit_run_eagerly(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_TOKENS", 16)
    with Engine(z_image_checkpoint, device="cpu") as engine:
        engine.rollout(**{**GROUP, "width": 96})
        assert told(engine) == (0, 0, {}) and engine.graph_counts.misses == 0
        engine.rollout(**GROUP)
        assert told(engine) == (1, 4, {})


def test_log_probs_are_recomputed_beside_recordings(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        (rollout, _) = engine.rollout(**GROUP)
        assert rollout.dit_trajectory is not None and rollout.denoising_env is not None and rollout.log_probs is not None
        states = rollout.dit_trajectory.latents
        score = engine.score(
            latents=states[1], next_latents=states[2], step=1, env=rollout.denoising_env, record=rollout.sampling
        )
        assert score.log_prob == rollout.log_probs[1]


def resolved(graphs: str = "auto", device: str = "cuda", layout: Layout | None = None, compile: bool = False) -> object:
    return resolve_graphs(graphs, 2**30, device=torch.device(device), layout=layout or Layout(), compile=compile)


def test_forwards_are_recorded_on_cuda_with_one_rank_and_eager_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_config, "recorder_for", cuda_graphs.recorder_for)
    assert isinstance(resolved(), graphs.GraphedForwards)
    for off in (
        resolved(device="cpu"),
        resolved("off"),
        resolved(compile=True),
        resolved(layout=Layout(sp=2)),
        resolved(layout=Layout(cfg_parallel=True)),
    ):
        assert off is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resolved("on"), "graphs must be auto or off, got on"),
        (lambda: resolve_graphs("auto", -1, device=torch.device("cpu"), layout=Layout(), compile=False), "max_graph_bytes"),
    ],
)
def test_other_values_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        make()


def test_a_service_tells_what_became_of_forwards(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine, EngineService(engine, max_queue=1) as service:
        engine.rollout(**GROUP)
        assert service.status().graphs == engine.graph_counts
        metrics = EngineCollector()
        metrics.status = service.status()
        found = {
            (sample.name, *sample.labels.values()): sample.value for family in metrics.collect() for sample in family.samples
        }
    assert found["flowroll_graphs",] == 1 and found["flowroll_graph_bytes",] > 0
    assert found["flowroll_graph_forwards_total", "replayed"] == 4 and found["flowroll_graph_forwards_total", "eager"] == 2


def test_the_counts_of_engines_add_up() -> None:
    one = graphs.GraphCounts(recordings=1, num_bytes=10, hits=3, misses=2, dropped={"moved": 1})
    other = graphs.GraphCounts(recordings=2, num_bytes=5, hits=4, misses=1, dropped={"moved": 2, "evicted": 1})
    total = graphs.GraphCounts(recordings=3, num_bytes=15, hits=7, misses=3, dropped={"moved": 3, "evicted": 1})
    assert graphs.GraphCounts.total([one, other]) == total and graphs.GraphCounts.total([]) == graphs.GraphCounts()
