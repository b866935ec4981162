"""What a reward says about a sample: its advantage over its group, and the probability that it is a good one."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.replay.losses.checks import check_choice, check_finite, check_positive


def group_advantages(
    rewards: Float[Tensor, " samples"],
    groups: Int[Tensor, " samples"],
    *,
    std: str = "group",
    correction: int = 0,
    eps: float = 1e-4,
    nonfinite: str = "refuse",
) -> Float[Tensor, " samples"]:
    """Returns how much better a sample is than the samples of its own prompt.

        A_i = (r_i - mean of its group) / (std + eps), or 0 where the denominator is 0

    Args:
        rewards: r, one per sample.
        groups: Samples with the same number have the same prompt. With one number for all, the mean is that of all rewards.
        std: "group": of the sample's own group, "global": of all rewards, "none": the distance is not divided at all.
        correction: What is subtracted from the number of rewards in a std: 0, or Bessel's 1. A std of as many rewards or fewer
            is 0, and so are the distances below it.
        eps: Added to the std, so that rewards that are nearly equal are not blown up; finite, 0 or more.
        nonfinite: What becomes of a reward that is NaN or infinite. "refuse": it is an error that names the samples. "drop":
            its sample gets the advantage 0 and counts neither in a mean nor in a std.

    Returns:
        float32.

    Raises:
        InvalidRequestError: A reward is not finite, or `std`, `correction`, `eps` or `nonfinite` is none of what it may be.

    Reference:
        Liu et al., "Flow-GRPO" (arXiv:2505.05470), which takes the group's std; its public code (yifan123/flow_grpo,
        `stat_tracking.py`) has the global std as an option, and this eps. verl-omni (`diffusion_algos.py`) takes these with
        Bessel's correction. "none" is of Liu et al., "Understanding R1-Zero-Like Training" (arXiv:2503.20783). GRPO is of Shao
        et al., "DeepSeekMath" (arXiv:2402.03300).
    """
    check_choice("std", std, ("group", "global", "none"))
    check_choice("nonfinite", nonfinite, ("refuse", "drop"))
    if correction not in (0, 1):
        raise InvalidRequestError(f"correction must be 0 or 1, got {correction}; leave it out.", field="correction")
    if not (math.isfinite(eps) and eps >= 0):
        raise InvalidRequestError(f"eps must be finite and 0 or more, got {eps}; leave it out.", field="eps")
    if nonfinite == "refuse":
        check_finite("rewards", rewards, "sample", 'reward these samples again, or leave them out with nonfinite="drop"')
    kept = rewards.isfinite()
    values = rewards.to(torch.float64).masked_fill(~kept, 0.0)
    _, member = torch.unique(groups, return_inverse=True)
    # A group whose samples are all dropped has no mean, and nobody asks for it.
    count = torch.bincount(member, weights=kept.to(torch.float64)).clamp(min=1.0)
    centred = (values - (torch.bincount(member, weights=values) / count)[member]).masked_fill(~kept, 0.0)
    if std == "none":
        return centred.to(torch.float32)
    if std == "global":
        squares = (values[kept] - values[kept].mean()).square().sum()
        scale = (squares / (kept.sum() - correction).clamp(min=1)).sqrt()
    else:
        scale = (torch.bincount(member, weights=centred.square()) / (count - correction).clamp(min=1)).sqrt()[member]
    # Where the denominator is 0, so is the distance.
    return torch.where(centred == 0, 0.0, centred / (scale + eps)).to(torch.float32)


def optimality(advantages: Float[Tensor, " samples"], *, max_advantage: float = 5.0) -> Float[Tensor, " samples"]:
    """Returns the probability that a sample is a good one, for `nft_loss`.

        r = 1/2 + clip(A / max_advantage, -1, 1) / 2

    Args:
        advantages: A, one per sample.
        max_advantage: The advantage from which on a sample is certainly a good one, above 0.

    Raises:
        InvalidRequestError: An advantage is not finite, or the bound is not above 0.

    Reference:
        Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (arXiv:2509.16117), section 3.3; its
        public code (NVlabs/DiffusionNFT, `train_nft_sd3.py`) has this bound.
    """
    check_positive("max_advantage", max_advantage)
    check_finite("advantages", advantages, "sample", 'make them with group_advantages(..., nonfinite="drop")')
    return 0.5 + (advantages / max_advantage).clamp(-1, 1) / 2
