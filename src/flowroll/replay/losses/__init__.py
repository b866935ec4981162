"""The losses of the Flow-GRPO family: small, pure, differentiable.

Flow-GRPO, DanceGRPO and MixGRPO take `group_advantages`, `ratio` and `clipped_loss`; GRPO-Guard takes `normalised_ratio` for
`ratio`; Flow-DPPO takes `masked_loss` with `divergences` for `clipped_loss`; DiffusionNFT takes `optimality` and `nft_loss`.
The mean of `divergences` from a reference's means is a KL penalty, and `importance_weights` correct for samples of another
policy. One NaN would spread to every number of a batch, so values that are not finite are refused, and the message says which
they are.
"""

from flowroll.replay.losses.advantages import group_advantages, optimality
from flowroll.replay.losses.forward_process import nft_loss
from flowroll.replay.losses.policy import clipped_loss, masked_loss
from flowroll.replay.losses.ratios import divergences, importance_weights, normalised_ratio, ratio

__all__ = [
    "clipped_loss",
    "divergences",
    "group_advantages",
    "importance_weights",
    "masked_loss",
    "nft_loss",
    "normalised_ratio",
    "optimality",
    "ratio",
]
