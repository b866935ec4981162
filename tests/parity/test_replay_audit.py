"""An audit that finds a difference names its cause."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.guiding import guided
from tests.pairs import FAMILY_WITH_DTYPE
from torch import nn

from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES

NAMES = list(FAMILIES)
REQUEST = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "seed": 5,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "debug_mode": True,
}


@pytest.fixture
def made(engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str):
    """A guided rollout, and the transformer that a trainer has."""
    return engine_of(name, dtype).rollout(**guided(name, 4.0, **REQUEST))[0], pipeline_of(name, dtype).transformer


def changed(rollout: Rollout, **parts: Any) -> Rollout:
    """The rollout with fields of its parts replaced: `sampling={"noise_level": 1}`."""
    new = {
        part: dataclasses.replace(getattr(rollout, part), **value) if isinstance(value, dict) else value
        for part, value in parts.items()
    }
    return dataclasses.replace(rollout, **new)


def other_weights(transformer: nn.Module, size: float) -> nn.Module:
    other = copy.deepcopy(transformer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight += size * weight.std() * noise if weight.numel() > 1 else 0
    return other


def as_of_old(rollout: Rollout) -> Rollout:
    """The rollout as a version without digests recorded it."""
    return changed(rollout, sampling={"pos_cond_sha256": None, "neg_cond_sha256": None})


def only_cause(report: replay.AuditReport, kind: str, *words: str) -> None:
    assert not report.is_exact and not report.rollouts[0].is_exact
    assert [cause.kind for cause in report.causes] == [kind], str(report)
    for word in words:
        assert word in str(report)


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_a_replay_by_the_same_weights_is_exact(made: Any) -> None:
    rollout, transformer = made
    report = replay.audit(transformer, [rollout, changed(rollout, debug_tensors=None)], weight_version=rollout.weight_version)
    assert report.is_exact and report.causes == ()
    assert str(report) == "exact: the ratio is 1 at all 8 steps of 2 rollout(s)"
    assert [step.step for step in report.steps] == [0, 1, 2, 3]
    for step in report.steps:
        assert step.is_exact and step.num_samples == 2
        assert step.max_ratio_error == step.mean_ratio_error == step.max_velocity_error == step.mean_velocity_error == 0


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_replay_that_gives_nan_is_reported_as_infinitely_far(made: Any) -> None:
    rollout, transformer = made
    broken = copy.deepcopy(transformer)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    report = replay.audit(broken, [rollout])
    assert not report.is_exact
    for step in report.steps:
        assert step.max_ratio_error == step.max_velocity_error == float("inf")


@pytest.mark.parametrize(
    "options", [{"sde_type": "ode"}, {"sde_type": "cps", "sde_step_indices": (1,)}, {"return_step_indices": (2, 3)}]
)
@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_every_kind_of_rollout_can_be_exact(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str, options: Any
) -> None:
    group = engine_of(name, dtype).rollout(**REQUEST, **options)
    report = replay.audit(pipeline_of(name, dtype).transformer, group)
    assert report.is_exact, str(report)


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-2])
@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_other_weights(made: Any, size: float) -> None:
    rollout, transformer = made
    report = replay.audit(other_weights(transformer, size), [rollout])
    only_cause(report, "weights", "not exact: 1 of 1", "other weights", "the env is the one that the rollout was made with")
    worst = max(report.steps, key=lambda step: step.max_ratio_error)
    assert worst.max_ratio_error >= worst.mean_ratio_error > 0
    assert worst.max_velocity_error > worst.mean_velocity_error > 0


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_other_weights_are_named_outright_where_the_env_can_be_checked(made: Any) -> None:
    rollout, transformer = made
    report = replay.audit(other_weights(transformer, 1e-2), [rollout], encode=lambda rollout: rollout.denoising_env)
    only_cause(report, "weights", "the env is what this model makes of the prompts")


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_another_weight_version(made: Any) -> None:
    rollout, transformer = made
    report = replay.audit(other_weights(transformer, 1e-2), [rollout], weight_version="another")
    # Other tests of the session change the engine's adapters, and with them its version.
    only_cause(report, "weight_version", f"weight version {rollout.weight_version}, the transformer of another")


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_rounded_latents(made: Any) -> None:
    rollout, transformer = made
    latents = rollout.dit_trajectory.latents.to(torch.bfloat16)
    for rounded in (latents, latents.float()):
        for debug in (rollout.debug_tensors, None):
            report = replay.audit(transformer, [changed(rollout, dit_trajectory={"latents": rounded}, debug_tensors=debug)])
            only_cause(report, "latents", "rounded latents", "bfloat16")


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_permuted_latents(made: Any) -> None:
    rollout, transformer = made
    latents = rollout.dit_trajectory.latents[[0, 2, 1, 3, 4]]
    report = replay.audit(transformer, [changed(rollout, dit_trajectory={"latents": latents})])
    only_cause(report, "latents", "state 1 is not the recorded mean plus the recorded noise of step 0")


@pytest.mark.parametrize("shifted", ["record", "trajectory", "both", "both, with their timesteps"])
@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_sigmas_shifted_by_one(made: Any, shifted: str) -> None:
    rollout, transformer = made
    kept = rollout.dit_trajectory.sigmas[1:-1]
    grid = torch.cat([kept, torch.stack([kept[-1] / 2, torch.tensor(0.0)])])
    record, trajectory = {"sigmas": tuple(grid.tolist())}, {"sigmas": grid}
    if "timesteps" in shifted:
        timesteps = grid[:-1] * 1000
        record, trajectory = {**record, "timesteps": tuple(timesteps.tolist())}, {**trajectory, "timesteps": timesteps}
    parts: dict[str, Any] = {"sampling": record, "dit_trajectory": trajectory}
    if shifted in ("record", "trajectory"):
        parts.pop("dit_trajectory" if shifted == "record" else "sampling")
    only_cause(replay.audit(transformer, [changed(rollout, **parts)]), "sigmas", "another grid")


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_the_wrong_negative_prompt(engine_of: Callable[[str, str], Engine], made: Any, name: str, dtype: str) -> None:
    rollout, transformer = made
    other = engine_of(name, dtype).rollout(**guided(name, 4.0, **REQUEST, negative_prompt="many ugly bears"))[0]
    wrong = changed(rollout, denoising_env=other.denoising_env)
    only_cause(replay.audit(transformer, [wrong]), "env", "the negative prompt's branch is not the one that the rollout")
    wrong = as_of_old(wrong)
    only_cause(replay.audit(transformer, [wrong]), "env", "the negative prompt's does not")
    report = replay.audit(transformer, [wrong], encode=lambda _: rollout.denoising_env)
    only_cause(report, "env", "the negative prompt's branch is not what this model makes of its text")


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_the_wrong_prompt_needs_the_records_digest_or_the_text_encoder(
    engine_of: Callable[[str, str], Engine], made: Any, name: str, dtype: str
) -> None:
    rollout, transformer = made
    (cows,) = engine_of(name, dtype).rollout(**guided(name, 4.0, **{**REQUEST, "prompt": "two blue cows"}))
    other = cows.denoising_env
    env = dataclasses.replace(rollout.denoising_env, pos_cond_kwargs=other.pos_cond_kwargs)
    wrong = changed(rollout, denoising_env=env)
    for debug in (rollout.debug_tensors, None):
        report = replay.audit(transformer, [changed(wrong, debug_tensors=debug)])
        only_cause(report, "env", "the prompt's branch is not the one that the rollout was made with")
    wrong = as_of_old(wrong)
    only_cause(replay.audit(transformer, [wrong]), "weights", "or another prompt's env")
    report = replay.audit(transformer, [wrong], encode=lambda _: rollout.denoising_env)
    only_cause(report, "env", "the prompt's branch is not what")


@pytest.mark.parametrize("scale", [4.5, 7, 2.0])
@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_another_guidance_scale(made: Any, scale: float) -> None:
    rollout, transformer = made
    report = replay.audit(transformer, [changed(rollout, sampling={"guidance_scale": scale})])
    only_cause(report, "guidance", f"the record says {scale:g}, the recorded velocities fit 4")


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ({"noise_level": 0.8}, "dynamics", "another noise level: at step 0 the std was 0.7, now it is 0.8"),
        ({"sde_type": "ode"}, "dynamics", "another sde_type"),
        ({"log_prob_no_const": True}, "log_probs", "every velocity is the recorded one"),
        ({"guidance_rule": "none"}, "guidance", "the record says none"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_another_record(made: Any, record: dict[str, Any], kind: str, words: str) -> None:
    rollout, transformer = made
    only_cause(replay.audit(transformer, [changed(rollout, sampling=record)]), kind, words)


@pytest.mark.parametrize(("name", "dtype"), FAMILY_WITH_DTYPE)
def test_another_dtype(pipeline_of: Callable[[str, str], Any], made: Any, name: str, dtype: str) -> None:
    other = "bfloat16" if dtype == "float32" else "float32"
    report = replay.audit(pipeline_of(name, other).transformer, [made[0]])
    only_cause(report, "dtype", f"torch.{dtype} made the rollout, torch.{other} replayed it")


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tampered_length_of_the_text(made: Any) -> None:
    rollout, transformer = made
    env = rollout.denoising_env
    key = next(iter(env.pos_cond_kwargs))
    short = {**env.pos_cond_kwargs, key: env.pos_cond_kwargs[key][:-1]}
    tampered = changed(rollout, denoising_env={"pos_cond_kwargs": short})
    if "txt_seq_lens" not in env.pos_cond_kwargs:
        # Where texts have one length, the branches of a pair cannot be stacked any more, or position ids are left over.
        with pytest.raises(
            InvalidRequestError, match=f"hold ({key} of one shape in both branches|(txt_ids|img_mask) for every token)"
        ):
            replay.audit(transformer, [tampered])
        return
    only_cause(replay.audit(transformer, [tampered]), "env", "in the prompt's branch txt_seq_lens is")


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_without_debug_tensors_it_says_what_it_cannot_tell_apart(made: Any) -> None:
    rollout, transformer = made
    report = replay.audit(other_weights(transformer, 1e-2), [changed(rollout, debug_tensors=None)])
    only_cause(report, "weights", "without debug tensors they cannot be told apart")
    assert report.steps[0].max_velocity_error is None


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_difference_of_rounding_is_put_down_to_kernels(made: Any) -> None:
    rollout, transformer = made
    velocity = rollout.debug_tensors.model_output * (1 + 2e-7)
    wobbling = changed(rollout, debug_tensors={"model_output": velocity}, log_probs=rollout.log_probs + 1e-6)
    only_cause(replay.audit(transformer, [wobbling]), "kernels", "thread count")


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_velocity_of_other_bits_is_found_even_where_the_log_probs_agree(made: Any) -> None:
    rollout, transformer = made
    velocity = rollout.debug_tensors.model_output.clone()
    velocity[2] *= 1 + 2e-7
    report = replay.audit(transformer, [changed(rollout, debug_tensors={"model_output": velocity})])
    only_cause(report, "kernels", "the velocity of step 2 is off")
    assert [step.is_exact for step in report.steps] == [True, True, False, True]
    assert report.steps[2].max_ratio_error == 0 < report.steps[2].max_velocity_error


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_at_odd_addresses_are_named(made: Any) -> None:
    rollout, transformer = made
    odd = copy.deepcopy(transformer)
    for weight in odd.parameters():
        room = torch.empty(weight.numel() + 2, dtype=weight.dtype)
        weight.data = room[2:].view(weight.shape).copy_(weight.data)
    report = replay.audit(odd, [changed(rollout, log_probs=rollout.log_probs + 1e-6)])
    only_cause(report, "alignment", "call flowroll.replay.align_weights(transformer)")
    assert replay.align_weights(odd) > 0
    assert replay.audit(odd, [rollout]).is_exact


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("name", NAMES)
def test_only_the_rollouts_that_differ_are_named(made: Any) -> None:
    rollout, transformer = made
    group = [rollout, changed(rollout, sampling={"guidance_scale": 3.0}), rollout]
    report = replay.audit(transformer, group)
    assert [one.is_exact for one in report.rollouts] == [True, False, True]
    assert "1 of 3 rollout(s) differ" in str(report) and "(rollout 1)" in str(report)
    assert all(step.num_samples == 3 and step.mean_ratio_error < step.max_ratio_error for step in report.steps[1:3])
