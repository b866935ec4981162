"""How far one policy is from another, by the densities of their transitions.

Log-probs here are averaged over the elements of a sample's latents, as a request without `log_prob` returns them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.replay.losses.checks import LOOK, check_finite, check_means, check_positive, check_stds


def ratio(log_probs: Float[Tensor, " *pairs"], old_log_probs: Float[Tensor, " *pairs"]) -> Float[Tensor, " *pairs"]:
    """Returns the importance ratio exp(log p - log p_old); exactly 1 where the two have the same bits.

    Raises:
        InvalidRequestError: A log-prob, or a ratio, is not finite; says at which pairs.

    Reference:
        Flow-GRPO (arXiv:2505.05470) and Xue et al., "DanceGRPO" (arXiv:2505.07818) use it per step.
    """
    _check_log_probs(log_probs, old_log_probs)
    return _finite_ratio(torch.exp(log_probs - old_log_probs))


def divergences(
    means: Float[Tensor, " pairs *latent"], old_means: Float[Tensor, " pairs *latent"], stds: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Returns the KL divergence of two policies' transitions of the same std, averaged over the elements.

        mean over the elements of (m - m_old)^2 / (2 std^2)

    The mean over the pairs is a penalty for leaving a reference policy, whose means a replay with its weights gives. The public
    code of Flow-GRPO divides by the square of a std without sqrt(dt): multiply by -dt to have its values.

    Args:
        means: Mean of the next latents under the current policy.
        old_means: The same under the other one: the policy that rolled out (`debug_tensors.prev_sample_mean`), or a reference.
        stds: Total std of the transitions (sigma_t sqrt(dt)), above 0.

    Returns:
        float32, differentiable in the means.

    Raises:
        InvalidRequestError: A mean is not finite, or a std not above 0; says at which pairs.

    Reference:
        Flow-GRPO (arXiv:2505.05470).
    """
    check_means("means", means)
    check_means("old_means", old_means)
    check_stds(stds)
    drift = (means - old_means).to(torch.float32).square().flatten(1).mean(dim=1)
    return drift / (2 * stds.square())


def normalised_ratio(
    log_probs: Float[Tensor, " pairs"],
    old_log_probs: Float[Tensor, " pairs"],
    means: Float[Tensor, " pairs *latent"],
    old_means: Float[Tensor, " pairs *latent"],
    stds: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Returns GRPO-Guard's ratio: the bias of log p - log p_old is added back, and its spread made the same at every step.

        exp(std (log p - log p_old + mean (m - m_old)^2 / (2 std^2)))

    For x' drawn from the old policy the bracket is the mean over the elements of (m - m_old) z / std, whose expectation is 0;
    the factor std in front takes the step out of its spread. Where nothing has changed the ratio is exactly 1.

    Args:
        log_probs: The log-probs of the current policy, with constants (not the `no_const` convention).
        old_log_probs: The log-probs of the policy that rolled out.
        means: Mean of the next latents under the current policy.
        old_means: The same under the old one (`debug_tensors.prev_sample_mean`).
        stds: Total std of the transitions (the paper's sigma_t sqrt(dt)), above 0.

    Raises:
        InvalidRequestError: A value is not finite, or a std not above 0; says at which pairs.

    Reference:
        Wang et al., "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping"
        (arXiv:2510.22319), RatioNorm. With weights of 1 / -dt, `clipped_loss` has the paper's gradient reweighting too.
    """
    _check_log_probs(log_probs, old_log_probs)
    return _finite_ratio(torch.exp(stds * (log_probs - old_log_probs + divergences(means, old_means, stds))))


def importance_weights(
    log_probs: Float[Tensor, " *pairs"], behavior_log_probs: Float[Tensor, " *pairs"], *, max_weight: float = 2.0
) -> Float[Tensor, " *pairs"]:
    """Returns truncated importance weights, for samples that another policy drew than the one that is improved.

        min(p / p_behavior, max_weight), without a gradient

    Given as the `weights` of a loss, they correct for weights that are some updates older, or for a trainer whose forwards are
    not the engine's. Log-probs summed over the steps of a sample give the weight of the whole trajectory.

    Args:
        log_probs: The log-probs of the policy that is improved, before its update.
        behavior_log_probs: The log-probs of the policy that rolled out.
        max_weight: The bound above, 1 or more in every use.

    Raises:
        InvalidRequestError: A log-prob is not finite, or the bound is not above 0.

    Reference:
        Ionides, "Truncated Importance Sampling" (2008); as in Yao et al., "Your Efficient RL Framework Secretly Brings You
        Off-Policy RL Training" (2025).
    """
    check_positive("max_weight", max_weight)
    _check_log_probs(log_probs, behavior_log_probs)
    # An overflow is above every bound.
    return torch.exp(log_probs.detach() - behavior_log_probs.detach()).clamp(max=max_weight)


def _check_log_probs(log_probs: Tensor, old_log_probs: Tensor) -> None:
    check_finite("log_probs", log_probs, "pair", LOOK)
    check_finite("old_log_probs", old_log_probs, "pair", "leave these pairs out")


def _finite_ratio(ratios: Tensor) -> Tensor:
    check_finite("ratios", ratios, "pair", "the policy has moved too far from the one that rolled out; update it more often")
    return ratios
