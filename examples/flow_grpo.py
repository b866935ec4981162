"""Flow-GRPO against a running server: the policy learns from rewards to draw what the prompt says.

    python -m examples.flow_grpo --out runs/sde                                         # every step stochastic
    python -m examples.flow_grpo --out runs/window --window 2 --learning-rate 5e-4      # the first two
    python -m examples.flow_grpo --out runs/cps --dynamics cps

Rollouts come over HTTP, are replayed with gradients, and the new weights go back to the server. Before the first update of a
round every ratio is exactly 1; the run stops if one is not.

Reference: Liu et al., "Flow-GRPO" (arXiv:2505.05470); stochastic steps in a window alone, which they move along: Li et al.,
"MixGRPO" (arXiv:2507.21802).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import nn

from examples.rl.learner import Descent
from examples.rl.loop import Batch, Options, add_arguments, options_of, train
from examples.server import exit_on_sigterm
from flowroll import replay
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.sampling.transition import NO_CONST

_STOCHASTIC = tuple(name for name, found in DYNAMICS.items() if found.is_stochastic)
_CLIP_RANGE = 1e-3
_MICRO_BATCH = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and writes the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--dynamics", choices=_STOCHASTIC, default="sde")
    parser.add_argument("--noise-level", type=float, default=0.7)
    parser.add_argument("--window", type=int, default=None, help="stochastic steps of a round; default: all")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of a round")
    parsed = parser.parse_args(arguments)
    options = options_of(parsed)
    learner = Learner(options, updates=parsed.updates)
    request: dict[str, Any] = {"sde_type": parsed.dynamics, "noise_level": parsed.noise_level}
    # CPS's std falls to 0 along the steps: with the constants the last of them would outweigh all others.
    request["log_prob_no_const"] = DYNAMICS[parsed.dynamics].log_prob_form == NO_CONST
    kind = parsed.dynamics if parsed.window is None else f"{parsed.dynamics}, {parsed.window} steps"
    if parsed.window is not None:
        # The early steps, where it is decided what is drawn.
        request["sde_step_indices"] = tuple(range(parsed.window))
    train(options, request, learner.update, title=f"Flow-GRPO ({kind}), {options.family}")


class Learner:
    """The policy gradient."""

    def __init__(self, options: Options, *, updates: int) -> None:
        self._may_be_off = options.mistake is not None
        self._descent = Descent(learning_rate=options.learning_rate, updates=updates)

    def update(self, policy: nn.Module, batch: Batch) -> float:
        """Some optimizer steps on a round's rollouts; returns the largest |ratio - 1| before the first.

        Raises:
            RuntimeError: A ratio is not exactly 1 before the first step, and no mistake was asked for.
        """
        errors = []
        for chosen in self._descent.steps(policy, batch):
            errors.append(self._gradient(policy, batch, chosen))
            if errors[0] and not self._may_be_off:
                raise RuntimeError(f"every ratio must be exactly 1 before the first update, got one {errors[0]:g} off")
        return errors[0]

    def _gradient(self, policy: nn.Module, batch: Batch, chosen: Sequence[int]) -> float:
        """Adds up the gradient over these samples; returns the largest |ratio - 1|."""
        rollouts, advantages = [batch.rollouts[index] for index in chosen], batch.advantages[chosen]
        largest = 0.0
        for part in replay.micro_batches(policy, rollouts, micro_batch=_MICRO_BATCH):
            ratios = replay.ratio(part.log_probs, part.old_log_probs)
            loss = replay.clipped_loss(ratios, advantages[list(part.samples)], clip_range=_CLIP_RANGE)
            (loss * part.weight).backward()
            largest = max(largest, float((ratios.detach() - 1).abs().max()))
        return largest


if __name__ == "__main__":
    exit_on_sigterm()
    main()
