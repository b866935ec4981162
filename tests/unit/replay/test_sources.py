"""What cannot be replayed is refused before any model work, with the remedy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.factories import make_evaluation, make_rollout
from torch import nn

from flowroll import Rollout, replay
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.replay.remote import score_params


def never_called(**_: Any) -> Any:
    raise AssertionError("the model was used")


def rollout(**options: Any) -> Rollout:
    made = make_rollout(guided=options.pop("guided", False), **options)
    rule = "none" if made.sampling.guidance_rule == "none" else {"qwen_image": "cfg_norm_rescale"}[made.sampling.family]
    return replace(made, sampling=replace(made.sampling, guidance_rule=rule))


def without(part: str) -> Rollout:
    return replace(rollout(), **{part: None})


def with_record(**fields: Any) -> Rollout:
    made = rollout()
    return replace(made, sampling=replace(made.sampling, **fields))


def with_trajectory(**fields: Any) -> Rollout:
    made = rollout()
    assert made.dit_trajectory is not None
    return replace(made, dit_trajectory=replace(made.dit_trajectory, **fields))


def with_env(**fields: Any) -> Rollout:
    made = rollout(guided=True)
    assert made.denoising_env is not None
    return replace(made, denoising_env=replace(made.denoising_env, **fields))


def filtered(*states: int) -> Rollout:
    made = rollout()
    assert made.dit_trajectory is not None
    return with_trajectory(latents=made.dit_trajectory.latents[list(states)], latent_step_indices=states)


@pytest.mark.parametrize(
    ("field", "rollouts", "words"),
    [
        ("rollouts", [], "hold at least one rollout, got none"),
        ("rollouts", [make_evaluation(guided=False)], "an evaluation at index 0; roll out with rollout=True"),
        (
            "denoising_env",
            [rollout(), without("denoising_env")],
            "got none in rollout 1; roll out with return_denoising_env=True",
        ),
        ("dit_trajectory", [without("dit_trajectory")], "got none in rollout 0; roll out with return_dit_trajectory=True"),
        ("dit_trajectory", [filtered(0, 1, 3, 4)], r"states 1 and 2 to replay step 1, got the states \[0, 1, 3, 4\]"),
        ("dit_trajectory", [with_trajectory(sigmas=torch.linspace(1, 0, 5))], "the sigmas of dit_trajectory are not those"),
        ("dit_trajectory", [with_trajectory(timesteps=torch.ones(4))], "the timesteps of dit_trajectory are not those"),
        ("family", [with_record(family="sdxl")], f"be one of {', '.join(FAMILIES)}, got sdxl"),
        ("rollouts", [rollout(), rollout(family="z_image")], "be of one model family, got qwen_image and z_image"),
        ("guidance_rule", [with_record(guidance_rule="cfg")], "be none or cfg_norm_rescale for qwen_image, got cfg"),
        ("schema_version", [with_record(schema_version=9)], "be at most 1, got 9"),
        ("denoising_env", [with_env(neg_cond_kwargs=None)], "hold neg_cond_kwargs for a guided rollout, got none in rollout 0"),
        ("denoising_env", [with_env(pos_cond_kwargs={"x": 1})], r"encoder_hidden_states in pos_cond_kwargs .* got \['x'\]"),
        ("steps", [rollout(), rollout(steps=3)], "different lengths, got rollouts of 3 and 4 steps; name the steps"),
    ],
)
@pytest.mark.parametrize("call", [replay.log_prob, replay.score, replay.micro_batches])
def test_it_is_refused_before_model_work(call: Any, field: str, rollouts: list[Rollout], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        call(never_called, rollouts)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "options", "words"),
    [
        ("steps", {"steps": []}, "hold at least one step, got none"),
        ("steps", {"steps": [4]}, "lie in 0..3, got 4"),
        ("steps", {"steps": [-1]}, "lie in 0..3, got -1"),
        ("steps", {"steps": [1, 1]}, "hold each step once"),
        ("micro_batch", {"micro_batch": 0}, "be an integer >= 1, got 0"),
        ("micro_batch", {"micro_batch": True}, "be an integer >= 1, got True"),
        ("merge", {"merge": "slow"}, "be one of alone, exact, fast, got 'slow'; choose one"),
    ],
)
def test_a_wrong_option_is_refused(field: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        replay.micro_batches(never_called, [rollout()], **options)
    assert caught.value.field == field


@pytest.mark.parametrize("steps", [np.array([2, 0]), torch.tensor([2, 0]), [np.int64(2), torch.tensor(0)], range(2, -1, -2)])
def test_steps_may_be_an_array(steps: Any) -> None:
    params = score_params([rollout()], steps, log_probs_only=True)
    assert params.samples[0].steps == (2, 0) and {type(step) for step in params.samples[0].steps} == {int}


def test_a_step_is_replayed_only_if_both_its_states_are_there() -> None:
    with pytest.raises(InvalidRequestError, match="states 0 and 1 to replay step 0"):
        replay.micro_batches(never_called, [filtered(1, 2)], steps=[0])
    assert replay.micro_batches(never_called, [filtered(1, 2)], steps=[1]) is not None


def test_an_audit_of_scattered_states_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"hold two states in a row, got the states \[0, 2\]"):
        replay.audit(never_called, [filtered(0, 2)])


def test_an_audit_of_nothing_is_not_exact() -> None:
    with pytest.raises(InvalidRequestError, match="hold at least one rollout, got none"):
        replay.audit(never_called, [])


def test_an_unknown_dtype_in_the_record_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"dtype must be the name of a torch dtype, got 'torch\.complex'"):
        replay.log_prob(never_called, [with_record(model_dtype="torch.complex")])


def test_weights_that_a_file_put_at_odd_addresses_are_refused_until_aligned() -> None:
    linear = nn.Linear(4, 4, bias=False)
    values = torch.randn(4, 4)
    linear.weight.data = torch.empty(18)[2:].view(4, 4).copy_(values)
    made = with_record(model_dtype="torch.float32")
    with pytest.raises(InvalidRequestError, match="got 1 that a file's mapping put elsewhere, such as weight; call") as caught:
        replay.log_prob(linear, [made])
    assert caught.value.field == "transformer"
    weight = linear.weight
    assert replay.align_weights(linear) == 1
    assert linear.weight is weight and torch.equal(linear.weight, values) and weight.data_ptr() % 64 == 0
    assert replay.align_weights(linear) == 0
