"""`flowroll cluster` serves several replicas at one address."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

import typer

from flowroll.cli import serve as serving
from flowroll.extras import extra_for


def _own_flags(
    *,
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas, each with an engine of its own.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster, or auto for the one that runs on this machine. Without it a Ray cluster is started "
            "on this machine.",
            show_default=False,
        ),
    ] = None,
    cpus_per_replica: Annotated[float, typer.Option(min=0, help="CPUs that Ray sets aside for each replica.")] = 1.0,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(
            min=0, help="GPUs for each replica; without it one for each rank, where there are any.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each replica; without it this machine's CPUs shared out.", show_default=False),
    ] = None,
    update_order: Annotated[
        Literal["rolling", "barrier"],
        typer.Option(help="Let each replica exchange weights between its own requests, or hold all until all have."),
    ] = "rolling",
    max_staleness: Annotated[
        int | None,
        typer.Option(min=0, help="Versions by which a replica may be behind and still run requests.", show_default=False),
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder of this fleet alone that keeps the versions of its weights beyond its end.", show_default=False
        ),
    ] = None,
) -> None: ...


def cluster(**flags: Any) -> None:
    """Serve several replicas of a checkpoint at one address, on Ray, until SIGTERM or Ctrl-C.

    It has the flags of `flowroll serve`, which count for each replica or for the address, and those about replicas.
    """
    serving.check_address(flags["host"], flags["port"])
    own = {name: flags.pop(name) for name in inspect.signature(_own_flags).parameters}
    with extra_for("`flowroll cluster`", "ray"):
        from flowroll.cluster.server import ClusterConfig, run

        run(serving.server_config(flags), ClusterConfig(**own))


def _merged() -> inspect.Signature:
    """Returns the parameters of `cluster`: the model, what is about replicas, then the flags of `flowroll serve`."""
    model, *served = inspect.signature(serving.serve, eval_str=True).parameters.values()
    own = inspect.signature(_own_flags, eval_str=True).parameters.values()
    further = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in served]
    return inspect.Signature([model, *own, *further])


cluster.__signature__ = _merged()  # type: ignore[attr-defined]
cluster.__annotations__ = {name: one.annotation for name, one in _merged().parameters.items()}
