import math
from dataclasses import replace

import pytest
import torch
from tests.factories import make_rollout
from tests.rollouts import tensors_of

from flowroll.families import FAMILIES
from flowroll.parity.compare import Measure, compare_rollouts, values_of
from flowroll.parity.compare import measure as measure_samples


def measure(expected, actual, *, first=None):
    """One sample's measure."""
    return measure_samples([expected], [actual], first_rows=first)


def test_equal_tensors_measure_nothing():
    assert measure(torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0])) == Measure(equal=True)


def test_figures_of_hand_made_tensors():
    found = measure(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 0.5]))
    assert found.equal is False
    assert found.max_abs == 0.5
    assert found.mean_abs == pytest.approx(0.5 / 3, abs=1e-15)
    assert found.min_cosine == pytest.approx(25 / (5 * math.sqrt(25.25)), abs=1e-15)
    assert found.first_step is None


def test_one_bit_is_a_difference():
    a = torch.tensor([1.0, 0.1])
    b = a.clone()
    b[1] = torch.nextafter(b[1], torch.tensor(1.0))
    found = measure(a, b)
    assert found.equal is False
    assert found.max_abs == (b[1].double() - a[1].double()).item() > 0


def test_differences_are_taken_in_float64():
    # In bfloat16 the difference would be rounded to 8 bits.
    a, b = torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([1.0078125, 1.0]).bfloat16()
    found = measure(a, b)
    assert found.max_abs == 255.0
    assert found.mean_abs == (255.0 + 0.0078125) / 2


def test_the_cosine_is_the_smallest_over_the_steps():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [100.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0], [100.0, 0.0]])
    assert measure(a, b, first=1).min_cosine == pytest.approx(math.sqrt(0.5), abs=1e-15)
    assert measure(a, b).min_cosine == pytest.approx(10002 / math.sqrt(10002 * 10003), abs=1e-12)


def test_numbers_per_step_have_one_cosine_together():
    found = measure(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), first=1)
    assert found.min_cosine == pytest.approx(math.sqrt(0.5), abs=1e-15)


def test_zeros_have_a_cosine():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert measure(zero, torch.stack([zero[0], one[0]]), first=1).min_cosine == 0.0
    half = torch.stack([zero[0], 2 * one[0]])
    assert measure(torch.stack([zero[0], one[0]]), half, first=1).min_cosine == pytest.approx(1.0, abs=1e-12)


def test_the_first_step_that_differs_is_named():
    a = torch.zeros(4, 2)
    b = a.clone()
    b[2:] = 1
    assert measure(a, b, first=1).first_step == 2
    # The state after step 1 is row 2.
    assert measure(a, b, first=2).first_step == 1
    b[0] = 1
    assert measure(a, b, first=2).first_step == 0


def test_nan_is_never_equal_and_never_lost():
    nan, number = torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])
    for left, right in ((nan, nan), (nan, number), (number, nan)):
        for found in (measure(left, right), measure_samples([number, left], [number, right])):
            assert found.equal is False
            assert math.isnan(found.max_abs) and math.isnan(found.mean_abs) and math.isnan(found.min_cosine)


def test_another_dtype_is_not_equal_though_the_numbers_are():
    found = measure(torch.ones(2), torch.ones(2).bfloat16())
    assert found.equal is False
    assert found.note == "bfloat16 instead of float32"


def test_another_shape_is_not_equal_and_has_no_figures():
    found = measure(torch.ones(2, 3), torch.ones(2, 4))
    assert (found.equal, found.max_abs, found.min_cosine) == (False, None, None)
    assert found.note == "shape [2, 4] instead of [2, 3]"


def test_masks_have_figures_and_plain_data_has_none():
    assert measure(torch.tensor([True, False]), torch.tensor([True, True])).max_abs == 1.0
    assert measure([[[1, 4, 6]]], [[[1, 4, 6]]]).equal and measure("a", "a").equal
    assert measure([7], [8]) == Measure(equal=False, max_abs=None, mean_abs=None, min_cosine=None)


def test_the_worst_sample_counts():
    good, bad = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    found = measure_samples([good, good], [good, bad], first_rows=1)
    assert (found.equal, found.max_abs, found.first_step) == (False, 2.0, 2)
    assert found.mean_abs == pytest.approx(2 / 12, abs=1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_rollout_is_compared(family):
    rollout = make_rollout(family=family)
    seen = {id(value) for _, value in values_of(rollout)}
    for name, tensor in tensors_of(rollout):
        assert id(tensor) in seen, name
    for branch in (rollout.denoising_env.pos_cond_kwargs, rollout.denoising_env.neg_cond_kwargs):
        for key, value in branch.items():
            assert id(value) in seen, key


def test_a_rollout_equals_itself_in_every_value():
    found = compare_rollouts("sde", [make_rollout()], [make_rollout()])
    assert {tensor.name for tensor in found} == set(dict(values_of(make_rollout())))
    assert all(tensor.whole.equal and (tensor.first is None or tensor.first.equal) for tensor in found)


@pytest.mark.parametrize(
    "name",
    ["image", "log_probs", "dit_trajectory.latents", "dit_trajectory.sigmas"]
    + [f"debug_tensors.{name}" for name in ("variance_noise", "prev_sample_mean", "noise_std_dev", "model_output")],
)
def test_a_change_of_one_tensor_is_found_there_and_nowhere_else(name):
    changed = make_rollout()
    with torch.no_grad():
        dict(values_of(changed))[name].view(-1)[-1] += 1
    found = compare_rollouts("sde", [make_rollout(seed=5), make_rollout()], [make_rollout(seed=5), changed])
    [tensor] = [tensor for tensor in found if not tensor.whole.equal]
    assert tensor.name == name
    # The last number belongs to the last step.
    assert tensor.first is None or tensor.first.equal
    assert tensor.whole.first_step == (None if name == "image" else 3)


@pytest.mark.parametrize("row", [0, 1])
def test_the_first_step_of_the_latents_is_what_it_starts_from_and_what_it_makes(row):
    changed = make_rollout()
    changed.dit_trajectory.latents[row] += 1
    found = {each.name: each for each in compare_rollouts("sde", [make_rollout()], [changed])}
    assert found["dit_trajectory.latents"].first.equal is False


def test_a_change_in_the_env_is_found_in_its_branch():
    changed = make_rollout()
    changed.denoising_env.neg_cond_kwargs["encoder_hidden_states_mask"][0] = False
    found = compare_rollouts("sde", [make_rollout()], [changed])
    assert [each.name for each in found if not each.whole.equal] == ["denoising_env.neg_cond_kwargs.encoder_hidden_states_mask"]


def test_what_is_missing_is_not_equal():
    names = [f"debug_tensors.{name}" for name in ("variance_noise", "prev_sample_mean", "noise_std_dev", "model_output")]
    found = compare_rollouts("sde", [make_rollout()], [make_rollout(debug_tensors=None)])
    assert {each.name: each.whole.note for each in found if not each.whole.equal} == dict.fromkeys(names, "missing")
    found = compare_rollouts("sde", [make_rollout(debug_tensors=None)], [make_rollout()])
    assert "not there on one rank" in {each.whole.note for each in found}


def test_how_a_sample_was_made_is_compared():
    rollout = make_rollout()
    other = replace(rollout, sampling=replace(rollout.sampling, guidance_scale=5))
    assert [each.name for each in compare_rollouts("sde", [rollout], [other]) if not each.whole.equal] == ["sampling"]


def test_what_a_sample_was_drawn_from_is_compared_and_what_the_engine_says_of_itself_is_not():
    rollout = make_rollout()
    proof = rollout.provenance
    other = replace(proof, layout="sp2", strategy="alone", versions={"torch": "3"}, weights_sha256="0" * 64)
    assert all(one.whole.equal for one in compare_rollouts("sde", [rollout], [replace(rollout, provenance=other)]))
    odd = replace(rollout, provenance=replace(other, noise_sha256=(None,) * 4))
    assert [one.name for one in compare_rollouts("sde", [rollout], [odd]) if not one.whole.equal] == ["provenance.noise_sha256"]
