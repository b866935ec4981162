"""The plug-in for verl and verl-omni: `rollout.name=flowroll`, `model.external_lib=flowroll.integrations.verl_omni`.

Importing this package in a process that has verl registers the rollout class and the replica. The modules `mapping`, `windows`,
`gathering`, `rows`, `weights`, `options` and `server` need neither verl nor Ray.
"""

from __future__ import annotations

import importlib.util

from flowroll.extras import extra_for
from flowroll.integrations.verl_omni.names import NAME
from flowroll.integrations.verl_omni.rows import rollout_of

__all__ = ["NAME", "register", "rollout_of"]


def register() -> None:
    """Registers the plug-in with verl, under the name "flowroll"; it may be called twice.

    Raises:
        MissingExtraError: verl is not installed.
    """
    with extra_for("flowroll.integrations.verl_omni", "verl"):
        from verl.workers.rollout.base import _ROLLOUT_REGISTRY
        from verl.workers.rollout.replica import RolloutReplicaRegistry

    _ROLLOUT_REGISTRY[(NAME, "async")] = "flowroll.integrations.verl_omni.rollout.FlowrollRollout"
    RolloutReplicaRegistry.register(NAME, _load_replica)


def _load_replica() -> type:
    from flowroll.integrations.verl_omni.replica import FlowrollReplica

    return FlowrollReplica


if importlib.util.find_spec("verl") is not None:
    register()
