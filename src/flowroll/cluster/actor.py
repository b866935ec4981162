"""One engine as a Ray actor, for trainers that place their engines themselves, and as a replica of a fleet.

The engine runs in the actor's own process, and starts the other ranks of its layout there; the actor's resources (`num_gpus`)
are therefore those of all its ranks, on one node. Each method returns what the method of `Engine` with that name returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flowroll.cluster.parcel import Parcel
from flowroll.engine import AdapterLimits, BatchLimits, Engine, Limits, RequestPlan
from flowroll.engine.arguments import image_request, rollout_request
from flowroll.engine.scheduler import ExclusiveMode, PauseMode, StageSpan
from flowroll.engine.service import CallFuture, EngineFacts, EngineService, EngineStatus, Evidence, InProcessEngine, RequestKind
from flowroll.engine.service.client import outcome
from flowroll.engine.weights.offload import SleepMode
from flowroll.errors import FlowrollError, fresh
from flowroll.replay.remote import score_params, scores_of
from flowroll.replay.scoring import Scores
from flowroll.types import (
    AdapterChange,
    Exactness,
    GeneratedImage,
    Layout,
    LoraAdapter,
    MemoryChange,
    Number,
    Policy,
    PolicyChange,
    Rollout,
    SamplingParams,
    WeightUpdate,
)
from flowroll.types.arguments import Integers

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

    async def update_weights(
        self,
        named_tensors: Mapping[str, Tensor],
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
        partial: bool = False,
    ) -> WeightUpdate:
        """Replaces weights of a module by a trainer's tensors; see `Engine.update_weights_from_tensors`."""
        return await self._change(
            lambda: self._owned.update_weights_from_tensors(
                named_tensors, module=module, weight_version=weight_version, mode=mode, partial=partial
            )
        )

    async def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> WeightUpdate:
        """Replaces all weights of a module by those in files on the actor's node; see `Engine.update_weights_from_disk`."""
        return await self._change(
            lambda: self._owned.update_weights_from_disk(folder, module=module, weight_version=weight_version, mode=mode)
        )

    async def weights_checksum(self, module: str = "transformer") -> str:
        """Returns the sha256 over a module's weights; see `Engine.weights_checksum`."""
        return (await self._of(self._engine.call(EngineService.checksums, [module])))[module]

    async def load_lora_adapter(
        self,
        folder: str | Path,
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> AdapterChange:
        """Loads a LoRA adapter from a folder on the actor's node; see `Engine.load_lora_adapter`."""
        return await self._change(
            lambda: self._owned.load_lora_adapter(folder, name=name, merged=merged, weight_version=weight_version, mode=mode)
        )

    async def load_lora_adapter_from_tensors(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> AdapterChange:
        """Loads a LoRA adapter from a trainer's tensors; see `Engine.load_lora_adapter_from_tensors`."""
        return await self._change(
            lambda: self._owned.load_lora_adapter_from_tensors(
                tensors, config, name=name, merged=merged, weight_version=weight_version, mode=mode
            )
        )

    async def unload_lora_adapter(
        self, name: str, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """Unloads an adapter; see `Engine.unload_lora_adapter`."""
        return await self._change(lambda: self._owned.unload_lora_adapter(name, weight_version=weight_version, mode=mode))

    async def lora_adapters(self) -> tuple[LoraAdapter, ...]:
        """Returns the loaded adapters."""
        return await self._of(self._engine.call(EngineService.lora_adapters))

    async def policies(self) -> tuple[Policy, ...]:
        """Returns the policies beside the default."""
        return await self._of(self._engine.call(EngineService.policies))

    async def copy_policy(self, name: str, *, source: str | None = None, mode: ExclusiveMode = "drain") -> PolicyChange:
        """Makes a policy as a copy of another one; see `Engine.copy_policy`."""
        return await self._change(lambda: self._owned.copy_policy(name, source=source, mode=mode))

    async def average_policy(
        self, name: str, *, decay: Number, source: str | None = None, mode: ExclusiveMode = "drain"
    ) -> PolicyChange:
        """Moves a policy towards another one; see `Engine.average_policy`."""
        return await self._change(lambda: self._owned.average_policy(name, decay=decay, source=source, mode=mode))

    async def drop_policy(self, name: str, *, mode: ExclusiveMode = "drain") -> PolicyChange:
        """Forgets a policy; see `Engine.drop_policy`."""
        return await self._change(lambda: self._owned.drop_policy(name, mode=mode))

    # Memory, state and life

    async def sleep(self, mode: SleepMode = "offload") -> MemoryChange:
        """Releases the memory of the weights once the running requests have finished; see `Engine.sleep`."""
        return await self._change(lambda: self._owned.sleep(mode))

    async def wake(self) -> MemoryChange:
        """Restores the weights; see `Engine.wake`."""
        return await self._change(self._owned.wake)

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

    async def _change(self, change: Callable[[], T]) -> T:
        """Makes a change of weights, adapters or memory, one at a time: each needs memory of its own."""
        self._check()
        async with self._changing:
            return await asyncio.to_thread(change)

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
