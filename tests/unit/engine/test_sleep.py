"""Sleep and wake: the memory of the weights is given away and taken again, and nothing else changes."""

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from tests.adapters import policy, saved
from tests.hooked import WAIT_S, Gate, HookedEngine
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, with_other

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.engine.weights import offload
from flowroll.engine.weights import staged as weights
from flowroll.errors import AsleepError, EngineError, WeightsRejectedError

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODULES = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module", params=PLACES)
def engine(request: pytest.FixtureRequest, z_image_checkpoint: Path, tmp_path_factory: Any) -> Iterator[HookedEngine]:
    """With weights that are in no file of its checkpoint any more, and adapters."""
    folder = tmp_path_factory.mktemp("sleep")
    with HookedEngine(z_image_checkpoint, device=request.param) as engine:
        engine.update_weights_from_disk(with_other(z_image_checkpoint, folder / "other"))
        for seed, name in enumerate("am"):
            saved(policy(engine._model.transformer, seed), folder / name)
            engine.load_lora_adapter(folder / name, name=name, merged=name == "m")
        yield engine


State: TypeAlias = tuple[list[Rollout], list[str], str, list[Any]]


def _state(engine: Engine) -> State:
    rollouts = [engine.rollout(**REQUEST, lora_name=name)[0] for name in (None, "a", "m")]
    # How every weight lies: bits depend on it.
    places = [(one.requires_grad, one.stride(), one.data_ptr() % 64) for one in rest_of(engine)]
    return rollouts, [engine.weights_checksum(module) for module in MODULES], engine.weight_version, places


def assert_same_state(engine: Engine, before: State) -> None:
    rollouts, *said = _state(engine)
    for rollout, other in zip(rollouts, before[0], strict=True):
        assert_same_bits(rollout, other)
    assert tuple(said) == before[1:]


def rest_of(engine: Engine) -> list[torch.Tensor]:
    return list(engine._offload._parameters())


@pytest.mark.parametrize("mode", ["offload", "disk"])
def test_after_waking_every_bit_version_and_checksum_is_as_before(engine: HookedEngine, mode: Any, tmp_path: Path) -> None:
    before = _state(engine)
    parameters = rest_of(engine)
    expected = sum({id(parameter): parameter.nbytes for parameter in parameters}.values())
    moves = mode == "disk" or engine.info.device != "cpu"
    saved(policy(_Skeleton()), tmp_path / "adapter")
    released = engine.sleep(mode)
    assert (released.mode, released.num_bytes) == (mode, expected if moves else 0)
    assert engine.is_asleep and engine.sleep(mode).num_bytes == 0
    assert all(parameter.numel() == 0 for parameter in parameters) == moves
    with ThreadPoolExecutor() as pool:
        for call in (
            lambda: engine.rollout(**REQUEST),
            lambda: engine.generate(prompt="a cat"),
            lambda: engine.decode(before[0][0].dit_trajectory.latents[-1], height=64, width=64),
            lambda: engine.score(
                latents=before[0][0].dit_trajectory.latents[0],
                next_latents=before[0][0].dit_trajectory.latents[1],
                step=0,
                env=before[0][0].denoising_env,
                record=before[0][0].sampling,
            ),
            lambda: engine.update_weights_from_disk(engine.info.model),
            lambda: engine.weights_checksum(),
            lambda: engine.verify_weights([]),
            lambda: engine.load_lora_adapter(tmp_path / "adapter", name="a"),
            lambda: engine.unload_lora_adapter("a"),
        ):
            with pytest.raises(AsleepError):
                pool.submit(call).result(WAIT_S)
    assert [adapter.name for adapter in engine.lora_adapters()] == ["a", "m"]
    woken = engine.wake()
    assert (woken.mode, woken.num_bytes) == (None, released.num_bytes)
    assert not engine.is_asleep and engine.wake().num_bytes == 0
    assert_same_state(engine, before)


def test_discarded_weights_are_not_kept_and_nothing_runs_before_all_are_back(engine: HookedEngine) -> None:
    before = _state(engine)
    slots = weights.slots_of(engine._model.transformer)
    sent = {name: slot.live.detach().cpu().clone() for name, slot in slots.items()}
    gone, parameters = sum(slot.live.nbytes for slot in slots.values()), rest_of(engine)
    kept = sum({id(one): one.nbytes for one in parameters}.values()) - gone
    on_gpu = engine.info.device != "cpu"
    # The second time, there are no weights that could be kept.
    modes: tuple[Any, ...] = ("discard", "disk")
    for mode in modes:
        released = engine.sleep(mode)
        assert (released.mode, released.num_bytes) == ("discard", gone + (kept if on_gpu else 0))
        assert all(slot.live.numel() == 0 for slot in slots.values())
        with pytest.raises(AsleepError, match="wake it first"):
            engine.receive_weights()
        woken = engine.wake()
        assert (woken.mode, engine.memory_mode, engine.is_asleep) == ("discard", "discard", True)
        assert all(slot.live.isnan().all() for slot in slots.values())
    for call in (
        lambda: engine.rollout(**REQUEST),
        lambda: engine.weights_checksum(),
        lambda: engine.copy_policy("old"),
        lambda: engine.unload_lora_adapter("a"),
    ):
        with pytest.raises(AsleepError, match="send a complete update of the transformer"):
            call()
    engine.update_weights_from_disk(Path(engine.info.model) / "vae", module="vae")
    name, tensor = next(iter(sent.items()))
    partial = engine.receive_weights(partial=True)
    partial.put([(name, tensor)])
    with pytest.raises(WeightsRejectedError, match=f"got none for {len(sent) - 1} tensors"):
        engine.commit_weights(partial.stage())
    assert engine.is_asleep and slots[name].live.isnan().all()
    receiver = engine.receive_weights()
    receiver.put(list(sent.items()))
    engine.commit_weights(receiver.stage(), weight_version=before[2])
    assert not engine.is_asleep and engine.memory_mode is None
    assert_same_state(engine, before)


class _Skeleton(torch.nn.Module):
    """Something that an adapter can be saved of."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(2, 2)


def test_a_request_that_waits_when_the_engine_falls_asleep_ends_in_an_error(engine: HookedEngine) -> None:
    engine.hook = gate = Gate()
    try:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(lambda: engine.rollout(**REQUEST))
            assert gate.entered.wait(WAIT_S)
            sleeping = pool.submit(engine.sleep, "disk")
            while not engine.scheduler.loop._tasks.needs_idle:
                assert not sleeping.done()
            waiting = pool.submit(lambda: engine.rollout(**REQUEST))
            while not engine.scheduler.load().requests.pending:
                assert not waiting.done()
            gate.opened.set()
            assert len(running.result(WAIT_S)) == 1
            assert sleeping.result(WAIT_S).num_bytes
            with pytest.raises(AsleepError):
                waiting.result(WAIT_S)
    finally:
        engine.hook = lambda plan: None
        engine.wake()


def test_weights_that_arrive_before_and_after_a_sleep_are_taken_whole_or_not_at_all(
    engine: HookedEngine, z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _state(engine)
    tensors = {name: tensor.detach().cpu() * 1.5 for name, tensor in engine._model.transformer.state_dict().items()}
    incoming = engine.receive_weights()
    engine.sleep("disk")
    incoming.put(list(tensors.items()))
    with pytest.raises(WeightsRejectedError, match="made ready while the engine is awake"):
        incoming.stage()
    engine.wake()
    assert_same_state(engine, before)
    staged = incoming.stage()
    engine.sleep("disk")
    with pytest.raises(AsleepError):
        engine.commit_weights(staged)
    engine.wake()
    assert_same_state(engine, before)
    # As where a sleep comes between the names and the data of a file.
    read = weights._read_tensor

    def sleep_and_read(*arguments: Any) -> torch.Tensor:
        engine.sleep("disk")
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_read_tensor", sleep_and_read)
        staged = engine.stage_weights(weights.find_weights(z_image_checkpoint, "transformer"))
    engine.wake()
    with pytest.raises(WeightsRejectedError, match="read while the engine is awake"):
        engine.commit_weights(staged)
    assert_same_state(engine, before)


def test_where_there_is_no_room_to_keep_the_weights_the_engine_stays_awake(
    engine: HookedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _state(engine)
    keep, calls = offload._Spill.keep, iter(range(1000))

    def fill(spill: Any, parameter: torch.Tensor) -> Any:
        if next(calls) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return keep(spill, parameter)

    with monkeypatch.context() as patch:
        patch.setattr(offload._Spill, "keep", fill)
        with pytest.raises(EngineError, match="No space left on device; make room"):
            engine.sleep("disk")
    assert not engine.is_asleep
    assert_same_state(engine, before)


def test_an_engine_that_cannot_wake_sleeps_on_and_loses_nothing(engine: HookedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _state(engine)
    engine.sleep("disk")
    kept = list(engine._offload._kept)

    def fail() -> torch.Tensor:
        raise MemoryError("no memory left")

    engine._offload._kept[40] = (kept[40][0], fail)
    with pytest.raises(EngineError, match="no memory left"):
        engine.wake()
    assert engine.is_asleep
    with pytest.raises(AsleepError):
        engine.rollout(**REQUEST)
    engine._offload._kept[40] = kept[40]
    engine.wake()
    assert_same_state(engine, before)
