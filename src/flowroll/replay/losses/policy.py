"""Losses of policy gradients: a step in the direction of the advantage, with a bound on how far it goes.

A mean here is over the pairs of one call. That of a micro-batch, multiplied by its `MicroBatch.weight`, leaves the gradient of
the mean over all pairs, however they were divided.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.replay.losses.checks import LOOK, check_finite, check_positive, check_some, check_weights


def clipped_loss(
    ratios: Float[Tensor, " pairs"],
    advantages: Float[Tensor, " pairs"],
    *,
    clip_range: float = 1e-4,
    max_advantage: float = 5.0,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the clipped surrogate of PPO, to be minimised.

        mean of w max(-A r, -A clip(r, 1 - c, 1 + c)), with A clipped to +-max_advantage

    Args:
        ratios: r, from `ratio` or `normalised_ratio`.
        advantages: A of each pair's sample.
        clip_range: c > 0. Per-element log-probs move little: the papers' codes use 1e-4 and less.
        max_advantage: Bound on |A|.
        weights: w per pair, such as GRPO-Guard's 1 / -dt, or `importance_weights`; None: 1.

    Returns:
        A scalar.

    Raises:
        InvalidRequestError: There are no pairs; a ratio, an advantage or a weight is not finite (says at which pairs); or a
            bound is not above 0.

    Reference:
        Schulman et al., "Proximal Policy Optimization" (arXiv:1707.06347), equation 7; as in Flow-GRPO (arXiv:2505.05470),
        DanceGRPO (arXiv:2505.07818) and Li et al., "MixGRPO" (arXiv:2507.21802), whose pairs are those of a window of steps.
    """
    check_positive("clip_range", clip_range)
    check_positive("max_advantage", max_advantage)
    _check_pairs(ratios, advantages, weights)
    bounded = advantages.clamp(-max_advantage, max_advantage)
    losses = torch.maximum(-bounded * ratios, -bounded * ratios.clamp(1 - clip_range, 1 + clip_range))
    return _mean(losses, weights)


def masked_loss(
    ratios: Float[Tensor, " pairs"],
    advantages: Float[Tensor, " pairs"],
    divergences: Float[Tensor, " pairs"],
    *,
    max_divergence: float = 1e-5,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the surrogate of Flow-DPPO, to be minimised: its bound is on the divergence, and not on the ratio.

        mean of w (-A r), where a pair counts 0 if its divergence is at least max_divergence and its ratio is on the far side
        of 1 already: above 1 for A > 0, below it for A < 0

    Args:
        ratios: r, from `ratio`.
        advantages: A of each pair's sample, as it is.
        divergences: The divergences of the current policy from the one that rolled out, from `losses.divergences`.
            They have no gradient here.
        max_divergence: The divergence from which on no pair takes the policy further.
        weights: w per pair; None: 1.

    Returns:
        A scalar.

    Raises:
        InvalidRequestError: There are no pairs; a value is not finite (says at which pairs); or the bound is not above 0.

    Reference:
        "Flow-DPPO" (arXiv:2606.11025), as in its authors' UniRL (Tencent-Hunyuan/UniRL, `flowdppo.py`) and in verl-omni.
    """
    check_positive("max_divergence", max_divergence)
    _check_pairs(ratios, advantages, weights)
    check_finite("divergences", divergences, "pair", LOOK)
    goes_on = ((ratios > 1) & (advantages > 0)) | ((ratios < 1) & (advantages < 0))
    is_masked = goes_on & (divergences >= max_divergence)
    return _mean((-advantages * ratios).masked_fill(is_masked, 0.0), weights)


def _check_pairs(ratios: Tensor, advantages: Tensor, weights: Tensor | None) -> None:
    check_some("ratios", ratios)
    check_finite("ratios", ratios, "pair", LOOK)
    check_finite("advantages", advantages, "pair", 'make them with group_advantages(..., nonfinite="drop")')
    check_weights(weights)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return (losses if weights is None else losses * weights).mean()
