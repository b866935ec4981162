"""DiffusionNFT against a running server: learning from clean latents and rewards alone, no log-prob, no trajectory.

    python -m flowroll.examples.diffusion_nft --out runs/nft
    python -m flowroll.examples.diffusion_nft --out runs/nft-ema --decay 0.5     # the old policy follows slowly

The server samples from the old policy with its deterministic sampler, and returns the final latents and the environment; the
trainer noises the latents itself. The old policy is a moving average, which the server computes from the weights that it is
sent for the new one. With b the strength, v_old the velocity of the policy that sampled and v that of the one that learns, a
sample of optimality r in [0, 1] gives

    r |(1 - b) v_old + b v - u|^2 + (1 - r) |(1 + b) v_old - b v - u|^2,    u = eps - x0:

a good sample pulls the policy towards itself, a bad one pushes it away.

Reference: Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (arXiv:2509.16117).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowroll import Rollout, replay
from flowroll.examples.rl.learner import Batch, Descent
from flowroll.examples.rl.loop import train
from flowroll.examples.rl.options import Options, add_arguments, options_of
from flowroll.examples.rl.publishing import OldPolicy
from flowroll.examples.server import exit_on_sigterm


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and writes the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, learning_rate=2e-4)
    parser.add_argument("--strength", type=float, default=1.0, help="b: how far the implicit policies lie from the old one")
    parser.add_argument("--noise-levels", type=int, default=3, help="per sample and update")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of a round")
    parser.add_argument("--decay", type=float, default=0.0, help="the old policy's own share after a round; 0: a copy")
    parsed = parser.parse_args(arguments)
    options = options_of(parsed)
    learner = DiffusionNft(
        options, strength=parsed.strength, noise_levels=parsed.noise_levels, updates=parsed.updates, decay=parsed.decay
    )
    train(options, learner, title=f"DiffusionNFT, {options.family}")


class DiffusionNft:
    """The loss.

    Args:
        options: The run.
        strength: b, how far the implicit policies lie from the old one.
        noise_levels: Of a sample and update.
        updates: Optimizer steps of a round.
        decay: The old policy's own share after a round.
    """

    def __init__(self, options: Options, *, strength: float, noise_levels: int, updates: int, decay: float = 0.0) -> None:
        self._strength, self._noise_levels = strength, noise_levels
        self._descent = Descent(learning_rate=options.learning_rate, updates=updates)
        # Of all latents the last alone.
        self._request = {"sde_type": "ode", "return_step_indices": (options.num_steps,)}
        self.old = OldPolicy(decay)

    def request(self, number: int) -> Mapping[str, Any]:
        """See `Learner`."""
        return self._request

    def state(self) -> dict[str, Any]:
        """See `Learner`."""
        old = {} if self.old.module is None else self.old.module.state_dict()
        return {"optimizer": self._descent.state(), "old": old}

    def restore(self, state: Mapping[str, Any], policy: nn.Module) -> None:
        """See `Learner`."""
        self._descent.restore(state["optimizer"], policy)
        if state["old"]:
            self.old.of(policy).load_state_dict(state["old"])

    def update(self, policy: nn.Module, batch: Batch) -> None:
        """Some optimizer steps on a round's clean latents; there is no ratio."""
        old = self.old.of(policy)
        optimality = optimality_of(batch.advantages)
        for chosen in self._descent.steps(policy, batch):
            for index in chosen:
                loss = self._loss(policy, old, batch.rollouts[index], optimality[index], batch.generator)
                (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
        self.old.move(policy)

    def _loss(
        self, policy: nn.Module, old: nn.Module, rollout: Rollout, optimality: Float[Tensor, ""], generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """The mean over some noise levels of one sample."""
        assert rollout.dit_trajectory is not None
        clean, sigmas = rollout.dit_trajectory.latents[-1].float(), rollout.sampling.sigmas
        steps = torch.randperm(len(sigmas) - 1, generator=generator)[: self._noise_levels].tolist()
        noises = [torch.randn(clean.shape, generator=generator) for _ in steps]
        mixed = [torch.lerp(clean, noise, sigmas[step]) for noise, step in zip(noises, steps, strict=True)]
        with torch.no_grad():
            before = torch.stack(replay.velocities(old, rollout, mixed, steps=steps, merge="exact"))
        now = torch.stack(replay.velocities(policy, rollout, mixed, steps=steps, merge="exact"))
        count = len(steps)
        return replay.nft_loss(
            now,
            before,
            torch.stack(noises) - clean,
            torch.tensor([sigmas[step] for step in steps]),
            optimality.expand(count),
            beta=self._strength,
            scale="velocity",
        )


def optimality_of(advantages: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
    """The probability r in [0, 1] that a sample is a good one, from its advantage.

    Cut at one std, then centred: where rewards are no more than chance r is 1/2 on average, and nothing is learned from samples
    merely because they are the policy's own.
    """
    cut = advantages.clamp(-1, 1)
    centred = cut - cut.mean()
    return 0.5 + 0.5 * centred / centred.abs().max().clamp(min=1e-6)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
