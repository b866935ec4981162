"""Several engines as one, on Ray: replicas behind one address, and engines as plain actors.

    from flowroll import cluster

    with cluster.serve("shapes-z_image", replicas=2) as served:  # one address, as a single server
        print(served.url)

    engine = ray.remote(cluster.EngineActor).remote("shapes-z_image")  # an actor that a trainer places itself
    rollouts = ray.get(engine.rollout.remote("a red circle in the center", seed=1))

Names are imported on their first use, so that `routing` and `updates`, which know nothing of Ray, need no more than the engine.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowroll.cluster.actor import EngineActor as EngineActor
    from flowroll.cluster.parcel import pack as pack
    from flowroll.cluster.server import ClusterConfig as ClusterConfig
    from flowroll.cluster.server import Served as Served
    from flowroll.cluster.server import serve as serve

__all__ = ["ClusterConfig", "EngineActor", "Served", "pack", "serve"]
_HOMES = {"ClusterConfig": "server", "EngineActor": "actor", "Served": "server", "pack": "parcel", "serve": "server"}


def __getattr__(name: str) -> object:
    """Imports a name on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from flowroll.extras import extra_for

    with extra_for("flowroll.cluster", "ray"):
        return getattr(import_module(f"flowroll.cluster.{_HOMES[name]}"), name)
