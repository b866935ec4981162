"""One engine as a Ray actor, for trainers that place their engines themselves, and as a replica of a fleet.

The engine runs in the actor's own process, and starts the other ranks of its layout there; the actor's resources (`num_gpus`)
are therefore those of all its ranks, on one node. Each method returns what the method of `Engine` with that name returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch

from flowroll.cluster.parcel import Parcel
from flowroll.engine import AdapterLimits, BatchLimits, Engine, Limits, RequestPlan
from flowroll.engine.arguments import image_request, rollout_request
from flowroll.engine.config import Graphs
from flowroll.engine.scheduler import PauseMode, StageSpan
from flowroll.engine.service import CallFuture, EngineFacts, EngineService, EngineStatus, Evidence, InProcessEngine, RequestKind
from flowroll.engine.service.client import outcome
from flowroll.errors import FlowrollError, fresh
from flowroll.replay.remote import score_params, scores_of
from flowroll.replay.scoring import Scores
from flowroll.types import (
    Exactness,
    GeneratedImage,
    Layout,
    LoraAdapter,
    Policy,
    Rollout,
    SamplingParams,
)
from flowroll.types.arguments import Integers

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call of a fleet ended.

    Attributes:
        result: The result; None after an error.
        error: The error; None: there was none.
        spans: How the time of a request was spent, by the clock of the actor's node.
        now_s: The monotonic clock of the actor's node when the call ended.
    """

    result: Any
    error: BaseException | None
    spans: tuple[StageSpan, ...]
    now_s: float


def _changing(
    method: Callable[Concatenate[Engine, P], T],
) -> Callable[Concatenate[EngineActor, P], Coroutine[Any, Any, T]]:
    """Makes the method of the actor that has its engine make a change, one at a time: each needs memory of its own."""

    @functools.wraps(method)
    async def change(self: EngineActor, /, *args: P.args, **options: P.kwargs) -> T:
        self._check()
        async with self._changing:
            return await asyncio.to_thread(method, self._owned, *args, **options)

    return change


class EngineActor:
    """An engine in a process of its own, with asynchronous methods that may be called at the same time.

        engine = ray.remote(EngineActor).options(num_gpus=2).remote("shapes-z_image", layout=Layout(sp=2))
        rollouts = await engine.rollout.remote("a red circle in the center", seed=1, num_outputs_per_prompt=8)

    What has tensors, an argument or a result, goes through Ray's object store; wrap a state dict in `pack` so that it is stored
    once. A call that is cancelled (`ray.cancel`) ends its request. Errors are those of `Engine`, as causes of Ray's own.

    Args:
        model: The path of a checkpoint folder on the actor's node, or the name of one that flowroll ships.
        variant: The variant of the model family; None: the family's first.
        dtype: "float32", "bfloat16" or "auto".
        device: "cpu", "cuda", "cuda:N" or "auto".
        limits: The limits of one request.
        batching: The limits of what runs at the same time.
        adapter_limits: The limits of the LoRA adapters.
        layout: How the transformer is distributed over ranks.
        rank_timeout_s: How many seconds ranks wait for each other.
        compile: Whether the transformer's blocks run compiled; see `Engine`.
        graphs: Whether forwards of small samples are recorded; see `Engine`.
        max_graph_bytes: The most memory that recordings take.
        exactness: "exact", or "fast" for an engine without any promise about bits; see `Engine`.
        fast_parts: What makes it fast; None: what the device has.
        num_threads: The number of CPU threads of its work; on a CPU, bits depend on it. None: what torch has in the actor's
            process, where Ray sets OMP_NUM_THREADS to the actor's `num_cpus`, or to 1.
        max_queue: The number of requests that may wait behind those that run; one more is a `QueueFullError`.
        max_control_queue: The number of checks of the weights at a time.

    Raises:
        FlowrollError: The engine cannot be started; see `Engine`.
    """

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
        compile: bool = False,
        graphs: Graphs = "auto",
        max_graph_bytes: int = 4 * 2**30,
        exactness: Exactness = "exact",
        fast_parts: Sequence[str] | None = None,
        num_threads: int | None = None,
        max_queue: int = 64,
        max_control_queue: int = 64,
    ) -> None:
        self._num_threads = num_threads
        self._use_threads()
        self._owned = Engine(
            model,
            variant=variant,
            dtype=dtype,
            device=device,
            limits=limits,
            batching=batching,
            adapter_limits=adapter_limits,
            layout=layout,
            rank_timeout_s=rank_timeout_s,
            compile=compile,
            graphs=graphs,
            max_graph_bytes=max_graph_bytes,
            exactness=exactness,
            fast_parts=fast_parts,
        )
        self._service = EngineService(self._owned, max_queue=max_queue, max_control_queue=max_control_queue)
        self._engine = InProcessEngine(self._service)
        self._calls: dict[int, CallFuture[Any]] = {}
        self._changing = asyncio.Lock()

    # Requests

    async def rollout(self, request: str | SamplingParams | None = None, /, **values: Any) -> list[Rollout]:
        """Runs the rollouts of one request; see `Engine.rollout`."""
        return await self._run(rollout_request(request, values), "rollout")

    async def generate(self, request: str | SamplingParams | None = None, /, **values: Any) -> list[GeneratedImage]:
        """Runs plain text-to-image generation; see `Engine.generate`."""
        return await self._run(image_request(request, values), "generate")

    async def recompute_log_probs(
        self,
        rollouts: Sequence[Rollout],
        *,
        steps: Integers | None = None,
        log_probs_only: bool = False,
        min_weight_version: str | None = None,
        policy: str | None = None,
    ) -> Scores:
        """Recomputes the log-probs of rollouts under the present weights; see `Client.score` for arguments and errors."""
        params = score_params(
            rollouts, steps, log_probs_only=log_probs_only, min_weight_version=min_weight_version, policy=policy
        )
        plan = await asyncio.to_thread(self._owned.plan_score, params)
        return _packed(scores_of(await self._of(self._engine.call(EngineService.submit_scores, plan))))

    async def abort(self, request_id: str | None = None, *, keep_partial: bool = False) -> int:
        """Ends the requests with this id, or all if it is None, and returns their number.

        Args:
            request_id: The id.
            keep_partial: Whether requests of which samples are finished end in these. All others are cancelled.
        """
        return await self._of(self._engine.call(EngineService.abort, request_id, keep_partial=keep_partial))

    async def pause(self, mode: PauseMode = "finish") -> None:
        """Refuses new requests and admits none of those that wait, until `resume`; see `Scheduler.pause`."""
        await self._of(self._engine.call(EngineService.pause, mode))

    async def resume(self) -> None:
        """Ends a pause."""
        await self._of(self._engine.call(EngineService.resume))

    # Weights

    update_weights = _changing(Engine.update_weights_from_tensors)
    update_weights_from_disk = _changing(Engine.update_weights_from_disk)

    async def weights_checksum(self, module: str = "transformer") -> str:
        """Returns the sha256 over a module's weights; see `Engine.weights_checksum`."""
        return (await self._of(self._engine.call(EngineService.checksums, [module])))[module]

    # Adapters and policies

    load_lora_adapter = _changing(Engine.load_lora_adapter)
    load_lora_adapter_from_tensors = _changing(Engine.load_lora_adapter_from_tensors)
    unload_lora_adapter = _changing(Engine.unload_lora_adapter)
    copy_policy = _changing(Engine.copy_policy)
    average_policy = _changing(Engine.average_policy)
    drop_policy = _changing(Engine.drop_policy)

    async def lora_adapters(self) -> tuple[LoraAdapter, ...]:
        """Returns the loaded adapters."""
        return await self._of(self._engine.call(EngineService.lora_adapters))

    async def policies(self) -> tuple[Policy, ...]:
        """Returns the policies beside the default."""
        return await self._of(self._engine.call(EngineService.policies))

    # Memory, state and life

    sleep = _changing(Engine.sleep)
    wake = _changing(Engine.wake)

    async def status(self) -> EngineStatus:
        """Returns the version of the weights, the load, and whether requests are accepted."""
        self._check()
        return self._service.status()

    async def facts(self) -> EngineFacts:
        """Returns what does not change while the engine runs: the model, its limits, layout and libraries."""
        return self._engine.facts

    async def health(self) -> Evidence:
        """Returns what shows that the engine generates, after an image in one step where nothing else does.

        Raises:
            FlowrollError: It does not.
        """
        self._check()
        return await self._of(self._engine.call(EngineService.probe_generation))

    async def close(self) -> None:
        """Ends all requests, the other ranks and the engine. The actor is of no use afterwards."""
        await asyncio.to_thread(self._engine.close)
        await asyncio.to_thread(self._owned.close)

    # What a fleet calls

    async def call(self, number: int, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Parcel:
        """Calls a method of the engine's service, as `EngineClient.call` does, and returns an `Outcome`.

        Args:
            number: The caller's number for this call, by which `cancel` finds it.
            method: The name of the method.
            args: Its arguments; a `Parcel` that was stored apart is given as an `ObjectRef` and is fetched here.
            options: Its keyword arguments.
        """
        import ray

        values = [await value if isinstance(value, ray.ObjectRef) else value for value in args]
        self._use_threads()
        future = self._engine.call(getattr(EngineService, method), *values, **options)
        del values, args
        self._calls[number] = future
        try:
            with contextlib.suppress(FlowrollError):
                await self._of(future)
        finally:
            del self._calls[number]
        result, error, spans = outcome(future)
        return Parcel(Outcome(result=result, error=error, spans=spans, now_s=time.monotonic()), is_shared=True)

    async def cancel(self, number: int) -> None:
        """Cancels a call of `call` whose caller has gone. It has no effect on one that has ended."""
        if (future := self._calls.get(number)) is not None:
            self._engine.cancel(future)

    async def pid(self) -> int:
        """Returns the process id of the actor."""
        return os.getpid()

    async def node(self) -> str:
        """Returns the id of the actor's node in Ray."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def _use_threads(self) -> None:
        # A thread of OpenMP's has a number of its own, and the engine takes that of the thread that calls it.
        if self._num_threads is not None and torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)

    def _check(self) -> None:
        if (failure := self._engine.failure) is not None:
            raise fresh(failure)

    async def _run(self, request: SamplingParams | RequestPlan, kind: RequestKind) -> list[Any]:
        plan = request if isinstance(request, RequestPlan) else await asyncio.to_thread(self._owned.plan, request)
        self._use_threads()
        return _packed(await self._of(self._engine.call(EngineService.submit, plan, kind)))

    async def _of(self, future: Future[T]) -> T:
        """Waits for the engine; a wait that is cancelled cancels what it waits for."""
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._engine.cancel(future)
            raise


def _packed(value: T) -> T:
    """Returns a result that the caller gets as `value`, once Ray has brought it."""
    return cast(T, Parcel(value))
