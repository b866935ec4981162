"""Flow-GRPO against a running server: the policy learns from rewards to draw what the prompt says.

    python -m flowroll.examples.flow_grpo --out runs/sde                                         # every step stochastic
    python -m flowroll.examples.flow_grpo --out runs/window --window 2 --learning-rate 5e-4      # the first two
    python -m flowroll.examples.flow_grpo --out runs/mix --window 2 --move-every 4 --learning-rate 5e-4   # MixGRPO: it moves
    python -m flowroll.examples.flow_grpo --out dance --dynamics dance --noise-level 1 --window 3 --same-start

Rollouts come over HTTP, are replayed with gradients, and the new weights go back to the server. Before the first update of a
round every ratio is exactly 1; the run stops if one is not.

Reference: Liu et al., "Flow-GRPO" (arXiv:2505.05470); Xue et al., "DanceGRPO" (arXiv:2505.07818); stochastic steps in a window
that moves along: Li et al., "MixGRPO" (arXiv:2507.21802).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from flowroll import replay
from flowroll.examples.rl.learner import Batch, Descent
from flowroll.examples.rl.loop import train
from flowroll.examples.rl.options import Options, add_arguments, options_of
from flowroll.examples.server import exit_on_sigterm
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.sampling.transition import NO_CONST

_STOCHASTIC = tuple(name for name, found in DYNAMICS.items() if found.is_stochastic)
_CLIP_RANGE = 1e-3
_MICRO_BATCH = 8
# More than a run has, so that runs of different seeds start from different noise.
_ROUNDS = 10_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and writes the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--dynamics", choices=_STOCHASTIC, default="sde")
    parser.add_argument("--noise-level", type=float, default=0.7)
    parser.add_argument("--window", type=int, default=None, help="stochastic steps of a round; default: all")
    parser.add_argument("--move-every", type=int, default=None, help="rounds after which the window moves on by a step")
    parser.add_argument("--same-start", action="store_true", help="one initial noise for all samples of a round, as DanceGRPO")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of a round")
    parsed = parser.parse_args(arguments)
    options = options_of(parsed)
    kind = parsed.dynamics if parsed.window is None else f"{parsed.dynamics}, {parsed.window} steps"
    learner = FlowGrpo(
        options,
        updates=parsed.updates,
        dynamics=parsed.dynamics,
        noise_level=parsed.noise_level,
        window=parsed.window,
        move_every=parsed.move_every,
        has_same_start=parsed.same_start,
    )
    train(options, learner, title=f"Flow-GRPO ({kind}), {options.family}")


class FlowGrpo:
    """The policy gradient.

    Args:
        options: The run.
        updates: Optimizer steps of a round.
        dynamics: The dynamics of the stochastic steps.
        noise_level: Their noise level.
        window: How many steps are stochastic; None: all.
        move_every: Rounds after which the window moves on by a step, and from the end back to the beginning; None: it stays
            at the early steps, where it is decided what is drawn.
        has_same_start: Whether all samples of a round have one initial noise, so that a group differs by its steps alone.
    """

    old = None

    def __init__(
        self,
        options: Options,
        *,
        updates: int,
        dynamics: str = "sde",
        noise_level: float = 0.7,
        window: int | None = None,
        move_every: int | None = None,
        has_same_start: bool = False,
    ) -> None:
        self._may_be_off = options.mistake is not None
        self._num_steps, self._window, self._move_every = options.num_steps, window, move_every
        self._seed, self._has_same_start = options.seed, has_same_start
        self._descent = Descent(learning_rate=options.learning_rate, updates=updates)
        # CPS's std falls to 0 along the steps: with the constants the last of them would outweigh all others.
        no_const = DYNAMICS[dynamics].log_prob_form == NO_CONST
        self._request: dict[str, Any] = {"sde_type": dynamics, "noise_level": noise_level, "log_prob_no_const": no_const}

    def request(self, number: int) -> Mapping[str, Any]:
        """See `Learner`."""
        start = {"init_seed": _ROUNDS * self._seed + number} if self._has_same_start else {}
        if self._window is None:
            return {**self._request, **start}
        places = self._num_steps - self._window + 1
        first = 0 if self._move_every is None else number // self._move_every % places
        return {**self._request, **start, "sde_step_indices": tuple(range(first, first + self._window))}

    def state(self) -> dict[str, Any]:
        """See `Learner`."""
        return self._descent.state()

    def restore(self, state: Mapping[str, Any], policy: nn.Module) -> None:
        """See `Learner`."""
        self._descent.restore(state, policy)

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

    def advantages(self, batch: Batch) -> Float[Tensor, "samples steps"]:
        """The advantage of each step of each sample: here that of the sample."""
        return batch.advantages[:, None].expand(-1, self._num_steps)

    def _gradient(self, policy: nn.Module, batch: Batch, chosen: Sequence[int]) -> float:
        """Adds up the gradient over these samples; returns the largest |ratio - 1|."""
        rollouts, advantages = [batch.rollouts[index] for index in chosen], self.advantages(batch)[chosen]
        largest = 0.0
        for part in replay.micro_batches(policy, rollouts, micro_batch=_MICRO_BATCH, merge="exact"):
            ratios = replay.ratio(part.log_probs, part.old_log_probs)
            loss = replay.clipped_loss(ratios, advantages[part.samples, part.steps], clip_range=_CLIP_RANGE)
            (loss * part.weight).backward()  # type: ignore[no-untyped-call]
            largest = max(largest, float((ratios.detach() - 1).abs().max()))
        return largest


if __name__ == "__main__":
    exit_on_sigterm()
    main()
