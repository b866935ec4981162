"""BranchGRPO against a running server: the samples of a prompt are the leaves of a tree, and each branch has its own advantage.

    python -m flowroll.examples.branch_grpo --out runs/branch --fork 0:4 3:2

A prompt's trajectory forks before the steps that are named: the first steps are computed once for all leaves below them, by the
server and by the replay. What a step drew is rewarded by what came of it: the advantage of a node is the mean reward of its
leaves, compared with the other nodes of its depth under the same prompt.

Reference: Li et al., "BranchGRPO: Stable and Efficient GRPO with Structured Branching in Diffusion Models" (arXiv:2509.06040).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll import Rollout, replay
from flowroll.examples.flow_grpo import FlowGrpo
from flowroll.examples.rl.learner import Batch
from flowroll.examples.rl.loop import train
from flowroll.examples.rl.options import Options, add_arguments, options_of
from flowroll.examples.server import exit_on_sigterm


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and writes the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--noise-level", type=float, default=0.7)
    parser.add_argument("--fork", nargs="+", default=["0:4", "3:2"], metavar="STEP:CHILDREN", help="where, and into how many")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of a round")
    parsed = parser.parse_args(arguments)
    options = options_of(parsed)
    fork = {int(step): int(children) for step, _, children in (one.partition(":") for one in parsed.fork)}
    learner = BranchGrpo(options, updates=parsed.updates, noise_level=parsed.noise_level, fork=fork)
    train(options, learner, title=f"BranchGRPO ({math.prod(fork.values())} leaves), {options.family}")


class BranchGrpo(FlowGrpo):
    """The policy gradient of Flow-GRPO, with an advantage for every step.

    Args:
        options: The run; its group size is that of the tree.
        updates: Optimizer steps of a round.
        noise_level: The noise level of Flow-SDE.
        fork: Into how many children each sample forks, by the step.
    """

    def __init__(self, options: Options, *, updates: int, noise_level: float, fork: Mapping[int, int]) -> None:
        super().__init__(options, updates=updates, noise_level=noise_level)
        self._fork = dict(fork)

    def request(self, number: int) -> Mapping[str, Any]:
        """See `Learner`."""
        return {**super().request(number), "fork": self._fork, "num_outputs_per_prompt": 1}

    def advantages(self, batch: Batch) -> Float[Tensor, "samples steps"]:
        """See `FlowGrpo`."""
        rows = [
            node_advantages([batch.rollouts[index] for index in leaves], batch.rewards[leaves])
            for group in batch.groups.unique()  # type: ignore[no-untyped-call]
            for leaves in [(batch.groups == group).nonzero()[:, 0].tolist()]
        ]
        return torch.cat(rows)


def node_advantages(leaves: Sequence[Rollout], rewards: Float[Tensor, " leaves"]) -> Float[Tensor, "leaves steps"]:
    """The advantage of the node that each leaf's step belongs to.

    At every step: the mean reward of the node's leaves, minus the mean of all nodes, over their std.
    """
    columns = []
    for step in range(leaves[0].sampling.num_inference_steps):
        nodes = [drawn_by(leaf, step) for leaf in leaves]
        members = {node: torch.tensor([other == node for other in nodes]) for node in nodes}
        fused = {node: rewards[of].mean() for node, of in members.items()}
        values = torch.stack(list(fused.values()))
        numbers = replay.group_advantages(values, torch.zeros(len(values), dtype=torch.long))
        of_node = dict(zip(fused, numbers.unbind(), strict=True))
        columns.append(torch.stack([of_node[node] for node in nodes]))
    return torch.stack(columns, dim=1)


def drawn_by(leaf: Rollout, step: int) -> str:
    """The id of the node whose noise a leaf's step drew."""
    below = [branch.id for branch in leaf.sampling.branches or () if branch.step <= step]
    return below[-1] if below else "root"


if __name__ == "__main__":
    exit_on_sigterm()
    main()
