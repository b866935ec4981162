"""Sleep and wake on several ranks: all of them, or none."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.adapters import policy, saved
from tests.distributed.test_rank_group import no_torchrun  # noqa: F401  # an autouse fixture
from tests.distributed.test_weight_updates import FAILING
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, WEIGHTS

from flowroll.engine import Engine
from flowroll.errors import AsleepError, EngineError, WeightsRejectedError
from flowroll.parallel import processes
from flowroll.types import Layout

FAULT = (
    "from flowroll.engine.weights.offload import WeightOffload; from flowroll.errors import EngineError\n"
    "calls = {}\n"
    "def failing(name):\n"
    "    do = getattr(WeightOffload, name)\n"
    "    def fail_once(*a):\n"
    "        calls[name] = calls.get(name, 0) + 1\n"
    "        if calls[name] == 1: raise EngineError('No space left')\n"
    "        return do(*a)\n"
    "    setattr(WeightOffload, name, fail_once)\n"
    "failing('prepare_release'); failing('prepare_resume')"
)


@pytest.mark.parametrize("layout", [Layout(tp=2), pytest.param(Layout(sp=2), marks=pytest.mark.slow)], ids=["tp2", "sp2"])
def test_every_rank_sleeps_and_wakes_or_none_does(
    layout: Layout, z_image_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", FAILING.format(fault=FAULT)))
    with Engine(z_image_checkpoint, device="cpu") as single:
        saved(policy(single._model.transformer), tmp_path / "a")
    with Engine(z_image_checkpoint, device="cpu", layout=layout, rank_timeout_s=30.0) as engine:
        engine.load_lora_adapter(tmp_path / "a", name="a", merged=True)
        before = [engine.rollout(**REQUEST, lora_name=name)[0] for name in (None, "a")]
        checksum = engine.weights_checksum()
        with pytest.raises(EngineError, match="rank 1: No space left"):
            engine.sleep("disk")
        assert not engine.is_asleep
        assert_same_bits(engine.rollout(**REQUEST)[0], before[0])
        released = engine.sleep("disk")
        with pytest.raises(AsleepError):
            engine.rollout(**REQUEST)
        with pytest.raises(EngineError, match="rank 1: No space left"):
            engine.wake()
        assert engine.is_asleep
        assert engine.wake().num_bytes == released.num_bytes > 0
        for name, rollout in zip((None, "a"), before, strict=True):
            assert_same_bits(engine.rollout(**REQUEST, lora_name=name)[0], rollout)
        assert engine.weights_checksum() == checksum


def test_weights_that_every_rank_discarded_come_back_whole_or_not_at_all(z_image_checkpoint: Path) -> None:
    sent = load_file(z_image_checkpoint / "transformer" / WEIGHTS)
    with Engine(z_image_checkpoint, device="cpu", layout=Layout(tp=2), rank_timeout_s=30.0) as engine:
        (before,), checksum = engine.rollout(**REQUEST), engine.weights_checksum()
        # A rank that did not note the update would discard what it keeps at the next sleep.
        for mode in ("discard", "disk", "discard"):
            assert engine.sleep(mode).mode == mode
            engine.wake()
            if mode == "disk":
                assert_same_bits(engine.rollout(**REQUEST)[0], before)
                continue
            with pytest.raises(AsleepError, match="send a complete update"):
                engine.rollout(**REQUEST)
            partial = engine.receive_weights(partial=True)
            partial.put(list(sent.items())[1:])
            with pytest.raises(WeightsRejectedError, match="got none for 1 tensors"):
                engine.commit_weights(partial.stage())
            engine.update_weights_from_tensors(sent.items(), weight_version="0")
            assert_same_bits(engine.rollout(**REQUEST)[0], before)
            assert engine.weights_checksum() == checksum
