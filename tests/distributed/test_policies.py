"""Policies on several ranks: each keeps its own part of them, and all exchange them or none does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.adapters import policy, saved
from tests.distributed.test_rank_group import no_torchrun  # noqa: F401  # an autouse fixture
from tests.distributed.test_weight_updates import FAILING
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, with_other

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.errors import EngineError
from flowroll.parallel import processes
from flowroll.replay.remote import score_params
from flowroll.types import Layout

FAULT = (
    "from flowroll.engine.policies.held import HeldWeights; from flowroll.errors import EngineError\n"
    "calls = []\n"
    "do = HeldWeights.prepare_exchange\n"
    "def fail_once(*a):\n"
    "    calls.append(a)\n"
    "    if len(calls) == 1: raise EngineError('No space left')\n"
    "    return do(*a)\n"
    "HeldWeights.prepare_exchange = fail_once"
)


def assert_scored(engine: Engine, rollouts: list[Rollout], policy: str) -> None:
    """The log-probs of the policy that made them, whatever is in place."""
    before = engine.weights_checksum()
    answer = engine.run_scores(score_params(rollouts, None, log_probs_only=False, policy=policy))
    assert answer.policy == rollouts[0].sampling.policy
    for one, rollout in zip(answer.samples, rollouts, strict=True):
        assert torch.equal(one.log_probs, rollout.log_probs)
        assert torch.equal(one.velocities, rollout.debug_tensors.model_output)
    unadapted = [replace(one, sampling=replace(one.sampling, lora=None)) for one in rollouts]
    default = engine.run_scores(score_params(unadapted, None, log_probs_only=True))
    assert all(not torch.equal(one.log_probs, two.log_probs) for one, two in zip(default.samples, rollouts, strict=True))
    assert engine.weights_checksum() == before


def rolled_out(engine: Engine, other: Path, adapter: Path) -> list[Rollout]:
    """A copy of the weights, an average of it with an update, and the same of an adapter."""
    engine.load_lora_adapter(adapter, name="a")
    engine.copy_policy("old")
    engine.copy_policy("adapter", source="a")
    engine.update_weights_from_disk(other)
    found = engine.rollout(**REQUEST, policy="old")
    assert_scored(engine, found, "old")
    engine.average_policy("old", decay=0.75)
    engine.average_policy("adapter", decay=0.5, source="a")
    found += [rollout for name in ("old", None, "adapter") for rollout in engine.rollout(**REQUEST, policy=name)]
    assert_scored(engine, found[1:2], "old")
    assert_scored(engine, found[3:], "adapter")
    # Made without the adapter: a rank that does not take that of the policy computes other velocities, which is an error.
    assert engine.run_scores(score_params(found[2:3], None, log_probs_only=True, policy="adapter")).samples[0].lora is not None
    engine.drop_policy("old")
    engine.drop_policy("adapter")
    return [*found, *engine.rollout(**REQUEST)]


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), pytest.param(Layout(sp=2, cfg_parallel=True), marks=pytest.mark.slow)],
    ids=["tp2", "sp2xcfg2"],
)
def test_policies_have_the_bits_of_one_rank(
    layout: Layout, z_image_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "worker_command", lambda: (sys.executable, "-c", FAILING.format(fault=FAULT)))
    other = with_other(z_image_checkpoint, tmp_path / "other")
    with Engine(z_image_checkpoint, device="cpu") as single:
        adapter = saved(policy(single._model.transformer), tmp_path / "a")
        expected = rolled_out(single, other, adapter)
    with Engine(z_image_checkpoint, device="cpu", layout=layout, rank_timeout_s=30.0) as engine:
        engine.copy_policy("old")
        before = engine.weights_checksum()
        with pytest.raises(EngineError, match="No space left"):
            engine.rollout(**REQUEST, policy="old")
        assert engine.weights_checksum() == before
        engine.drop_policy("old")
        for one, alone in zip(rolled_out(engine, other, adapter), expected, strict=True):
            record = one.sampling
            assert record.policy is None or record.policy.name == alone.sampling.policy.name
            assert_same_bits(one, alone)
