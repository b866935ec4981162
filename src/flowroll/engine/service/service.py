"""The operations of an engine that a server calls. They run in the engine's process, which may be the server's own.

A method that is marked `blocking` or `working` may take long and is called on a thread; the others return immediately, some of
them with a future. Arguments and results are data that can be sent to another process, and hold no part of the model. An
unexpected error is turned into an `EngineError` by the `EngineClient` through which a server calls.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from flowroll.engine.adapters.files import AdapterFiles, parse_config
from flowroll.engine.adapters.pushed import read_factors
from flowroll.engine.adapters.store import StagedAdapter
from flowroll.engine.engine import Engine, RequestKind
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import ExclusiveMode, RequestFuture, Scheduler
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.service.open_tasks import OpenTasks
from flowroll.engine.service.probe import GenerationProbe
from flowroll.engine.service.status import EngineFacts, EngineStatus, Evidence, OpenedUpdate, SentNames, UpdateProgress
from flowroll.engine.weights.digests import Pieces
from flowroll.engine.weights.groups import (
    UNRECEIVED,
    GlooMembership,
    Membership,
    NcclMembership,
    WeightGroups,
    receive_from_group,
)
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.sent import copies_of_sent, fill_from_sent
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, tensor_head
from flowroll.engine.weights.store import WeightStore
from flowroll.errors import NotFoundError, RankLostError, ShuttingDownError, fresh
from flowroll.parallel.broadcasting import Backend
from flowroll.parallel.shared_memory import SharedMemory, placed, tensor_at
from flowroll.types import AdapterChange, ScoreAnswer, WeightUpdate
from flowroll.wire.pickled import SentTensors, named_tensors
from flowroll.wire.safetensors import DTYPES, StoredTensor, TensorHead

__all__ = ["EngineService", "RequestKind", "blocking"]

P = ParamSpec("P")
T = TypeVar("T")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])
# How long a thread may take to return from a collective after a rank was lost, in seconds.
_LOST_S = 3.0


def blocking(method: MethodT) -> MethodT:
    """Marks a method of `EngineService` that may take long."""
    method.is_blocking = True  # type: ignore[attr-defined]
    return method


def working(
    method: Callable[Concatenate[EngineService, P], T],
) -> Callable[Concatenate[EngineService, P], T]:
    """Marks a blocking method that is refused once the service drains or the engine is lost."""

    @functools.wraps(method)
    def checked(self: EngineService, /, *args: P.args, **options: P.kwargs) -> T:
        self._check_accepting()
        return method(self, *args, **options)

    return blocking(checked)


def _of_engine(method: Callable[Concatenate[Engine, P], T]) -> Callable[Concatenate[EngineService, P], T]:
    """Makes the method of the service that has the engine do what the engine's method of this name does."""

    @functools.wraps(method)
    def on_engine(self: EngineService, /, *args: P.args, **options: P.kwargs) -> T:
        result: T = getattr(self.engine, method.__name__)(*args, **options)
        return result

    return on_engine


def _of_scheduler(method: Callable[Concatenate[Scheduler, P], T]) -> Callable[Concatenate[EngineService, P], T]:
    """Makes the method of the service that has the engine's scheduler do what its method of this name does."""

    @functools.wraps(method)
    def on_scheduler(self: EngineService, /, *args: P.args, **options: P.kwargs) -> T:
        result: T = getattr(self.engine.scheduler, method.__name__)(*args, **options)
        return result

    return on_scheduler


def bucket_bytes(heads: Sequence[TensorHead]) -> int:
    """Returns the bytes that the tensors of a bucket take one after the other, with their alignment."""
    return placed([_num_bytes(head) for head in heads])[1]


def bucket_tensors(memory: Tensor, heads: Sequence[TensorHead]) -> list[Tensor]:
    """Returns the tensors of a bucket as views of memory that holds them one after the other."""
    starts, _ = placed([_num_bytes(head) for head in heads])
    return [tensor_at(memory, start, head.shape, DTYPES[head.dtype]) for start, head in zip(starts, heads, strict=True)]


def _as_bucket(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[list[TensorHead], SharedMemory]:
    heads = [tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in zip(names, tensors, strict=True)]
    memory = SharedMemory.create(bucket_bytes(heads))
    for place, tensor in zip(bucket_tensors(memory.bytes, heads), tensors, strict=True):
        place.copy_(tensor)
    return heads, memory


def _num_bytes(head: TensorHead) -> int:
    return math.prod(head.shape) * DTYPES[head.dtype].itemsize


class EngineService:
    """An engine behind a bounded queue. It is a context manager, whose exit calls `close`.

    Args:
        engine: The engine, which only this service uses from now on; its owner closes it after the service.
        max_queue: The number of requests that may wait behind those that run.
        max_control_queue: The number of checks of the weights that may be under way or wait.
        max_groups: The number of process groups that the engine may be in.

    Attributes:
        engine: The engine.
        max_groups: The number of process groups that the engine may be in.
    """

    def __init__(self, engine: Engine, *, max_queue: int, max_control_queue: int = 64, max_groups: int = 16) -> None:
        assert max_queue >= 0
        self.engine = engine
        self._max_queue = max_queue
        self._is_draining = False
        self._probe = GenerationProbe(engine)
        self.max_groups = max_groups
        self._groups = WeightGroups(max_groups)
        self._scores = OpenTasks(max_queue + 1, f"requests for scores must be at most {max_queue} in waiting")
        self._reads = OpenTasks(max_control_queue, f"checks of the weights must be at most {max_control_queue} at a time")
        self._updates: dict[str, WeightReceiver] = {}
        self._sent: dict[str, SentTensors] = {}
        self._staged: tuple[str, StagedWeights | StagedAdapter] | None = None
        engine.scheduler.start()

    def __enter__(self) -> EngineService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # State

    def facts(self) -> EngineFacts:
        """Returns the facts about the engine that do not change while it runs."""
        engine, device = self.engine, torch.device(self.engine.info.device)
        return EngineFacts(
            info=engine.info,
            model=engine.facts,
            batching=engine.scheduler.limits,
            modules=engine.modules,
            memory=engine.describe_memory(),
            pid=os.getpid(),
            gpu_uuid=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
        )

    def status(self) -> EngineStatus:
        """Returns the state of the engine at this moment."""
        engine, scheduler = self.engine, self.engine.scheduler
        return EngineStatus(
            load=scheduler.load(),
            oldest_waiting_s=scheduler.oldest_waiting_s(),
            weight_version=engine.weight_version,
            version_number=engine.versions.number,
            memory_mode=engine.memory_mode,
            graphs=engine.graph_counts,
            is_alive=scheduler.is_alive,
            is_accepting=not self._is_draining and scheduler.is_alive,
        )

    @property
    def failure(self) -> RankLostError | None:
        """The error that took the engine's ranks down and ended all accepted requests; None while the ranks are up."""
        return self.engine.failure

    @blocking
    def probe_generation(self) -> Evidence:
        """Finds evidence that the engine can generate, or generates an image in one step; see `GenerationProbe.check`."""
        self._check_accepting("the server must take requests to generate, got a shutdown; use another replica.")
        return self._probe.check()

    # Requests

    def submit(self, plan: RequestPlan, kind: RequestKind, *, timeout_s: float | None = None) -> RequestFuture[Any]:
        """Accepts a planned request. May be called from any thread.

        Args:
            plan: The request, planned for this engine's model.
            kind: Whether its samples become rollouts or plain images.
            timeout_s: The request fails if it has not ended after this many seconds; None: no limit.

        Returns:
            A future that ends in the engine's answer or in a `FlowrollError`, or is cancelled while the request waits.

        Raises:
            PausedError: Generation is paused.
            QueueFullError: Too many requests wait; its `retry_after_s` tells when to try again.
            ShuttingDownError: No more requests are accepted.
            InvalidRequestError: The adapter is not loaded.
            AsleepError: The memory of the weights is released.
            OutdatedWeightsError: The weights are older than the request demands, or allows.
        """
        self._check_accepting()
        self.engine.check_ready(plan.params)
        accepted: RequestFuture[Any] = self.engine.submit(plan, kind, timeout_s=timeout_s, max_waiting=self._max_queue)
        accepted.add_done_callback(self._probe.note_end)
        return accepted

    def submit_scores(self, plan: ScorePlan, *, timeout_s: float | None = None) -> Future[ScoreAnswer]:
        """Accepts a planned request to recompute log-probs. May be called from any thread.

        It does not wait in the queue of requests for samples: log-probs are recomputed between the steps of samples, one
        request after the other.

        Args:
            plan: The request, planned for this engine's model.
            timeout_s: The request fails if it has not ended after this many seconds; None: no limit.

        Returns:
            A future that ends in the log-probs or in a `FlowrollError`; `cancel` and `abort` end it early.

        Raises:
            QueueFullError: More than `max_queue` of these requests have not ended.
            ShuttingDownError: No more requests are accepted.
        """
        self._check_accepting()
        self.engine.check_ready_to_score(plan.params)
        return self._scores.add(lambda: self.engine.submit_scores(plan, timeout_s=timeout_s), work=plan.work)

    cancel = _of_scheduler(Scheduler.cancel)
    abort = _of_scheduler(Scheduler.abort)
    pause = _of_scheduler(Scheduler.pause)
    resume = _of_scheduler(Scheduler.resume)
    hold_starts = _of_scheduler(Scheduler.hold_starts)
    decode = working(_of_engine(Engine.decode))

    # Weights that are read from disk, and checks of the weights in memory

    @working
    def update_from_disk(self, files: WeightFiles, weight_version: str | None, mode: ExclusiveMode) -> WeightUpdate:
        """Reads new weights while requests run, and exchanges them while none runs; see `Engine.update_weights_from_disk`."""
        return self.engine.commit_weights(self.engine.stage_weights(files), weight_version=weight_version, mode=mode)

    def checksums(self, modules: Sequence[str]) -> Future[dict[str, str]]:
        """Computes the checksums of these modules by name, all of the same weights."""
        return self._read(lambda weights: weights.checksums(modules))

    def verify_weights(self, expected: Iterable[tuple[str, str]], module: str) -> Future[tuple[int, str]]:
        """Compares every tensor of a module with its expected checksum; gives their number and the version of the weights."""
        return self._read(lambda weights: weights.verify(expected, module))

    def differing_weights(self, expected: Mapping[str, str], module: str) -> Future[tuple[list[str], list[str]]]:
        """Finds the names that a module does not have, and those whose tensors differ; see `Engine.differing_weights`."""
        return self._read(lambda weights: weights.differing(expected, module))

    def _read(self, read: Callable[[WeightStore], Pieces[T]]) -> Future[T]:
        """Reads the weights between steps. Such reads take turns with steps, and their number is bounded.

        Raises:
            QueueFullError: Too many of them have not ended.
        """
        self._check_accepting()
        return self._reads.add(lambda: self.engine.submit_read(read))

    # Weights that arrive in buckets

    def open_update(self, module: str, *, partial: bool) -> OpenedUpdate:
        """Opens an update, whose new weights arrive in buckets while requests run."""
        receiver = self.engine.receive_weights(module, partial=partial)
        update_id = secrets.token_hex(8)
        self._updates[update_id] = receiver
        return OpenedUpdate(update_id=update_id, module=receiver.module, names=receiver.names, num_bytes=receiver.num_bytes)

    def claim_bucket(self, update_id: str, heads: Sequence[TensorHead]) -> None:
        """Checks what a bucket will hold before its data arrives. The caller must call `put_bucket` or `drop_bucket` next.

        Raises:
            WeightsRejectedError: A name is unknown, came already or comes twice, a shape differs, or a dtype is no float.
        """
        self._receiver(update_id).claim(heads)

    @working
    def put_bucket(self, update_id: str, heads: Sequence[TensorHead], memory: SharedMemory) -> UpdateProgress:
        """Copies the tensors of a claimed bucket from memory that holds them one after the other; see `bucket_tensors`."""
        receiver = self._receiver(update_id)
        receiver.put_claimed(heads, bucket_tensors(memory.bytes, heads))
        return self._progress(receiver)

    @working
    def arrived_bucket(self, update_id: str, names: Sequence[str]) -> tuple[list[TensorHead], SharedMemory]:
        """Returns a copy of tensors that have arrived, in the form in which `put_bucket` takes them."""
        receiver = self._receiver(update_id)
        return _as_bucket(names, receiver.arrived(names))

    def drop_bucket(self, update_id: str, heads: Sequence[TensorHead]) -> None:
        """Drops the claim of a bucket, so that its tensors may come in another bucket."""
        if (receiver := self._updates.get(update_id)) is not None:
            receiver.unclaim(heads)

    @blocking
    def open_sent(self, payload: bytes, *, module: str, flattened: bool, unread: Sequence[bytes]) -> SentNames:
        """Opens the tensors that a pickled payload names in another process's memory; the caller must call `close_sent`.

        See `wire.pickled.named_tensors` for the arguments and errors.
        """
        sent = named_tensors(payload, module=module, flattened=flattened, unread=unread)
        sent_id = secrets.token_hex(8)
        self._sent[sent_id] = sent
        return SentNames(sent_id=sent_id, names=tuple(name for name, _ in sent.pairs))

    @blocking
    def close_sent(self, sent_id: str) -> None:
        """Releases a sender's memory. It has no effect if the memory was released already."""
        if (sent := self._sent.pop(sent_id, None)) is not None:
            sent.release()

    @working
    def fill_from_sent(self, update_id: str, sent_id: str) -> UpdateProgress:
        """Copies a bucket from another process's memory, and releases that memory."""
        receiver = self._receiver(update_id)
        fill_from_sent(receiver, self._sent[sent_id])
        return self._progress(receiver)

    @working
    def fill_from_group(
        self,
        update_id: str,
        group_name: str,
        group_id: str,
        heads: Sequence[TensorHead],
        *,
        flattened: bool,
        packed_bytes: int | None = None,
        sha256: str | None = None,
    ) -> UpdateProgress:
        """Receives a bucket from a process group; see `receive_from_group`. After an error the group receives nothing more."""
        receiver, group = self._receiver(update_id), self._groups.find(group_name, group_id)
        form: dict[str, Any] = {"flattened": flattened, "packed_bytes": packed_bytes, "sha256": sha256}
        receive_from_group(receiver, group, heads, **form)
        return self._progress(receiver)

    @working
    def commit_update(self, update_id: str, weight_version: str | None, mode: ExclusiveMode) -> WeightUpdate:
        """Puts the arrived weights in place while no request runs. If tensors are missing, the update stays open."""
        return self.engine.commit_weights(self._ended(update_id), weight_version=weight_version, mode=mode)

    def is_open(self, update_id: str) -> bool:
        """Returns whether tensors of the update may still come."""
        receiver = self._updates.get(update_id)
        return receiver is not None and receiver.is_open

    def drop_update(self, update_id: str) -> None:
        """Drops an update and the tensors that have arrived. It has no effect on an update that has ended."""
        if (receiver := self._updates.pop(update_id, None)) is not None:
            receiver.drop()

    # Changes in two halves, so that several engines make them together or not at all

    @working
    def stage_from_disk(self, files: WeightFiles) -> str:
        """Reads and checks new weights, the first half of `update_from_disk`; returns the id for `commit_staged`.

        One change is staged at a time: it takes the place of another one that was staged and not committed.
        """
        return self._hold_staged(self.engine.stage_weights(files))

    @working
    def stage_update(self, update_id: str) -> str:
        """Takes the arrived weights of an update, the first half of `commit_update`; see `stage_from_disk`."""
        return self._hold_staged(self._ended(update_id))

    @working
    def stage_adapter(self, files: AdapterFiles, name: str, *, merged: bool) -> str:
        """Reads and checks an adapter, the first half of `load_adapter`; see `stage_from_disk`."""
        return self._hold_staged(self.engine.stage_lora_adapter(files, name=name, merged=merged))

    @working
    def commit_staged(self, staged_id: str, weight_version: str | None, mode: ExclusiveMode) -> WeightUpdate | AdapterChange:
        """Puts what was staged in place while no request runs, the second half of a change.

        Raises:
            NotFoundError: Nothing is staged under this id.
        """
        held = self._staged
        if held is None or held[0] != staged_id:
            raise NotFoundError(f"staged_id must be of the change that is staged, got {staged_id[:80]}; stage it again.")
        self._staged, staged = None, held[1]
        if isinstance(staged, StagedWeights):
            return self.engine.commit_weights(staged, weight_version=weight_version, mode=mode)
        return self.engine.commit_lora_adapter(staged, weight_version=weight_version, mode=mode)

    def drop_staged(self, staged_id: str) -> None:
        """Forgets what was staged. It has no effect on a change that was committed."""
        if self._staged is not None and self._staged[0] == staged_id:
            self._staged = None

    restore_versions = working(_of_engine(Engine.restore_versions))

    def _ended(self, update_id: str) -> StagedWeights:
        """Ends an update, and returns its weights, which have arrived."""
        staged = self._receiver(update_id).stage()
        self._updates.pop(update_id, None)
        return staged

    def _hold_staged(self, staged: StagedWeights | StagedAdapter) -> str:
        staged_id = secrets.token_hex(8)
        self._staged = staged_id, staged
        return staged_id

    # Process groups with trainers

    @working
    def join_group(
        self, name: str, *, rank: int, world_size: int, backend: Backend, address: str, port: int, timeout_s: float
    ) -> None:
        """Joins a process group as one member, for any layout of the engine; see `BroadcastGroup` for the arguments."""
        place: dict[str, Any] = {"rank": rank, "world_size": world_size, "address": address, "port": port}
        group: Membership
        if backend == "gloo":
            group = GlooMembership(name, timeout_s=timeout_s, **place)
        else:
            group = NcclMembership(name, timeout_s=timeout_s, device=self.engine.info.device, **place)
        self._groups.join(group)

    def find_group(self, name: str) -> str:
        """Returns the id of the group with this name; a later group of the same name has another id.

        Raises:
            NotFoundError: The engine is in no group of this name.
        """
        return self._groups.find(name).id

    @blocking
    def leave_group(self, name: str) -> None:
        """Leaves a process group. A broadcast that is under way ends with an error."""
        self._groups.leave(name)

    @blocking
    def leave_groups(self) -> None:
        """Leaves all process groups."""
        self._groups.close()

    @blocking
    def fail_group(self, name: str, group_id: str) -> None:
        """Closes a group after one of its buckets was refused, since no receiver takes what its trainer sends nevertheless.

        It has no effect if the group was left meanwhile, or another one of its name was joined.
        """
        with contextlib.suppress(NotFoundError):
            self._groups.find(name, group_id).close(UNRECEIVED)

    # Adapters

    lora_adapters = _of_engine(Engine.lora_adapters)

    @working
    def load_adapter(
        self, files: AdapterFiles, name: str, *, merged: bool, weight_version: str | None, mode: ExclusiveMode
    ) -> AdapterChange:
        """Reads an adapter while requests run, and puts it in place while none runs; see `Engine.load_lora_adapter`."""
        staged = self.engine.stage_lora_adapter(files, name=name, merged=merged)
        return self.engine.commit_lora_adapter(staged, weight_version=weight_version, mode=mode)

    @working
    def check_adapter(self, config: str, stored: Sequence[StoredTensor], name: str, *, merged: bool) -> None:
        """Checks an adapter before the data of its tensors has come.

        Args:
            config: The text of its adapter_config.json.
            stored: Its tensors, as the header of a safetensors file names them.
            name: The name that it will have.
            merged: Whether it will be added to a copy of the weights.

        Raises:
            WeightsRejectedError: The adapter is refused.
        """
        self.engine.check_lora_adapter(parse_config(config), stored, name=name, merged=merged)

    @working
    def load_pushed_adapter(
        self,
        sent_id: str,
        *,
        alpha: int | float | None,
        rank: int | None,
        merged: bool,
        weight_version: str | None,
        mode: ExclusiveMode,
    ) -> AdapterChange:
        """Adds factors that a trainer shares to the pushed adapter, which requests that name no adapter run with."""
        copies = copies_of_sent(self._sent[sent_id], self.engine.info.adapter_limits.max_adapter_bytes)
        staged = self.engine.stage_pushed_lora(read_factors(copies, alpha, rank), merged=merged)
        return self.engine.commit_lora_adapter(staged, weight_version=weight_version, mode=mode)

    @working
    def unload_adapter(self, name: str, *, weight_version: str | None, mode: ExclusiveMode) -> AdapterChange:
        """Unloads an adapter. Waiting requests that name it end in an error."""
        return self.engine.unload_lora_adapter(name, weight_version=weight_version, mode=mode)

    # Policies

    policies = _of_engine(Engine.policies)
    copy_policy = working(_of_engine(Engine.copy_policy))
    average_policy = working(_of_engine(Engine.average_policy))
    drop_policy = working(_of_engine(Engine.drop_policy))

    # Memory and life

    sleep = working(_of_engine(Engine.sleep))
    wake = working(_of_engine(Engine.wake))

    def drain(self) -> None:
        """Accepts no more requests; accepted ones go on."""
        self._is_draining = True

    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Ends all requests with `ShuttingDownError`, then the threads. May be called twice.

        Args:
            timeout_s: How many seconds the engine may take to end its current work. After that the threads are left running.

        Returns:
            Whether the threads have ended.
        """
        self._is_draining = True
        self._groups.close()
        self.engine.interrupt()
        return self.engine.scheduler.halt(min(timeout_s, _LOST_S) if self.failure else timeout_s)

    def _check_accepting(
        self, message: str = "the server must run to answer, got a shutdown; send the request to another replica."
    ) -> None:
        if self._is_draining or not self.engine.scheduler.is_alive:
            if (failure := self.failure) is not None:
                raise fresh(failure)
            if self._is_draining:
                raise ShuttingDownError(message)

    def _receiver(self, update_id: str) -> WeightReceiver:
        receiver = self._updates.get(update_id)
        if receiver is None:
            raise NotFoundError(
                f"update_id must be of an update that is under way, got {update_id[:80]}; it was committed, aborted or dropped "
                "after a silence: begin another.",
                field="update_id",
            )
        return receiver

    def _progress(self, receiver: WeightReceiver) -> UpdateProgress:
        return UpdateProgress(
            num_arrived=receiver.num_arrived,
            num_tensors=receiver.num_tensors,
            weight_version=self.engine.weight_version,
        )
