"""The losses of the GRPO family on flow-matching log-probs: small, pure, differentiable.

Log-probs here are flowroll's: per step, averaged over the elements of a sample's latents. One NaN would spread to every number
of a batch, so values that are not finite are refused, and the message says which they are.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowroll.errors import InvalidRequestError

_MOST_SHOWN = 20
_LOOK = "look at these pairs in replay.audit, or lower the learning rate"


def group_advantages(
    rewards: Float[Tensor, " samples"],
    groups: Int[Tensor, " samples"],
    *,
    std: str = "group",
    eps: float = 1e-4,
    nonfinite: str = "refuse",
) -> Float[Tensor, " samples"]:
    """Returns how much better a sample is than the samples of its own prompt.

        A_i = (r_i - mean of its group) / (std + eps), or 0 where the denominator is 0

    Args:
        rewards: r, one per sample.
        groups: Samples with the same number have the same prompt.
        std: "group": of the sample's own group, "global": of all rewards; the population std, without Bessel's correction.
        eps: Added to the std, so that rewards that are nearly equal are not blown up; finite, 0 or more.
        nonfinite: What becomes of a reward that is NaN or infinite. "refuse": it is an error that names the samples. "drop":
            its sample gets the advantage 0 and counts neither in a mean nor in a std.

    Returns:
        float32.

    Raises:
        InvalidRequestError: A reward is not finite, or `std`, `eps` or `nonfinite` is none of what it may be.

    Reference:
        Liu et al., "Flow-GRPO" (arXiv:2505.05470), which takes the group's std; its public code (yifan123/flow_grpo,
        `stat_tracking.py`) has the global std as an option, and this eps. GRPO is of Shao et al., "DeepSeekMath"
        (arXiv:2402.03300).
    """
    if std not in ("group", "global"):
        raise InvalidRequestError(f"std must be group or global, got {std!r}; choose one of the two.", field="std")
    if nonfinite not in ("refuse", "drop"):
        raise InvalidRequestError(
            f"nonfinite must be refuse or drop, got {nonfinite!r}; choose one of the two.", field="nonfinite"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise InvalidRequestError(f"eps must be finite and 0 or more, got {eps}; leave it out.", field="eps")
    if nonfinite == "refuse":
        _check_finite("rewards", rewards, "sample", 'reward these samples again, or leave them out with nonfinite="drop"')
    kept = rewards.isfinite()
    values = rewards.to(torch.float64).masked_fill(~kept, 0.0)
    _, member = torch.unique(groups, return_inverse=True)
    # A group whose samples are all dropped has no mean, and nobody asks for it.
    count = torch.bincount(member, weights=kept.to(torch.float64)).clamp(min=1.0)
    centred = (values - (torch.bincount(member, weights=values) / count)[member]).masked_fill(~kept, 0.0)
    if std == "global":
        scale = (values[kept] - values[kept].mean()).square().mean().sqrt()
    else:
        scale = (torch.bincount(member, weights=centred.square()) / count).sqrt()[member]
    # Where the denominator is 0, so is the distance.
    return torch.where(centred == 0, 0.0, centred / (scale + eps)).to(torch.float32)


def ratio(log_probs: Float[Tensor, " *pairs"], old_log_probs: Float[Tensor, " *pairs"]) -> Float[Tensor, " *pairs"]:
    """Returns the importance ratio exp(log p - log p_old); exactly 1 where the two have the same bits.

    Raises:
        InvalidRequestError: A log-prob, or a ratio, is not finite; says at which pairs.

    Reference:
        Flow-GRPO (arXiv:2505.05470) and Xue et al., "DanceGRPO" (arXiv:2505.07818) use it per step.
    """
    _check_log_probs(log_probs, old_log_probs)
    return _finite_ratio(torch.exp(log_probs - old_log_probs))


def normalised_ratio(
    log_probs: Float[Tensor, " pairs"],
    old_log_probs: Float[Tensor, " pairs"],
    means: Float[Tensor, " pairs *latent"],
    old_means: Float[Tensor, " pairs *latent"],
    stds: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """GRPO-Guard's ratio: the bias of log p - log p_old is added back, and its spread made the same at every step.

        exp(std (log p - log p_old + mean (m - m_old)^2 / (2 std^2)))

    For x' drawn from the old policy the bracket is the mean over the elements of (m - m_old) z / std, whose expectation is 0;
    the factor std in front takes the step out of its spread. Where nothing has changed the ratio is exactly 1.

    Args:
        log_probs: Of the current policy, with constants (not the `no_const` convention).
        old_log_probs: Of the policy that rolled out.
        means: Mean of the next latents under the current policy.
        old_means: The same under the old one (`debug_tensors.prev_sample_mean`).
        stds: Total std of the transitions (the paper's sigma_t sqrt(dt)), above 0.

    Raises:
        InvalidRequestError: A value is not finite, or a std not above 0; says at which pairs.

    Reference:
        Wang et al., "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping"
        (arXiv:2510.22319), RatioNorm. With weights of 1 / -dt,
        `clipped_loss` has the paper's gradient reweighting too.
    """
    _check_log_probs(log_probs, old_log_probs)
    _check_finite("means", means, "pair", _LOOK)
    _check_finite("old_means", old_means, "pair", _LOOK)
    _refuse_where(
        ~(stds > 0) | stds.isinf(), "stds", "be finite and above 0", stds, "pair", "take the pairs of sde_step_indices"
    )
    drift = (means - old_means).to(torch.float32).square().flatten(1).mean(dim=1)
    return _finite_ratio(torch.exp(stds * (log_probs - old_log_probs + drift / (2 * stds.square()))))


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
        weights: w per pair, such as GRPO-Guard's 1 / -dt; None: 1.

    Returns:
        A scalar.

    Raises:
        InvalidRequestError: There are no pairs; a ratio, an advantage or a weight is not finite (says at which pairs); or a
            bound is not above 0.

    Reference:
        Schulman et al., "Proximal Policy Optimization" (arXiv:1707.06347), equation 7; as in Flow-GRPO (arXiv:2505.05470) and
        DanceGRPO (arXiv:2505.07818).
    """
    for field, bound in (("clip_range", clip_range), ("max_advantage", max_advantage)):
        if not bound > 0:
            raise InvalidRequestError(f"{field} must be above 0, got {bound}; leave it out.", field=field)
    if ratios.numel() == 0:
        raise InvalidRequestError("ratios must be of at least one pair, got none; skip this batch.", field="ratios")
    _check_finite("ratios", ratios, "pair", _LOOK)
    _check_finite("advantages", advantages, "pair", 'make them with group_advantages(..., nonfinite="drop")')
    if weights is not None:
        _check_finite("weights", weights, "pair", "leave these pairs out")
    bounded = advantages.clamp(-max_advantage, max_advantage)
    losses = torch.maximum(-bounded * ratios, -bounded * ratios.clamp(1 - clip_range, 1 + clip_range))
    return (losses if weights is None else losses * weights).mean()


def _check_log_probs(log_probs: Tensor, old_log_probs: Tensor) -> None:
    _check_finite("log_probs", log_probs, "pair", _LOOK)
    _check_finite("old_log_probs", old_log_probs, "pair", "leave these pairs out")


def _finite_ratio(ratios: Tensor) -> Tensor:
    _check_finite("ratios", ratios, "pair", "the policy has moved too far from the one that rolled out; update it more often")
    return ratios


def _check_finite(subject: str, values: Tensor, unit: str, remedy: str) -> None:
    _refuse_where(~values.isfinite(), subject, "be finite", values, unit, remedy)


def _refuse_where(is_wrong: Tensor, subject: str, rule: str, values: Tensor, unit: str, remedy: str) -> None:
    """Refuses values, and says of which samples or pairs the wrong ones are: by number, or by row and column of a ratio."""
    if not is_wrong.any():
        return
    # Of latents, the pair alone tells.
    places = [tuple(place) for place in (is_wrong.flatten(1).any(1) if is_wrong.ndim > 2 else is_wrong).nonzero().tolist()]
    shown = ", ".join(str(place[0] if len(place) == 1 else place) for place in places[:_MOST_SHOWN])
    more = f" and {len(places) - _MOST_SHOWN} more" if len(places) > _MOST_SHOWN else ""
    where = f" at {unit}{'s' if len(places) > 1 else ''} {shown}{more}" if places[0] else ""
    raise InvalidRequestError(f"{subject} must {rule}, got {values[is_wrong][0].item()}{where}; {remedy}.", field=subject)
