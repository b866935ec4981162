"""Losses on clean latents that are noised again: no log-prob, no trajectory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.replay.losses.checks import LOOK, check_choice, check_finite, check_positive, check_some

# Below this mean distance the adaptive weight does not grow further; as in the public code.
_MIN_DISTANCE = 1e-5


def nft_loss(
    velocities: Float[Tensor, " pairs *latent"],
    old_velocities: Float[Tensor, " pairs *latent"],
    targets: Float[Tensor, " pairs *latent"],
    sigmas: Float[Tensor, " pairs"],
    optimalities: Float[Tensor, " pairs"],
    *,
    beta: float = 1.0,
    scale: str = "adaptive",
) -> Float[Tensor, ""]:
    """Returns the loss of DiffusionNFT, to be minimised.

    A good sample pulls the policy towards itself and a bad one pushes it away, by way of two implicit policies:

        mean of (r D((1 - b) v_old + b v) + (1 - r) D((1 + b) v_old - b v)) / b

    With scale="velocity", D(w) is the mean over the elements of (w - u)^2. With scale="adaptive" it is that of the predicted
    clean latents, s^2 (w - u)^2, divided by their mean distance s |w - u|, which has no gradient: every noise level then counts
    about alike.

    Args:
        velocities: v of the policy that learns, at x = (1 - s) x0 + s eps; from `replay.velocities`.
        old_velocities: v_old of the policy that sampled, or of its moving average, at the same x.
        targets: u = eps - x0.
        sigmas: s, the noise level of each pair, in (0, 1].
        optimalities: r in [0, 1], from `optimality`.
        beta: b > 0: how far the implicit policies lie from the old one.
        scale: "adaptive", as in the public code, which also multiplies all of it by its bound on the advantages; or "velocity".

    Returns:
        A scalar, differentiable in `velocities`.

    Raises:
        InvalidRequestError: There are no pairs; a value is not finite, or a sigma or an optimality outside its range (says at
            which pairs); or `beta` or `scale` is none of what it may be.

    Reference:
        Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (arXiv:2509.16117);
        NVlabs/DiffusionNFT, `train_nft_sd3.py`, for the scale.
    """
    check_positive("beta", beta)
    check_choice("scale", scale, ("adaptive", "velocity"))
    check_some("velocities", velocities)
    for name, values in (("velocities", velocities), ("old_velocities", old_velocities), ("targets", targets)):
        check_finite(name, values, "pair", LOOK)
    _check_range("sigmas", sigmas, (sigmas > 0) & (sigmas <= 1), "(0, 1]")
    _check_range("optimalities", optimalities, (optimalities >= 0) & (optimalities <= 1), "[0, 1]")
    old = old_velocities.detach()
    good = _distance((1 - beta) * old + beta * velocities - targets, sigmas, scale)
    bad = _distance((1 + beta) * old - beta * velocities - targets, sigmas, scale)
    return ((optimalities * good + (1 - optimalities) * bad) / beta).mean()


def _distance(errors: Tensor, sigmas: Tensor, scale: str) -> Tensor:
    """Returns the mean square of a pair's errors, as `nft_loss` says."""
    rows = errors.to(torch.float32).flatten(1)
    if scale == "velocity":
        return rows.square().mean(dim=1)
    clean = rows * sigmas[:, None]
    size = clean.detach().to(torch.float64).abs().mean(dim=1).clamp(min=_MIN_DISTANCE)
    return clean.square().mean(dim=1) / size.to(torch.float32)


def _check_range(field: str, values: Tensor, is_right: Tensor, where: str) -> None:
    if not bool(is_right.all()):
        wrong = int((~is_right).nonzero()[0])
        raise InvalidRequestError(
            f"{field} must lie in {where}, got {values[wrong].item()} at pair {wrong}; leave this pair out.", field=field
        )
