"""The losses of the GRPO family on flow-matching log-probs: small, pure, differentiable.

Log-probs here are flowroll's: per step, averaged over the elements of a sample's latents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowroll.errors import InvalidRequestError


def group_advantages(
    rewards: Float[Tensor, " samples"],
    groups: Int[Tensor, " samples"],
    *,
    std: str = "group",
    eps: float = 1e-4,
) -> Float[Tensor, " samples"]:
    """How much better a sample is than the samples of its own prompt.

        A_i = (r_i - mean of its group) / (std + eps)

    Args:
        rewards: r, one per sample.
        groups: Samples with the same number have the same prompt.
        std: "group": of the sample's own group, "global": of all rewards; the population std, without Bessel's correction.
        eps: Added to the std, so that a group of equal rewards gives 0.

    Returns:
        float32.

    Raises:
        InvalidRequestError: `std` is neither of the two.

    Reference:
        Liu et al., "Flow-GRPO" (arXiv:2505.05470), which takes the group's std; its public code (yifan123/flow_grpo,
        `stat_tracking.py`) has the global std as an option, and this eps. GRPO is of Shao et al., "DeepSeekMath"
        (arXiv:2402.03300).
    """
    if std not in ("group", "global"):
        raise InvalidRequestError(f"std must be group or global, got {std!r}; choose one of the two.", field="std")
    values = rewards.to(torch.float64)
    _, member = torch.unique(groups, return_inverse=True)
    count = torch.bincount(member).to(torch.float64)
    centred = values - (torch.bincount(member, weights=values) / count)[member]
    if std == "global":
        scale = (values - values.mean()).square().mean().sqrt()
    else:
        scale = (torch.bincount(member, weights=centred.square()) / count).sqrt()[member]
    return (centred / (scale + eps)).to(torch.float32)


def ratio(log_probs: Float[Tensor, " *pairs"], old_log_probs: Float[Tensor, " *pairs"]) -> Float[Tensor, " *pairs"]:
    """The importance ratio exp(log p - log p_old); exactly 1 where the two have the same bits.

    Reference:
        Flow-GRPO (arXiv:2505.05470) and Xue et al., "DanceGRPO" (arXiv:2505.07818) use it per step.
    """
    return torch.exp(log_probs - old_log_probs)


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

    Reference:
        Wang et al., "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping"
        (arXiv:2510.22319), RatioNorm. With weights of 1 / -dt,
        `clipped_loss` has the paper's gradient reweighting too.
    """
    drift = (means - old_means).to(torch.float32).square().flatten(1).mean(dim=1)
    return torch.exp(stds * (log_probs - old_log_probs + drift / (2 * stds.square())))


def clipped_loss(
    ratios: Float[Tensor, " pairs"],
    advantages: Float[Tensor, " pairs"],
    *,
    clip_range: float = 1e-4,
    max_advantage: float = 5.0,
    weights: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, ""]:
    """The clipped surrogate of PPO, to be minimised.

        mean of w max(-A r, -A clip(r, 1 - c, 1 + c)), with A clipped to +-max_advantage

    Args:
        ratios: r, from `ratio` or `normalised_ratio`.
        advantages: A of each pair's sample.
        clip_range: c > 0. Per-element log-probs move little: the papers' codes use 1e-4 and less.
        max_advantage: Bound on |A|.
        weights: w per pair, such as GRPO-Guard's 1 / -dt; None: 1.

    Returns:
        A scalar.

    Reference:
        Schulman et al., "Proximal Policy Optimization" (arXiv:1707.06347), equation 7; as in Flow-GRPO (arXiv:2505.05470) and
        DanceGRPO (arXiv:2505.07818).
    """
    bounded = advantages.clamp(-max_advantage, max_advantage)
    losses = torch.maximum(-bounded * ratios, -bounded * ratios.clamp(1 - clip_range, 1 + clip_range))
    return (losses if weights is None else losses * weights).mean()
