"""Policies: copies and moving averages of weights and adapters that requests choose by name."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters import policy, saved
from tests.guiding import PicturedEngine
from tests.pairs import FAMILY_WITH_DTYPE
from tests.weights import REQUEST, WEIGHTS, change, with_other
from torch import Tensor

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import AdapterLimits, Engine
from flowroll.errors import AsleepError, CancelledRequestError, InvalidRequestError
from flowroll.replay.remote import score_params
from flowroll.types import Policy, ScoreAnswer

DECAY = 0.75


@pytest.fixture
def z_image(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu", adapter_limits=AdapterLimits(max_policies=2)) as engine:
        yield engine


def bits(rollouts: list[Rollout]) -> list[Tensor]:
    return [tensor for one in rollouts for tensor in (one.image, one.log_probs)]


def assert_same(left: list[Rollout], right: list[Rollout]) -> None:
    for one, other in zip(bits(left), bits(right), strict=True):
        assert torch.equal(one, other)


def started_on(checkpoint: Path, dtype: str, **request: Any) -> list[Rollout]:
    with PicturedEngine(checkpoint, dtype=dtype, device="cpu") as engine:
        return engine.rollout(**{**REQUEST, **request})


@pytest.mark.parametrize(("family", "dtype"), FAMILY_WITH_DTYPE)
def test_a_policy_has_the_bits_of_an_engine_that_was_started_on_its_weights(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, dtype: str
) -> None:
    """Copied, left behind by an update, and then averaged with the update."""
    first, second = checkpoints[family], with_other(checkpoints[family], tmp_path / "second")
    before, after = (load_file(folder / "transformer" / WEIGHTS) for folder in (first, second))
    # The first average is of what the engine holds, which a bfloat16 engine has rounded.
    held = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in before.items()}
    given = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in after.items()}
    average = with_other(first, tmp_path / "average")
    change(
        average / "transformer",
        lambda tensors: {name: held[name] * DECAY + given[name] * (1 - DECAY) for name in tensors},
    )
    with PicturedEngine(first, dtype=dtype, device="cpu") as engine:
        old = engine.copy_policy("old").policy
        assert old == Policy(name="old", kind="weights", weight_version="0", decay=None, num_updates=1, num_bytes=old.num_bytes)
        assert old.num_bytes == sum(tensor.nbytes for tensor in engine._model.transformer.state_dict().values())
        engine.update_weights_from_disk(second)
        copied = engine.rollout(**REQUEST, policy="old")
        now = engine.rollout(**REQUEST)
        checksum = engine.weights_checksum()
        averaged = engine.average_policy("old", decay=DECAY).policy
        assert (averaged.weight_version, averaged.decay, averaged.num_updates) == ("1", DECAY, 2)
        mixed = engine.rollout(**REQUEST, policy="old")
        again = engine.rollout(**REQUEST, policy="default")
        assert engine.weights_checksum() == checksum
    assert_same(copied, started_on(first, dtype))
    assert_same(now, started_on(second, dtype))
    assert_same(mixed, started_on(average, dtype))
    assert_same(again, now)
    assert copied[0].sampling.policy == old.record and copied[0].weight_version == "0"
    assert mixed[0].sampling.policy == averaged.record and now[0].sampling.policy is None
    assert not torch.equal(copied[0].image, mixed[0].image) and not torch.equal(now[0].image, mixed[0].image)


def test_an_average_does_not_lose_steps_that_its_dtype_is_too_coarse_for(z_image_checkpoint: Path, tmp_path: Path) -> None:
    """A step of a thousandth of bfloat16's spacing, two thousand times."""
    near = with_other(z_image_checkpoint, tmp_path / "near", factor=1.25)
    with Engine(z_image_checkpoint, dtype="bfloat16", device="cpu") as engine:
        engine.copy_policy("ema")
        engine.update_weights_from_disk(near)
        weights = engine._executor._weights.held
        for _ in range(200):
            engine.average_policy("ema", decay=0.999)
        before = load_file(z_image_checkpoint / "transformer" / WEIGHTS)
        name = max(before, key=lambda key: before[key].numel())
        start = before[name].bfloat16().float()
        target = (before[name] * 1.25).bfloat16().float()
        expected = start * 0.999**200 + target * (1 - 0.999**200)
        torch.testing.assert_close(weights._sets["ema"][name], expected, rtol=1e-4, atol=1e-6)


def test_requests_of_several_policies_have_their_own_bits_in_any_order(z_image: Engine, tmp_path: Path) -> None:
    other = with_other(Path(z_image.info.model), tmp_path / "other")
    z_image.copy_policy("old")
    z_image.update_weights_from_disk(other)
    alone = {name: z_image.rollout(**REQUEST, policy=name) for name in ("old", "default")}
    known = z_image.weights_checksum()
    order = ["old", "default", "default", "old", "default", "old"]
    futures = [z_image.submit(z_image.plan(SamplingParams(**REQUEST, policy=name)), "rollout") for name in order]
    sums = z_image.submit_read(lambda weights: weights.checksums(["transformer"]))
    for name, future in zip(order, futures, strict=True):
        assert_same(future.result(60), alone[name])
    # Whatever is about the weights is about those that the engine was last given, though others are in place.
    assert sums.result(60)["transformer"] == known
    (recorded,) = alone["default"]
    trajectory = recorded.dit_trajectory
    score = z_image.score(
        latents=trajectory.latents[0],
        next_latents=trajectory.latents[1],
        step=0,
        env=recorded.denoising_env,
        record=recorded.sampling,
    )
    assert torch.equal(score.log_prob, recorded.log_probs[0])
    assert torch.equal(score.velocity, recorded.debug_tensors.model_output[0])
    counts = z_image.scheduler.load().requests
    assert counts.completed == counts.accepted and counts.running == counts.pending == 0


@pytest.mark.parametrize("mode", ["offload", "disk", "discard"])
def test_a_request_of_a_policy_that_waits_in_a_sleep_touches_no_weights(z_image: Engine, mode: Any) -> None:
    """It was admitted before the check that the engine is awake, and its weights were put over memory that was given away."""
    z_image.copy_policy("old")
    given = {name: tensor.clone() for name, tensor in z_image._model.transformer.state_dict().items()}
    expected = z_image.rollout(**REQUEST, policy="old")
    z_image.scheduler.pause("finish", refuses=False).result(60)
    waiting = z_image.submit(z_image.plan(SamplingParams(**REQUEST, policy="old")), "rollout")
    z_image.sleep(mode)
    z_image.scheduler.resume().result(60)
    with pytest.raises(AsleepError):
        waiting.result(60)
    assert z_image._executor._weights.held.active is None
    z_image.wake()
    if mode == "discard":
        z_image.update_weights_from_tensors(given)
    assert_same(z_image.rollout(**REQUEST, policy="old"), expected)
    assert_same(z_image.rollout(**REQUEST), expected)


def test_a_policy_of_an_adapter_is_that_of_a_trainer_that_averages(z_image: Engine, tmp_path: Path) -> None:
    trainers = [policy(z_image._model.transformer, seed) for seed in (0, 1)]
    for number, trainer in enumerate(trainers):
        z_image.load_lora_adapter(saved(trainer, tmp_path / str(number)), name="new" if number else "first")
    z_image.copy_policy("old", source="first")
    assert_same(z_image.rollout(**REQUEST, policy="old"), z_image.rollout(**REQUEST, lora_name="first"))
    versions = {one.name: one.version for one in z_image.lora_adapters()}
    assert versions["old"] == versions["new"] == z_image.weight_version != versions["first"]
    averaged = z_image.average_policy("old", decay=DECAY, source="new").policy
    assert (averaged.kind, averaged.num_updates, averaged.decay) == ("adapter", 2, DECAY)
    rollouts = z_image.rollout(**REQUEST, policy="old", num_outputs_per_prompt=2)
    old, new = (dict(trainer.named_parameters()) for trainer in trainers)
    with torch.no_grad():
        for name, weight in old.items():
            if "lora_" in name:
                weight.mul_(DECAY).add_(new[name], alpha=1 - DECAY)
    log_probs = replay.log_prob(trainers[0], rollouts)
    assert torch.equal(log_probs.detach(), torch.stack([one.log_probs for one in rollouts]))
    assert rollouts[0].sampling.lora.sha256 == replay.adapter_checksum(trainers[0])
    assert rollouts[0].sampling.policy == averaged.record
    # An adapter that is no policy is chosen by the same field.
    assert_same(z_image.rollout(**REQUEST, policy="new"), z_image.rollout(**REQUEST, lora_name="new"))


def scored(engine: Engine, rollouts: list[Rollout], policy: str | None, **options: Any) -> ScoreAnswer:
    return engine.run_scores(score_params(rollouts, None, log_probs_only=False, policy=policy, **options))


def test_scores_are_those_of_the_policy_that_a_request_names(z_image: Engine, tmp_path: Path) -> None:
    other = with_other(Path(z_image.info.model), tmp_path / "other")
    (old,) = z_image.rollout(**REQUEST)
    policy = z_image.copy_policy("old").policy
    z_image.update_weights_from_disk(other)
    (now,) = z_image.rollout(**REQUEST)
    checksum = z_image.weights_checksum()
    # While requests of several policies run.
    names = ("default", "old", None)
    futures = [z_image.submit(z_image.plan(SamplingParams(**REQUEST, policy=name)), "rollout") for name in names]
    under_old, under_new = scored(z_image, [old, now], "old"), scored(z_image, [old, now], "default")
    for answer, of_this, of_that in ((under_old, 0, 1), (under_new, 1, 0)):
        rollouts = (old, now)
        assert torch.equal(answer.samples[of_this].log_probs, rollouts[of_this].log_probs)
        assert torch.equal(answer.samples[of_this].velocities, rollouts[of_this].debug_tensors.model_output)
        assert not torch.equal(answer.samples[of_that].log_probs, rollouts[of_that].log_probs)
    assert (under_old.policy, under_old.weight_version) == (policy.record, "0")
    assert (under_new.policy, under_new.weight_version) == (None, "1")
    for future, expected in zip(futures, (now, old, now), strict=True):
        assert_same(future.result(60), [expected])
    trajectory = old.dit_trajectory
    step = {"latents": trajectory.latents[0], "next_latents": trajectory.latents[1], "step": 0}
    one = z_image.score(**step, env=old.denoising_env, record=old.sampling, policy="old")
    assert torch.equal(one.log_prob, old.log_probs[0])
    assert z_image.weights_checksum() == checksum
    with pytest.raises(InvalidRequestError, match="policy must be one of default, old, got older; make it first") as caught:
        scored(z_image, [old], "older")
    assert caught.value.field == "policy"


def test_scores_under_an_adapter_need_no_other_adapter(z_image: Engine, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        z_image.load_lora_adapter(saved(policy(z_image._model.transformer, seed), tmp_path / name), name=name)
    kept = z_image.copy_policy("kept", source="a").policy
    (rollout,), (plain,) = z_image.rollout(**REQUEST, lora_name="a"), z_image.rollout(**REQUEST)
    z_image.unload_lora_adapter("a")
    answer = scored(z_image, [rollout, plain], "kept")
    assert torch.equal(answer.samples[0].log_probs, rollout.log_probs)
    assert not torch.equal(answer.samples[1].log_probs, plain.log_probs)
    assert answer.policy == kept.record and [one.lora.name for one in answer.samples] == ["kept", "kept"]
    assert scored(z_image, [rollout], "b").policy is None
    with pytest.raises(InvalidRequestError, match="lora_name must be one of b, kept, got a"):
        scored(z_image, [rollout], None)
    # A policy of whole weights is these weights alone, whatever adapter a record names.
    z_image.copy_policy("whole")
    under = scored(z_image, [rollout, plain], "whole")
    assert torch.equal(under.samples[1].log_probs, plain.log_probs) and under.samples[0].lora is None


def test_scores_that_end_early_or_whose_policy_was_dropped_leave_the_weights_in_place(z_image: Engine, tmp_path: Path) -> None:
    (rollout,) = z_image.rollout(**{**REQUEST, "num_inference_steps": 30})
    z_image.copy_policy("old")
    z_image.update_weights_from_disk(with_other(Path(z_image.info.model), tmp_path / "other"))
    checksum, expected = z_image.weights_checksum(), z_image.rollout(**REQUEST)
    params = score_params([rollout], None, log_probs_only=True, policy="old")
    begun = z_image.submit_scores(z_image.plan_score(replace(params, request_id="mine")))
    while z_image._executor._weights.held.active != "old" and not begun.done():
        time.sleep(0.001)
    assert z_image.scheduler.abort("mine").result(60) == 1
    with pytest.raises(CancelledRequestError):
        begun.result(60)
    assert z_image.weights_checksum() == checksum
    running = z_image.submit(z_image.plan(SamplingParams(**{**REQUEST, "num_inference_steps": 30})), "rollout")
    while not z_image.scheduler.load().running_samples:
        time.sleep(0.001)
    dropped = z_image.scheduler.exclusive(lambda: z_image.drop_policy("old"))
    waiting = z_image.submit_scores(z_image.plan_score(params))
    assert running.result(60) and dropped.result(60)
    with pytest.raises(InvalidRequestError, match=r"policy must .* got old"):
        waiting.result(60)
    assert z_image.weights_checksum() == checksum
    assert_same(z_image.rollout(**REQUEST), expected)


def test_a_policy_that_follows_another_one_has_its_version(z_image: Engine, tmp_path: Path) -> None:
    """What it was made from are not the weights that the engine has been given since."""
    before = z_image.rollout(**REQUEST)
    z_image.copy_policy("old")
    z_image.update_weights_from_disk(with_other(Path(z_image.info.model), tmp_path / "second"))
    assert z_image.copy_policy("older", source="old").policy.weight_version == "0"
    (made,) = z_image.rollout(**REQUEST, policy="older")
    assert (made.weight_version, made.sampling.policy.weight_version, z_image.weight_version) == ("0", "0", "1")
    assert_same([made], before)
    assert z_image.average_policy("older", source="old", decay=DECAY).policy.weight_version == "0"


def test_a_policy_survives_sleep(z_image: Engine, tmp_path: Path) -> None:
    z_image.copy_policy("old")
    z_image.update_weights_from_disk(with_other(Path(z_image.info.model), tmp_path / "other"))
    before = z_image.rollout(**REQUEST, policy="old")
    z_image.sleep("disk")
    z_image.wake()
    assert_same(z_image.rollout(**REQUEST, policy="old"), before)


def test_a_dropped_policy_ends_the_requests_that_wait_for_it(z_image: Engine) -> None:
    z_image.copy_policy("old")
    running = z_image.submit(z_image.plan(SamplingParams(**{**REQUEST, "num_inference_steps": 30})), "rollout")
    # It waits until the other one has ended, and the end of its policy comes first.
    future = z_image.submit(z_image.plan(SamplingParams(**REQUEST, policy="old")), "rollout")
    assert z_image.drop_policy("old").policy is None
    assert running.result(60)
    with pytest.raises(InvalidRequestError, match=r"policy must .* got old"):
        future.result(60)
    assert z_image.policies() == ()
    # The engine goes on with the weights that it was given.
    assert z_image.rollout(**REQUEST)[0].sampling.policy is None


@pytest.mark.parametrize(
    ("call", "field", "words"),
    [
        (lambda engine: engine.rollout(**REQUEST, policy="older"), "policy", "one of default, old, got older; make it first"),
        (lambda engine: engine.copy_policy("new", source="older"), "source", "one of default, old, got older"),
        (lambda engine: engine.drop_policy("older"), "policy", "one of default, old, got older"),
        (lambda engine: engine.copy_policy("default"), "policy", "have a name that nothing else has, got default"),
        (lambda engine: engine.copy_policy("lora_merge"), "policy", "have a name that nothing else has"),
        (lambda engine: engine.copy_policy(""), "policy", "printable text of 1 to 128 characters"),
        (lambda engine: engine.average_policy("old", decay=1.5), "decay", r"a number from 0 to 1, got 1\.5"),
        (lambda engine: engine.average_policy("old", decay=float("nan")), "decay", "a number from 0 to 1, got nan"),
        (
            lambda engine: engine.rollout(**REQUEST, policy="old", lora_name="a"),
            "policy",
            "be given without lora_name, got 'old'; send one of the two",
        ),
        (lambda engine: (engine.copy_policy("b"), engine.copy_policy("c")), "policy", r"at most 2 \(b, old\), got another"),
    ],
)
def test_what_is_wrong_is_refused(z_image: Engine, call: Any, field: str, words: str) -> None:
    z_image.copy_policy("old")
    with pytest.raises(InvalidRequestError, match=words) as caught:
        call(z_image)
    assert caught.value.field == field


def test_an_adapter_is_not_averaged_with_weights_or_with_other_layers(z_image: Engine, tmp_path: Path) -> None:
    saved(policy(z_image._model.transformer), tmp_path / "a")
    z_image.load_lora_adapter(tmp_path / "a", name="a")
    z_image.copy_policy("weights")
    z_image.copy_policy("adapter", source="a")
    with pytest.raises(InvalidRequestError, match="of the kind of the policy weights, weights, got one of adapter"):
        z_image.average_policy("weights", decay=0.5, source="a")
    with pytest.raises(InvalidRequestError, match="of the kind of the policy adapter, adapter, got one of weights"):
        z_image.average_policy("adapter", decay=0.5)
    with pytest.raises(InvalidRequestError, match="have a name that nothing else has, got a"):
        z_image.copy_policy("a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".to_q." in name}
    assert 0 < len(kept) < len(tensors)
    config = tmp_path / "a" / "adapter_config.json"
    save_file(kept, tmp_path / "a" / "adapter_model.safetensors")
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["to_q"]}))
    z_image.load_lora_adapter(tmp_path / "a", name="less")
    with pytest.raises(InvalidRequestError, match="have the layers and ranks of the policy adapter, got others in less"):
        z_image.average_policy("adapter", decay=0.5, source="less")
    assert_same(z_image.rollout(**REQUEST, policy="adapter"), z_image.rollout(**REQUEST, policy="a"))
