"""The names under which verl finds the plug-in and its servers."""

from __future__ import annotations

# The value of `rollout.name`.
NAME = "flowroll"


def server_name(replica_rank: int, kind: str = "", suffix: str = "") -> str:
    """Returns the name of a replica's server among Ray's actors.

    Args:
        replica_rank: The number of the replica.
        kind: "reward_" or "teacher_" for a replica of such a model.
        suffix: What verl appends to the names of such replicas.
    """
    return f"{NAME}_server_{kind}{replica_rank}_0{suffix}"
