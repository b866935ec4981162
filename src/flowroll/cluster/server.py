"""One address for a fleet: the HTTP server of a single engine, over several replicas, with what only a fleet has to say."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import uvicorn
from fastapi import APIRouter, FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowroll.checkpoints import find_checkpoint
from flowroll.cluster.actor import EngineActor
from flowroll.cluster.fleet import Fleet
from flowroll.cluster.info import FleetInfo
from flowroll.cluster.replica import Placement
from flowroll.cluster.replicas import ReplicaSet
from flowroll.cluster.version_file import VersionFile
from flowroll.cluster.weights import UpdateOrder
from flowroll.engine.service import EngineClient
from flowroll.errors import InvalidRequestError
from flowroll.serving import ServerConfig, create_app
from flowroll.serving.connections import HttpConfig, open_listener
from flowroll.serving.errors import COMMON_RESPONSES
from flowroll.serving.launch import serve as run_server

_log = logging.getLogger(__name__)
_END_S = 10.0
# Said before Ray is started: it tells its makers what it is used for otherwise.
_USAGE = "RAY_USAGE_STATS_ENABLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How many replicas there are, where, and how their weights change.

    Attributes:
        replicas: The number of replicas.
        address: The address of a Ray cluster, or "auto" for the one that runs on this machine; None: a Ray cluster is started
            on this machine, unless this process is connected to one.
        cpus_per_replica: The CPUs that Ray sets aside for each replica.
        gpus_per_replica: The GPUs for each replica; None: one for each rank, where the device is or may be CUDA and the cluster
            has GPUs.
        threads: The number of CPU threads of each replica, on which bits depend on a CPU; None: this machine's CPUs shared out
            among the replicas.
        update_order: "rolling": each replica exchanges weights between its own requests; "barrier": no replica starts a sample
            before all have exchanged.
        max_staleness: The number of versions by which a replica may be behind the newest weights and still be given requests;
            None: any.
        state_dir: A folder of this fleet alone, in which it keeps the versions of its weights, so that their sequence goes on
            when all of it is started again; None: it begins anew.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """

    replicas: int = 1
    address: str | None = None
    cpus_per_replica: float = 1.0
    gpus_per_replica: float | None = None
    threads: int | None = None
    update_order: UpdateOrder = "rolling"
    max_staleness: int | None = None
    state_dir: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("cpus_per_replica", 0), ("gpus_per_replica", 0), ("threads", 1)):
            _check_least(name, getattr(self, name), least)
        _check_least("max_staleness", self.max_staleness, 0)
        if self.update_order not in ("rolling", "barrier"):
            raise InvalidRequestError(
                f"update_order must be rolling or barrier, got {self.update_order!r}; leave it out.", field="update_order"
            )


class Served:
    """A fleet that is served at an address, on a thread of this process. It is a context manager, whose exit ends the fleet.

    Attributes:
        url: The address.
        fleet: The fleet, e.g. to `resize` it.
    """

    def __init__(self, config: ServerConfig, cluster: ClusterConfig) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.fleet = self._stack.enter_context(open_fleet(config, cluster))
            listener = self._stack.enter_context(open_listener(config))
            app = create_app(self.fleet, config)
            add_routes(app, self.fleet)
            self._server = uvicorn.Server(HttpConfig(app, config))
            self._thread = threading.Thread(
                target=self._server.run, kwargs={"sockets": [listener]}, name="flowroll-http", daemon=True
            )
            self._thread.start()
            self._stack.callback(self._stop)
        except BaseException:
            self._stack.close()
            raise
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server, then the replicas. It may be called twice."""
        self._stack.close()

    def _stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(_END_S)


def serve(
    model: str | Path,
    *,
    replicas: int = 1,
    address: str | None = None,
    cpus_per_replica: float = 1.0,
    gpus_per_replica: float | None = None,
    threads: int | None = None,
    update_order: UpdateOrder = "rolling",
    max_staleness: int | None = None,
    state_dir: str | None = None,
    **options: Any,
) -> Served:
    """Serves several replicas of a checkpoint at one address, on a thread of this process.

    Args:
        model: A checkpoint folder, which every node has at the same path, or the name of a checkpoint that flowroll ships.
        replicas: The number of replicas.
        address: The address of a Ray cluster; see `ClusterConfig`, which has the arguments up to `state_dir`.
        cpus_per_replica: The CPUs of each replica.
        gpus_per_replica: The GPUs of each replica.
        threads: The CPU threads of each replica.
        update_order: "rolling" or "barrier".
        max_staleness: How many versions a replica may be behind.
        state_dir: Where the versions of the weights are kept.
        **options: Fields of `ServerConfig`, e.g. `port=0`, `layout=Layout(sp=2)`, `weights_roots=("/data",)`.

    Raises:
        InvalidRequestError: A value breaks its rule.
        FlowrollError: The replicas cannot be started.
    """
    cluster = ClusterConfig(
        replicas=replicas,
        address=address,
        cpus_per_replica=cpus_per_replica,
        gpus_per_replica=gpus_per_replica,
        threads=threads,
        update_order=update_order,
        max_staleness=max_staleness,
        state_dir=state_dir,
    )
    return Served(ServerConfig(model=str(model), **options), cluster)


def run(config: ServerConfig, cluster: ClusterConfig) -> None:
    """Serves a fleet until SIGTERM or Ctrl-C, as `flowroll serve` serves an engine."""
    run_server(config, open_engine=lambda config: open_fleet(config, cluster), extend=add_routes)


@contextlib.contextmanager
def open_fleet(config: ServerConfig, cluster: ClusterConfig) -> Iterator[Fleet]:
    """Connects to Ray, starts a fleet, and ends both.

    Raises:
        InvalidRequestError: The configuration has what a fleet cannot do.
        FlowrollError: The replicas cannot be started.
    """
    if config.allow_pickle_weights:
        raise InvalidRequestError(
            "allow_pickle_weights must be off for a fleet, got on: handles are of one machine's memory; push over HTTP.",
            field="allow_pickle_weights",
        )
    kept = None if cluster.state_dir is None else VersionFile(Path(cluster.state_dir))
    with _connected(cluster):
        placement = _placement(config, cluster)
        _check_room(placement, cluster)
        threads = cluster.threads
        if threads is None and not placement.num_gpus:
            threads = max(1, (os.cpu_count() or 1) // cluster.replicas)
        engine = {
            **config.arguments_of(EngineActor),
            "model": str(find_checkpoint(config.model).resolve()),
            "num_threads": threads,
        }
        _log.info("starting %d replicas, each with %s and %s threads", cluster.replicas, placement, threads or "its own")
        replicas = ReplicaSet(
            engine,
            num_replicas=cluster.replicas,
            placement=placement,
            max_staleness=cluster.max_staleness,
            patience_s=config.rank_timeout_s,
            kept=kept,
        )
        with Fleet(replicas, cluster.update_order) as fleet:
            yield fleet


@contextlib.contextmanager
def _connected(cluster: ClusterConfig) -> Iterator[None]:
    """Connects this process to Ray, or starts a Ray cluster on this machine, unless it is connected already."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault(_USAGE, "0")
    if cluster.address is None:
        if os.environ.get("RAY_AUTH_MODE") == "disabled":
            _log.warning("Ray listens on all interfaces, and RAY_AUTH_MODE is disabled: anybody who reaches it runs code here")
        # CPUs are what Ray sets aside, not what there is: replicas on a CPU share what there is by their threads.
        num_cpus = max(os.cpu_count() or 1, int(cluster.replicas * cluster.cpus_per_replica) + 1)
        with _kept_signals():
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False)
    else:
        with _kept_signals():
            ray.init(address=cluster.address)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Takes the signals back from Ray, which ends the process at once where the server drains."""
    is_main = threading.current_thread() is threading.main_thread()
    kept = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    try:
        yield
    finally:
        for sig, handler in kept.items():
            signal.signal(sig, handler)


def _placement(config: ServerConfig, cluster: ClusterConfig) -> Placement:
    gpus = cluster.gpus_per_replica
    if gpus is None:
        layout = config.layout
        num_ranks = layout.sp * layout.tp * (2 if layout.cfg_parallel else 1)
        has_gpus = config.device.startswith("cuda") or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        gpus = float(num_ranks if has_gpus else 0)
    return Placement(num_cpus=cluster.cpus_per_replica, num_gpus=gpus)


def _check_room(placement: Placement, cluster: ClusterConfig) -> None:
    """Refuses to wait for what a Ray cluster of this machine cannot have; others may grow, so they are waited for.

    Raises:
        InvalidRequestError: There are too few CPUs or GPUs.
    """
    if (places := placement.num_places()) >= cluster.replicas:
        return
    field = "gpus_per_replica" if placement.num_gpus else "cpus_per_replica"
    message = (
        f"{field} must leave a place on a node for each of {cluster.replicas} replicas, got {placement.bundle} each, for which "
        f"Ray's nodes have {places} places"
    )
    if cluster.address is None:
        raise InvalidRequestError(f"{message}; start fewer replicas, or give them less.", field=field)
    _log.warning("%s; the replicas wait until nodes join", message)


def add_routes(app: FastAPI, engine: EngineClient) -> None:
    """Adds to the app of a server what a fleet has beside an engine: GET /replicas, and its metrics."""
    assert isinstance(engine, Fleet)
    fleet = engine
    router = APIRouter(tags=["status"])

    @router.get("/replicas", summary="The replicas: state, version and load", responses=COMMON_RESPONSES)
    async def replicas() -> FleetInfo:
        return await asyncio.to_thread(fleet.describe)

    app.include_router(router)
    app.state.metrics.registry.register(_FleetCollector(fleet))


class _FleetCollector(Collector):
    """The metrics of a fleet, made when they are asked for."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """Yields a value of each replica, and of the fleet."""
        info = self._fleet.describe()
        for name, text, attribute in (
            ("flowroll_replica_image_steps", "Denoising steps that a replica has yet to take.", "image_steps"),
            ("flowroll_replica_requests", "Requests, or parts of them, that a replica has not answered.", "num_requests"),
            ("flowroll_replica_version_number", "Number of the version of a replica's weights.", "version_number"),
        ):
            family = GaugeMetricFamily(name, text, labels=["replica", "state"])
            for one in info.replicas:
                if (value := getattr(one, attribute)) is not None:
                    family.add_metric([one.id, one.state], value)
            yield family
        for name, text, value in (
            ("flowroll_lost_replicas", "Replicas that have ended and were to be replaced.", info.num_lost),
            (
                "flowroll_retried_requests",
                "Requests, or parts, that were run again after the end of a replica.",
                info.num_retried,
            ),
            ("flowroll_split_requests", "Requests that several replicas have run.", info.num_split),
        ):
            yield CounterMetricFamily(name, text, value)

    def describe(self) -> Iterable[Metric]:
        """Names nothing in advance, so that registering asks nothing of the fleet."""
        return ()


def _check_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise InvalidRequestError(f"{name} must be at least {least}, got {value}; leave it out.", field=name)
