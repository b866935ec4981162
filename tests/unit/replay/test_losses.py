"""The losses, against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flowroll.errors import InvalidRequestError
from flowroll.replay import (
    clipped_loss,
    divergences,
    group_advantages,
    importance_weights,
    masked_loss,
    nft_loss,
    normalised_ratio,
    optimality,
    ratio,
)

# What verl-omni's losses make of drawn numbers; see tests/data/README.md.
PEER: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data/losses.json").read_text())
INPUTS = {name: torch.tensor(value) for name, value in PEER["inputs"].items()}
STDS = torch.full((6,), INPUTS["std_dev_t"] * INPUTS["sqrt_dt"])


def test_an_advantage_is_the_distance_to_the_groups_mean_in_the_groups_std() -> None:
    # Group 5 has rewards 1, 3 (mean 2, std 1); group 2 has 0, 0, 6 (mean 2, std sqrt(8)).
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.0, 6.0])
    groups = torch.tensor([5, 2, 5, 2, 2])
    root = math.sqrt(8)
    expected = torch.tensor([-1, -2 / root, 1, -2 / root, 4 / root])
    torch.testing.assert_close(group_advantages(rewards, groups, eps=0.0), expected)


def test_the_global_std_is_that_of_all_rewards_the_mean_stays_the_groups() -> None:
    rewards = torch.tensor([1.0, 2.0, 5.0, 4.0])
    groups = torch.tensor([0, 0, 1, 1])
    # mean 3: deviations -2, -1, 2, 1, squares 4 + 1 + 4 + 1 = 10, std sqrt(2.5).
    expected = torch.tensor([-0.5, 0.5, 0.5, -0.5]) / (math.sqrt(2.5) + 0.1)
    torch.testing.assert_close(group_advantages(rewards, groups, std="global", eps=0.1), expected)


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    assert group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long)).tolist() == [0.0] * 3


def test_an_unknown_std_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="std must be group, global or none, got 'batch'"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long), std="batch")  # type: ignore[arg-type]


def test_the_ratio_is_exactly_one_for_the_same_bits() -> None:
    log_probs = torch.randn(100)
    assert torch.equal(ratio(log_probs, log_probs.clone()), torch.ones(100))
    assert ratio(torch.tensor(math.log(3.0)), torch.tensor(0.0)).item() == pytest.approx(3)


def test_the_loss_stops_an_update_that_has_gone_far_enough() -> None:
    # r = 1.5 and 0.5, clipped to 1.2 and 0.8; A = 2 and -2: max(-3, -2.4) = -2.4 and max(1, 1.6) = 1.6; mean -0.4.
    ratios = torch.tensor([1.5, 0.5], requires_grad=True)
    loss = clipped_loss(ratios, torch.tensor([2.0, -2.0]), clip_range=0.2)
    assert loss.item() == pytest.approx(-0.4)
    loss.backward()
    assert ratios.grad is not None and ratios.grad.tolist() == [0.0, 0.0]


def test_the_loss_pulls_back_what_went_the_wrong_way() -> None:
    # A = -2 at r = 1.5: max(3, 2.4) = 3; A = 2 at r = 0.5: max(-1, -1.6) = -1. Gradients -A / 2.
    ratios = torch.tensor([1.5, 0.5], requires_grad=True)
    loss = clipped_loss(ratios, torch.tensor([-2.0, 2.0]), clip_range=0.2)
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert ratios.grad is not None and ratios.grad.tolist() == [1.0, -1.0]


def test_advantages_are_bounded_and_pairs_weighted() -> None:
    # A = 9 counts as 5: -5 and +5 weighted 1 and 3, mean (-5 + 15) / 2.
    loss = clipped_loss(torch.ones(2), torch.tensor([9.0, -9.0]), weights=torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(5.0)


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient() -> None:
    log_probs = torch.tensor([-1.0, -1.2], requires_grad=True)
    clipped_loss(ratio(log_probs, log_probs.detach()), torch.tensor([0.5, -3.0])).backward()
    assert log_probs.grad is not None and log_probs.grad.tolist() == [-0.25, 1.5]


def test_the_normalised_ratio_by_hand() -> None:
    # std 0.5, means 0.1 and 0.3 off: drift (0.01 + 0.09) / 2 = 0.05, over 2 * 0.25 gives 0.1; exp(0.5 (-0.3 + 0.1)).
    means, old_means = torch.tensor([[0.1, -0.3]]), torch.zeros(1, 2)
    value = normalised_ratio(torch.tensor([-1.3]), torch.tensor([-1.0]), means, old_means, torch.tensor([0.5]))
    assert value.item() == pytest.approx(math.exp(-0.1))


def test_the_normalised_ratio_is_exactly_one_where_nothing_changed() -> None:
    log_probs, means = torch.randn(5), torch.randn(5, 7, 3)
    value = normalised_ratio(log_probs, log_probs.clone(), means, means.clone(), torch.rand(5) + 0.1)
    assert torch.equal(value, torch.ones(5))


def test_the_normalised_ratio_has_no_bias_and_one_spread_for_all_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, elements = 4000, 16
    old = torch.zeros(samples, elements)
    new = old + 0.02
    for std in (0.05, 0.5):
        drawn = old + std * torch.randn(samples, elements, generator=generator)
        stds = torch.full((samples,), std)
        new_log, old_log = (-((drawn - mean) ** 2).mean(dim=1) / (2 * std**2) for mean in (new, old))
        plain = ratio(new_log, old_log).log()
        normalised = normalised_ratio(new_log, old_log, new, old, stds).log()
        # Standard deviation 0.02 / sqrt(16) whatever the std; the mean within four standard errors of 0.
        assert abs(normalised.mean().item()) < 4 * 0.005 / math.sqrt(samples)
        assert normalised.std().item() == pytest.approx(0.005, rel=0.05)
        assert plain.mean().item() < normalised.mean().item()


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_rewards_that_are_not_finite_are_refused_by_sample(std: str, wrong: float) -> None:
    rewards, groups = torch.tensor([1.0, wrong, 2.0, NAN]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(
        InvalidRequestError, match=rf"rewards must be finite, got {wrong} at samples 1, 3; .*nonfinite=\"drop\""
    ):
        group_advantages(rewards, groups, std=std)
    many = torch.full((30,), wrong)
    with pytest.raises(InvalidRequestError, match=r"at samples 0, 1, .*, 19 and 10 more; "):
        group_advantages(many, torch.zeros(30, dtype=torch.long), std=std)


@pytest.mark.parametrize("std", ["group", "global"])
def test_dropped_samples_leave_the_others_as_if_they_had_never_been(std: str) -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, 4.0, -INF, 5.0, NAN])
    # Group 7 loses all its samples.
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 7])
    kept = rewards.isfinite()
    found = group_advantages(rewards, groups, std=std, nonfinite="drop")
    assert torch.equal(found[kept], group_advantages(rewards[kept], groups[kept], std=std))
    assert found[~kept].tolist() == [0.0, 0.0, 0.0] and found[kept].abs().min() > 0


def test_all_samples_may_be_dropped() -> None:
    for std in ("group", "global"):
        found = group_advantages(torch.tensor([NAN, INF]), torch.tensor([0, 1]), std=std, nonfinite="drop")
        assert found.tolist() == [0.0, 0.0]


def test_no_std_and_no_eps_give_no_nan() -> None:
    for std in ("group", "global"):
        assert group_advantages(torch.ones(3), torch.zeros(3, dtype=torch.long), std=std, eps=0.0).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nonfinite": "ignore"}, "nonfinite must be refuse or drop, got 'ignore'"),
        ({"eps": NAN}, "eps must be finite and 0 or more, got nan"),
        ({"eps": -1.0}, r"eps must be finite and 0 or more, got -1\.0"),
    ],
)
def test_bad_options_of_advantages_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long), **options)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_log_probs_that_are_not_finite_are_refused_by_pair(wrong: float) -> None:
    good, bad = torch.zeros(4), torch.tensor([0.0, wrong, 0.0, wrong])
    with pytest.raises(InvalidRequestError, match=f"^log_probs must be finite, got {wrong} at pairs 1, 3; .*replay.audit"):
        ratio(bad, good)
    with pytest.raises(InvalidRequestError, match=f"^old_log_probs must be finite, got {wrong} at pairs 1, 3; leave"):
        ratio(good, bad)
    # Equal infinities give a ratio of NaN, and never 1.
    with pytest.raises(InvalidRequestError, match=r"^log_probs"):
        ratio(bad, bad.clone())
    with pytest.raises(InvalidRequestError, match=rf"got {wrong} at pair \(1, 0\); "):
        ratio(bad[:2].reshape(2, 1), good[:2].reshape(2, 1))


def test_a_ratio_beyond_all_floats_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"ratios must be finite, got inf at pair 1; .*update it more often"):
        ratio(torch.tensor([0.0, 100.0]), torch.zeros(2))
    means = torch.ones(2, 3)
    with pytest.raises(InvalidRequestError, match="ratios must be finite, got inf at pair 0"):
        normalised_ratio(torch.tensor([100.0, 0.0]), torch.zeros(2), means, means, torch.ones(2))


@pytest.mark.parametrize("field", ["log_probs", "old_log_probs", "means", "old_means", "stds"])
@pytest.mark.parametrize("wrong", [NAN, INF])
def test_the_normalised_ratio_refuses_what_is_not_finite_by_pair(field: str, wrong: float) -> None:
    values = {
        "log_probs": torch.zeros(3),
        "old_log_probs": torch.zeros(3),
        "means": torch.zeros(3, 2, 2),
        "old_means": torch.zeros(3, 2, 2),
        "stds": torch.ones(3),
    }
    normalised_ratio(**values)
    values[field][2] = wrong
    with pytest.raises(InvalidRequestError, match=f"^{field} must be finite.*, got {wrong} at pair 2; "):
        normalised_ratio(**values)


def test_a_deterministic_step_has_no_normalised_ratio() -> None:
    means = torch.zeros(2, 3)
    with pytest.raises(InvalidRequestError, match=r"stds must be finite and above 0, got 0\.0 at pair 1; .*sde_step_indices"):
        normalised_ratio(torch.zeros(2), torch.zeros(2), means, means, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("field", ["ratios", "advantages", "weights"])
@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_the_loss_refuses_what_is_not_finite_by_pair(field: str, wrong: float) -> None:
    values = {"ratios": torch.ones(3), "advantages": torch.ones(3), "weights": torch.ones(3)}
    values[field][1] = wrong
    with pytest.raises(InvalidRequestError, match=f"^{field} must be finite, got {wrong} at pair 1; "):
        clipped_loss(**values)


@pytest.mark.parametrize("options", [{"clip_range": NAN}, {"clip_range": 0.0}, {"max_advantage": NAN}, {"max_advantage": -5.0}])
def test_bounds_of_the_loss_are_above_zero(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{next(iter(options))} must be above 0, got"):
        clipped_loss(torch.ones(2), torch.ones(2), **options)


def test_a_loss_of_no_pairs_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="ratios must be of at least one pair, got none; skip this batch"):
        clipped_loss(torch.ones(0), torch.ones(0))


def test_the_losses_are_those_of_verl_omni() -> None:
    means = INPUTS["means"], INPUTS["old_means"]
    log_probs = INPUTS["log_probs"], INPUTS["old_log_probs"]
    advantages, weights, dt = INPUTS["advantages"], INPUTS["weights"], INPUTS["sqrt_dt"] ** 2
    flow_grpo, guard, dppo = PEER["flow_grpo"], PEER["grpo_guard"], PEER["flow_dppo"]
    bounds = {name: flow_grpo[name] for name in ("clip_range", "max_advantage")}
    drifts = divergences(*means, STDS)
    found = {
        "flow_grpo": clipped_loss(ratio(*log_probs), advantages, weights=weights, **bounds),
        "grpo_guard": clipped_loss(
            normalised_ratio(*log_probs, *means, STDS), advantages, weights=torch.full((6,), 1 / dt), **bounds
        ),
        "flow_dppo": masked_loss(ratio(*log_probs), advantages, drifts, max_divergence=dppo["max_divergence"], weights=weights),
        # Its std is without sqrt(dt).
        "kl": drifts.mean() * dt,
    }
    assert (guard["clip_range"], guard["max_advantage"]) == tuple(bounds.values())
    for name, loss in found.items():
        assert loss.item() == pytest.approx(PEER[name]["loss"], rel=1e-5), name
    # The bounds are met on both sides, or nothing was compared.
    assert 0 < (drifts >= dppo["max_divergence"]).sum() < 6
    assert ((ratio(*log_probs) - 1).abs() > flow_grpo["clip_range"]).any()


def test_the_loss_of_diffusion_nft_is_that_of_verl_omni() -> None:
    nft = PEER["nft"]
    names = ("velocities", "old_velocities", "targets", "sigmas", "optimalities")
    loss = nft_loss(*(torch.tensor(nft[name]) for name in names), beta=nft["beta"])
    # It multiplies by its bound on the advantages.
    assert loss.item() * nft["max_advantage"] == pytest.approx(nft["loss"], rel=1e-5)
    found = optimality(INPUTS["advantages"], max_advantage=nft["max_advantage"])
    torch.testing.assert_close(found, torch.tensor(nft["optimalities"]))


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_the_advantages_are_those_of_verl_omni(std: str) -> None:
    peer = PEER["advantages"]
    rewards, groups = torch.tensor(peer["rewards"]), torch.tensor(peer["groups"])
    found = group_advantages(rewards, groups, std=std, correction=1, eps=peer["eps"])
    torch.testing.assert_close(found, torch.tensor(peer[std]))


def test_a_divergence_by_hand() -> None:
    # Means 0.1 and 0.3 off: (0.01 + 0.09) / 2 over 2 * 0.25.
    means, old_means = torch.tensor([[0.1, -0.3]]), torch.zeros(1, 2)
    assert divergences(means, old_means, torch.tensor([0.5])).item() == pytest.approx(0.1)
    assert divergences(means, means.clone(), torch.tensor([0.5])).item() == 0


def test_pairs_that_are_far_and_go_on_are_masked() -> None:
    # Of both signs: far and going on (masked), far and coming back, near and going on.
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 0.5, 1.5], requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    drifts = torch.tensor([0.3, 0.3, 0.1, 0.3, 0.1, 0.3])
    loss = masked_loss(ratios, advantages, drifts, max_divergence=0.3)
    # -A r: 0, -1, -3, 0, 1, 3.
    assert loss.item() == pytest.approx(0.0)
    loss.backward()
    assert ratios.grad is not None
    assert [round(value * 6, 6) for value in ratios.grad.tolist()] == [0.0, -2.0, -2.0, 0.0, 2.0, 2.0]


def test_importance_weights_are_bounded_above_and_have_no_gradient() -> None:
    log_probs = torch.tensor([0.0, math.log(1.5), math.log(9.0), 1000.0], requires_grad=True)
    weights = importance_weights(log_probs, torch.zeros(4), max_weight=3.0)
    assert weights.tolist() == pytest.approx([1.0, 1.5, 3.0, 3.0])
    assert not weights.requires_grad


def test_the_loss_of_diffusion_nft_by_hand() -> None:
    # u = 0, v_old = 1, v = 2, b = 0.5: policies at 1.5 and 0.5. r = 0.75.
    latents = torch.ones(1, 2, 2)
    values = (2 * latents, latents, 0 * latents, torch.tensor([0.4]), torch.tensor([0.75]))
    plain = nft_loss(*values, beta=0.5, scale="velocity")
    assert plain.item() == pytest.approx((0.75 * 2.25 + 0.25 * 0.25) / 0.5)
    # (s w)^2 / (s w) = s w.
    assert nft_loss(*values, beta=0.5).item() == pytest.approx(0.4 * (0.75 * 1.5 + 0.25 * 0.5) / 0.5)


def test_a_good_sample_pulls_and_a_bad_one_pushes() -> None:
    target, old = torch.ones(1, 3), torch.zeros(1, 3)
    for scale in ("adaptive", "velocity"):
        for optimal, sign in ((1.0, -1), (0.0, 1), (0.5, 0)):
            velocity = torch.zeros(1, 3, requires_grad=True)
            nft_loss(velocity, old, target, torch.tensor([0.5]), torch.tensor([optimal]), scale=scale).backward()
            assert velocity.grad is not None and velocity.grad.sign().tolist() == [[sign] * 3]


def test_the_std_of_the_adaptive_loss_has_no_gradient() -> None:
    # (s w)^2 / (s |w|) with the divisor held: 2 s |w| and not s.
    velocity = torch.tensor([[3.0]], requires_grad=True)
    nft_loss(velocity, velocity.detach(), torch.zeros(1, 1), torch.tensor([0.5]), torch.tensor([1.0])).backward()
    assert velocity.grad is not None and velocity.grad.item() == pytest.approx(2 * 0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beta": 0.0}, r"beta must be above 0, got 0\.0"),
        ({"scale": "clean"}, "scale must be adaptive or velocity, got 'clean'"),
        ({"sigmas": torch.tensor([0.5, 0.0])}, r"sigmas must lie in \(0, 1\], got 0\.0 at pair 1"),
        ({"optimalities": torch.tensor([1.5, 0.0])}, r"optimalities must lie in \[0, 1\], got 1\.5 at pair 0"),
        ({"optimalities": torch.tensor([0.5, NAN])}, r"optimalities must lie in \[0, 1\], got nan at pair 1"),
        ({"velocities": torch.tensor([[[0.0]], [[NAN]]])}, "velocities must be finite, got nan at pair 1"),
        ({"old_velocities": torch.tensor([[[INF]], [[0.0]]])}, "old_velocities must be finite, got inf at pair 0"),
        ({"targets": torch.tensor([[[INF]], [[0.0]]])}, "targets must be finite, got inf at pair 0"),
    ],
)
def test_the_loss_of_diffusion_nft_refuses_what_would_spoil_it(values: dict[str, Any], words: str) -> None:
    zeros = {name: torch.zeros(2, 1, 1) for name in ("velocities", "old_velocities", "targets")}
    with pytest.raises(InvalidRequestError, match=words):
        nft_loss(**{**zeros, "sigmas": torch.full((2,), 0.5), "optimalities": torch.full((2,), 0.5), **values})


def test_the_loss_of_diffusion_nft_of_no_pairs_is_refused() -> None:
    none = torch.zeros(0, 3)
    with pytest.raises(InvalidRequestError, match="velocities must be of at least one pair"):
        nft_loss(none, none, none, torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: optimality(torch.tensor([NAN])), "advantages must be finite, got nan at sample 0"),
        (lambda: optimality(torch.ones(1), max_advantage=0.0), "max_advantage must be above 0"),
        (lambda: importance_weights(torch.zeros(1), torch.zeros(1), max_weight=NAN), "max_weight must be above 0, got nan"),
        (lambda: importance_weights(torch.zeros(1), torch.tensor([INF])), "old_log_probs must be finite, got inf at pair 0"),
        (lambda: masked_loss(torch.ones(1), torch.ones(1), torch.tensor([NAN])), "divergences must be finite, got nan"),
        (lambda: masked_loss(torch.ones(1), torch.ones(1), torch.ones(1), max_divergence=-1.0), "max_divergence must be above"),
        (lambda: masked_loss(torch.ones(0), torch.ones(0), torch.ones(0)), "ratios must be of at least one pair"),
        (lambda: group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long), correction=2), "correction must be 0 or 1"),
    ],
)
def test_bad_values_of_the_other_losses_are_refused(call: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        call()
