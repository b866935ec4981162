"""The guidance branches of a step on two groups of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from flowroll.parallel.mesh import Mesh


def run_on_branches(
    mesh: Mesh, transformer: Callable[..., Any], calls: Sequence[Mapping[str, Any]]
) -> list[Tensor | list[Tensor]]:
    """The outputs of a step's forwards, each run by one group of ranks.

    A single forward (no guidance, or both branches in one batch) is run by every group, and so is everything by a single group.

    Args:
        mesh: The ranks; there are as many groups as branches.
        transformer: The model.
        calls: The keyword arguments of each forward.
    """
    if len(calls) == 1 or mesh.degree("cfg") == 1:
        return [transformer(**call, return_dict=False)[0] for call in calls]
    assert len(calls) == mesh.degree("cfg")
    own = transformer(**calls[mesh.coordinate("cfg")], return_dict=False)[0]
    return list(mesh.gather(own[None], axis="cfg", dim=0, sizes=[1] * len(calls)).unbind(0))
