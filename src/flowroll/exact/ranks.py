"""The forwards of a step on the groups of the cfg axis: merged first, then split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowroll.exact.strategy import Forward, run_here
from flowroll.families import Output
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.shards import shard_evenly


def run_on_groups(mesh: Mesh, forwards: Sequence[Forward]) -> list[list[Output]]:
    """Runs all forwards and returns their outputs; each input is computed by one group of the cfg axis.

    Where the branches of a sample are a pair in one forward, every group runs that forward, and the regions of the transformer
    give each group its own branch of every pair. All outputs of a step have the same shape.

    Args:
        mesh: The mesh of the ranks; it has as many cfg groups as there are branches.
        forwards: The forwards of a step, the same on every rank.
    """
    degree = mesh.degree("cfg")
    if degree == 1:
        return run_here(forwards)
    if forwards[0].rows_per_sample == degree:
        assert all(forward.rows_per_sample == degree for forward in forwards)
        with mesh.sharing_branches():
            return run_here(forwards)
    ends = [0]
    for forward in forwards:
        ends.append(ends[-1] + len(forward.inputs))
    if ends[-1] < degree:
        return run_here(forwards)
    shard = shard_evenly(ends[-1], mesh.coordinate("cfg"), degree)
    own: list[Output] = []
    for forward, start in zip(forwards, ends, strict=False):
        first, last = (min(max(place - start, 0), len(forward.inputs)) for place in (shard.start, shard.start + shard.size))
        if first < last:
            own += forward.part(first, last)()
    in_lists = isinstance(own[0], list)
    parts = torch.stack([_tensor(output) for output in own])
    whole = mesh.gather(parts, axis="cfg", dim=0, sizes=shard.sizes).unbind(0)
    outputs: list[Output] = [list(output.unbind(0)) if in_lists else output for output in whole]
    return [outputs[start : start + len(forward.inputs)] for forward, start in zip(forwards, ends, strict=False)]


def all_ranks_agree(mesh: Mesh, vote: bool) -> bool:
    """Tells whether every rank that takes part in a forward votes yes; all of these ranks must make this call."""
    return mesh.all_agree(vote, ("cfg", "sp", "tp") if mesh.shares_branches else ("sp", "tp"))


def _tensor(output: Output) -> Tensor:
    return output if isinstance(output, Tensor) else torch.stack(output)
