"""The life of an engine: its model, its ranks, its threads, from the first to the last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowroll.engine.checkpoint import TORCH_COMPONENTS, examine_checkpoint
from flowroll.engine.config import AdapterLimits, EngineInfo, Limits, resolve_device, resolve_dtype
from flowroll.engine.estimate import describe_memory
from flowroll.engine.loading import LoadedModel, load_model
from flowroll.engine.plan import plan_geometry
from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.peers import FailureListener
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.rank_group import open_peers
from flowroll.engine.scheduler import BatchLimits, ExclusiveMode, Scheduler
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.store import WeightStore
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import RankLostError, ShuttingDownError, fresh
from flowroll.parallel.linears import count_parameters
from flowroll.types import Layout

# How long lost ranks may take to let go of what they failed.
_RELEASE_S = 5.0
# How long the loop may take to come back from a collective of lost ranks, before its requests are ended without it.
_LOST_S = 3.0
T = TypeVar("T")


class EngineCore:
    """What `Engine` is built on. Its parts are in files of their own: scores.py, updates.py, engine.py."""

    # Runs its requests: cancels, pauses, counts them.
    scheduler: Scheduler

    def __init__(
        self,
        model: str | Path,
        *,
        variant: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        limits: Limits | None = None,
        batching: BatchLimits | None = None,
        adapter_limits: AdapterLimits | None = None,
        layout: Layout | None = None,
        rank_timeout_s: float = 60.0,
    ) -> None:
        place = resolve_device(device)
        limits, layout = limits or Limits(), layout or Layout()
        checkpoint = examine_checkpoint(Path(model), variant=variant)
        weights = resolve_dtype(dtype, place)
        self._peers = open_peers(checkpoint, layout, limits, dtype=weights, device=place, timeout_s=rank_timeout_s)
        try:
            self._model, self._pipeline = load_model(checkpoint, device=place, dtype=weights, mesh=self._peers.mesh)
            self._peers.serve(self._model.spec, limits)
        except BaseException:
            self._peers.close()
            raise
        self._offload = WeightOffload(functools.partial(_parameters, self._model, self._pipeline))
        versions = WeightVersions()
        self._work = PipelineRunner(self._model, self._pipeline, versions, self._offload)
        self._executor = Executor(self._model, self._work, self._peers)
        self._weights = WeightStore(self._pipeline, self._executor, self._model.adapters, self._offload, versions)
        self.scheduler = Scheduler(self._executor, batching or BatchLimits())
        self._peers.add_listener(functools.partial(self.scheduler.stop, patience_s=_LOST_S))
        transformer = self._model.transformer
        self.info = EngineInfo(
            model=str(checkpoint.folder),
            family=self._model.family.name,
            variant=self._model.variant,
            pipeline=self._model.family.pipeline_class,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(place),
            parameters=count_parameters(transformer),
            layout=layout,
            transformer_bytes=sum(parameter.nbytes for parameter in transformer.parameters()),
            limits=limits,
            adapter_limits=adapter_limits or AdapterLimits(),
            defaults=self._model.family.variants[self._model.variant],
            pixel_unit=self._model.spec.pixel_unit,
            versions={name: version(name) for name in ("flowroll", "torch", "diffusers", "transformers")},
        )

    @property
    def failure(self) -> RankLostError | None:
        """Why this engine's ranks are down; None while they are up."""
        return self._peers.failure

    @property
    def weight_version(self) -> str:
        """Version of the weights in memory."""
        return self._weights.versions.current

    @property
    def rank_pids(self) -> Mapping[int, int]:
        """Process ids of the ranks that this engine started, by rank."""
        return self._peers.pids

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """Bytes that rank 0 has received from other ranks, by mesh axis."""
        return self._peers.received_bytes

    def on_failure(self, listener: FailureListener) -> None:
        """Calls it, on a thread of its own, once the ranks of this engine are down."""
        self._peers.add_listener(listener)

    def describe_memory(self) -> str:
        """How much memory the samples that run at once can take, in words."""
        defaults = self.info.defaults
        geometry = plan_geometry(self._model, height=defaults.height, width=defaults.width)
        return describe_memory(self.info, geometry, self.scheduler.limits)

    def interrupt(self) -> None:
        """Ends every request, and every later call, in a `ShuttingDownError`; may be called from any thread."""
        self.scheduler.stop(_shutting_down())

    def close(self) -> None:
        """Interrupts what runs, waits for it, ends the other ranks and frees the model; may be called twice."""
        self.interrupt()
        # Given up where a lost rank may hold a step for ever.
        while not self.scheduler.halt(_RELEASE_S) and self.failure is None:
            pass
        self._peers.close()
        if hasattr(self, "_model"):
            self._work.release()
            self._weights.release()
            self._offload.forget()
            del self._model, self._pipeline
            if self.info.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _check_interrupt(self) -> None:
        if (stopped := self.failure or self.scheduler.stopped) is not None:
            raise fresh(stopped)

    def _open_model(self) -> LoadedModel:
        self._check_interrupt()
        model: LoadedModel | None = getattr(self, "_model", None)
        if model is None:  # closed since the check
            raise _shutting_down()
        return model

    def _alone(self, action: Callable[[], T], mode: ExclusiveMode = "drain") -> T:
        """Does it while no request runs; at once where that is the case already, inside of an `exclusive` action."""
        self._check_interrupt()
        if self.scheduler.is_in_exclusive_task:
            return action()
        self.scheduler.start()
        return self.scheduler.exclusive(action, mode=mode).result()

    def _between_steps(self, action: Callable[[], T]) -> T:
        self.scheduler.start()
        future: Future[T] = self.scheduler.between_steps(action)
        return future.result()


def _parameters(model: LoadedModel, pipeline: Any) -> Iterator[Tensor]:
    """All weights of this rank."""
    for name in TORCH_COMPONENTS:
        yield from getattr(pipeline, name).parameters()
    yield from model.adapters.parameters()


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the engine must run to answer, got a shutdown; send the request to another replica.")
