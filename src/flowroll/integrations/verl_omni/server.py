"""The server of one replica: what verl's clients, replicas and trainers call. It becomes a Ray actor in `replica`.

It needs neither verl nor Ray. All methods run on one event loop; what takes long runs on threads.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowroll.errors import InvalidRequestError, ShuttingDownError, WeightsRejectedError
from flowroll.integrations.verl_omni.gathering import RequestGatherer
from flowroll.integrations.verl_omni.mapping import PromptIds, aborted_fields, output_fields, sample_request
from flowroll.integrations.verl_omni.options import ServerOptions
from flowroll.integrations.verl_omni.output import output_class
from flowroll.integrations.verl_omni.weights import PackedTensor, adapter_tensors, base_tensors, unpack
from flowroll.types import Rollout

if TYPE_CHECKING:
    from flowroll.engine import Engine

# The name of the adapter that the trainer sends unmerged, with which all requests then run.
ADAPTER = "verl"
# The training steps that are remembered by version of the weights.
_MOST_VERSIONS = 1024
_log = logging.getLogger(__name__)
# Receives the weights that a trainer sends past Ray: `receive(keyword arguments of the call)` gives the named tensors.
ReceiveWeights = Callable[..., Sequence[tuple[str, Tensor]]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Active:
    """A sample that runs: its id, and the task that waits for it."""

    request_id: str
    task: asyncio.Task[Rollout]
    is_aborted: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class _Update:
    """Weights that arrive.

    Attributes:
        number: The number of their update.
        global_steps: The training step whose weights they are.
        peft_config: The configuration of the adapter that comes; None: weights of the transformer come.
        keeps_adapter: Whether the adapter stays that is there, since these are the weights under it.
        factors: The factors of the adapter so far.
        receiver: What receives the weights of the transformer.
    """

    number: int
    global_steps: int | None
    peft_config: dict[str, Any] | None
    keeps_adapter: bool
    factors: dict[str, Tensor] = field(default_factory=dict)
    receiver: Any = None


class RolloutServer:
    """Serves one replica of verl with an engine of its own.

    Args:
        options: How it runs.
        receive_weights: Receives weights that come past Ray; None: there are none.
    """

    def __init__(self, options: ServerOptions, receive_weights: ReceiveWeights | None = None) -> None:
        self._options, self._receive_weights = options, receive_weights
        self._engine: Engine | None = None
        self._gatherer: RequestGatherer | None = None
        self._output: type[Any] | None = None
        self._active: dict[int, _Active] = {}
        self._numbers = itertools.count()
        # Closed by an abort until the trainer has sent its weights.
        self._gate = asyncio.Event()
        self._gate.set()
        self._rejects = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._updates = asyncio.Lock()
        self._update: _Update | None = None
        self._pending_peft_config: dict[str, Any] | None = None
        # The training step of each version of the weights, and that of the weights that are being exchanged.
        self._steps_of: dict[str, int | None] = {}
        self._global_steps: int | None = None
        self._arriving_steps: int | None = None
        self._has_adapter = False

    # Life

    async def launch_server(self) -> dict[str, Any]:
        """Loads the checkpoint, and returns what is served.

        Raises:
            CheckpointError: The folder is not a complete checkpoint.
            UnsupportedModelError: No family supports the checkpoint.
            InvalidRequestError: The device, dtype or layout is not available.
        """
        if self._engine is None:
            engine, self._output = await asyncio.to_thread(self._load)
            limit = min(self._options.max_group, engine.info.limits.max_outputs)
            self._gatherer = RequestGatherer(engine, wait_s=self._options.gather_s, most=limit)
            self._engine = engine
            self._note_steps(engine.weight_version, None)
        info = self._engine.info
        served = {name: getattr(info, name) for name in ("family", "variant", "dtype", "device")}
        return {**served, "layout": info.layout.name}

    def _load(self) -> tuple[Engine, type[Any]]:
        from flowroll.engine import Engine

        options = self._options
        engine = Engine(
            options.model, variant=options.variant, dtype=options.dtype, device=options.device, layout=options.layout
        )
        return engine, output_class()

    async def shutdown(self) -> None:
        """Ends every sample, and frees the model."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.close)

    # Samples

    async def generate(
        self,
        prompt_ids: Any,
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Any = None,
        negative_prompt_ids: Any = None,
        prompt_mask: Any = None,
        extra_prompt_ids: Mapping[str, Any] | None = None,
        negative_extra_prompt_ids: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> Any:
        """Makes one sample.

        Args:
            prompt_ids: The token ids of the prompt.
            sampling_params: The sampling parameters; see `mapping.sample_request`.
            request_id: The id by which the sample can be aborted.
            image_data: Reference images; there must be none.
            video_data: As `image_data`.
            audio_data: As `image_data`.
            mm_processor_kwargs: Options of a processor of these; there must be none.
            negative_prompt_ids: The token ids of the negative prompt.
            prompt_mask: Which of the ids are text; all must be.
            extra_prompt_ids: The token ids for each text encoder, of a model with several.
            negative_extra_prompt_ids: Those of the negative prompt.
            priority: 0; samples are served in the order of their arrival.

        Returns:
            A `DiffusionOutput`; one with the `stop_reason` "aborted" if the sample was given up.

        Raises:
            InvalidRequestError: The request is invalid; this is raised before any model work.
            FlowrollError: The engine could not run it.
        """
        engine, gatherer = self._running()
        media = {"image_data": image_data, "video_data": video_data, "audio_data": audio_data}
        _check_unused({**media, "mm_processor_kwargs": mm_processor_kwargs, "priority": priority or None}, prompt_mask)
        prompt = PromptIds(
            ids=prompt_ids,
            negative_ids=negative_prompt_ids,
            extra=extra_prompt_ids,
            negative_extra=negative_extra_prompt_ids,
        )
        request = sample_request(prompt, sampling_params, facts=engine.facts, algorithm=self._options.algorithm)
        while not self._gate.is_set():
            if self._rejects:
                return self._made(aborted_fields(sampling_params, global_steps=self._global_steps))
            await self._gate.wait()
        params = replace(request.params, lora_name=ADAPTER) if self._has_adapter else request.params
        rollout = await self._run(request_id, gatherer.run(params, request.noise_seed))
        if rollout is None:
            return self._made(aborted_fields(sampling_params, global_steps=self._global_steps))
        steps = self._steps_of.get(rollout.weight_version, self._arriving_steps)
        return self._made(output_fields(rollout, request, global_steps=steps))

    async def _run(self, request_id: str, sample: Coroutine[Any, Any, Rollout]) -> Rollout | None:
        """Runs a sample, and returns None if it was aborted."""
        number = next(self._numbers)
        active = self._active[number] = _Active(request_id=request_id, task=asyncio.ensure_future(sample))
        self._idle.clear()
        try:
            return await active.task
        except asyncio.CancelledError:
            if active.is_aborted:
                return None
            active.task.cancel()
            raise
        finally:
            del self._active[number]
            if not self._active:
                self._idle.set()

    def _made(self, fields: Mapping[str, Any]) -> Any:
        assert self._output is not None
        return self._output(**fields)

    # Abort and resume

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """Takes no new samples, waits for the running ones, and aborts what has not ended after `abort_drain_s` seconds.

        Samples that come until `resume_generation` wait for it.

        Args:
            reset_prefix_cache: There is no such cache.
            reject_request: Whether samples that come until then end at once as aborted, in place of waiting.

        Returns:
            `aborted_count`, `request_ids` of the aborted samples, and `drained`: whether all ended by themselves.
        """
        self._gate.clear()
        self._rejects = reject_request
        if self._gatherer is not None:
            self._gatherer.flush()
        try:
            await asyncio.wait_for(self._idle.wait(), self._options.abort_drain_s)
        except TimeoutError:
            ids = [one.request_id for one in self._active.values()]
            _log.warning(
                "%d samples had not ended %g s after they were to; aborting them", len(ids), self._options.abort_drain_s
            )
            for one in list(self._active.values()):
                one.is_aborted = True
                one.task.cancel()
            await self._idle.wait()
            return {"aborted_count": len(ids), "request_ids": ids, "drained": False}
        return {"aborted_count": 0, "request_ids": [], "drained": True}

    async def abort_request(self, request_id: str, reset_prefix_cache: bool = True) -> dict[str, Any]:
        """Aborts the samples with this id; `generate` returns at once, with the `stop_reason` "aborted"."""
        found = [one for one in self._active.values() if one.request_id == request_id]
        for one in found:
            one.is_aborted = True
            one.task.cancel()
        if not found:
            return {"aborted": False, "request_id": request_id, "error": f"no sample with the id {request_id[:256]} runs"}
        return {"aborted": True, "request_id": request_id}

    async def resume_generation(self) -> None:
        """Takes samples again after `abort_all_requests`."""
        self._rejects = False
        self._gate.set()

    async def resume_engine_generation(self) -> None:
        """Does nothing: the engine itself is not stopped by an abort."""

    async def open_submission_gate(self) -> None:
        """Does what `resume_generation` does."""
        await self.resume_generation()

    async def wait_for_requests_to_drain(self) -> None:
        """Waits until no sample runs."""
        if self._gatherer is not None:
            self._gatherer.flush()
        await self._idle.wait()

    # Memory

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Restores the weights bit for bit, unless the tags name other things alone."""
        engine, _ = self._running()
        if self._options.sleeps and (tags is None or "weights" in tags):
            await asyncio.to_thread(engine.wake)

    async def sleep(self) -> None:
        """Moves all weights to the host's memory, once no sample runs; in a standalone replica it does nothing."""
        engine, _ = self._running()
        if self._options.sleeps:
            await asyncio.to_thread(engine.sleep)

    async def clear_kv_cache(self) -> None:
        """Does nothing: there is no such cache."""

    async def release_kv_cache(self) -> None:
        """Does nothing: there is no such cache."""

    async def resume_kv_cache(self) -> None:
        """Does nothing: there is no such cache."""

    async def start_profile(self, **options: Any) -> None:
        """Does nothing but say so: the engine has no profiler."""
        _log.warning("flowroll has no profiler; use the trace of its requests (docs/architecture.md)")

    async def stop_profile(self) -> None:
        """Does nothing."""

    # Weights

    async def set_global_steps(self, global_steps: int) -> None:
        """Names the training step whose weights are in memory, for the samples that they make."""
        engine, _ = self._running()
        self._note_steps(engine.weight_version, global_steps)

    async def begin_weights(
        self,
        *,
        global_steps: int | None = None,
        peft_config: Mapping[str, Any] | None = None,
        base_sync_done: bool = True,
    ) -> int:
        """Begins an update of the weights, and gives up one that was not brought to its end.

        Args:
            global_steps: The training step whose weights these are.
            peft_config: The configuration of the adapter whose factors come, as peft's `to_dict` gives it; None: the weights of
                the transformer come.
            base_sync_done: False: the weights of the transformer come all the same.

        Returns:
            The number of the update, for the next calls.
        """
        engine, _ = self._running()
        if peft_config is None and self._pending_peft_config is not None:
            peft_config, base_sync_done = self._pending_peft_config, True
        self._pending_peft_config = None
        if self._update is not None and self._update.receiver is not None:
            self._update.receiver.drop()
        self._update = None
        adapter = dict(peft_config) if peft_config is not None and base_sync_done else None
        receiver = engine.receive_weights() if adapter is None else None
        self._update = _Update(
            number=next(self._numbers),
            global_steps=global_steps,
            peft_config=adapter,
            keeps_adapter=peft_config is not None,
            receiver=receiver,
        )
        return self._update.number

    async def put_weights(self, update: int, bucket: Sequence[PackedTensor]) -> None:
        """Takes a bucket of an update.

        Raises:
            WeightsRejectedError: A tensor does not fit the model, or another update has begun.
        """
        current = self._update_of(update)
        await asyncio.to_thread(self._put, current, bucket)

    def _put(self, update: _Update, bucket: Sequence[PackedTensor]) -> None:
        named = [(packed.name, unpack(packed)) for packed in bucket]
        if update.receiver is None:
            update.factors |= named
            self._check_room(update)
            return
        for pair in base_tensors(named):
            update.receiver.put([pair])

    def _check_room(self, update: _Update) -> None:
        engine, _ = self._running()
        most, size = engine.info.adapter_limits.max_adapter_bytes, sum(one.nbytes for one in update.factors.values())
        if size > most:
            raise WeightsRejectedError(
                f"the adapter must have at most {most} bytes, got {size} so far; train one of a lower rank."
            )

    async def commit_weights(self, update: int) -> str:
        """Exchanges the weights once no sample runs, and returns their version. If anything fails, none is replaced.

        Raises:
            WeightsRejectedError: Tensors are missing or do not fit the model.
        """
        engine, _ = self._running()
        current = self._update_of(update)
        self._update = None
        async with self._updates:
            # A sample may be ready before this coroutine goes on.
            self._arriving_steps = self._global_steps if current.global_steps is None else current.global_steps
            version = await asyncio.to_thread(self._commit, engine, current)
            self._note_steps(version, current.global_steps)
        return version

    def _commit(self, engine: Engine, update: _Update) -> str:
        if update.peft_config is not None:
            tensors = adapter_tensors(update.factors)
            version = engine.load_lora_adapter_from_tensors(tensors, update.peft_config, name=ADAPTER).weight_version
            self._has_adapter = True
            return version
        staged = update.receiver.stage()

        def exchange() -> str:
            version = engine.commit_weights(staged).weight_version
            # Whole weights of a policy that has no adapter, or has it merged.
            if self._has_adapter and not update.keeps_adapter:
                version = engine.unload_lora_adapter(ADAPTER).weight_version
                self._has_adapter = False
            return version

        return engine.exclusive(exchange)

    async def drop_weights(self, update: int) -> None:
        """Gives an update up; the weights stay what they are."""
        if self._update is not None and self._update.number == update:
            if self._update.receiver is not None:
                self._update.receiver.drop()
            self._update = None

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Does what verl-omni asks of its workers: `set_pending_lora_peft_config` and `update_weights_from_ipc`.

        Args:
            method: The name of the method.
            timeout: How many seconds it may take; None: no limit.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            A list with its result.

        Raises:
            InvalidRequestError: There is no such method.
        """
        values = dict(kwargs or {})
        methods: Mapping[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "set_pending_lora_peft_config": self._set_pending_lora_peft_config,
            "update_weights_from_ipc": self._update_weights_from_ipc,
        }
        if method not in methods:
            known = ", ".join(methods)
            raise InvalidRequestError(
                f"method must be one of {known}, got {method[:80]!r}; call the server's own.", field="method"
            )
        return [await asyncio.wait_for(methods[method](*args, **values), timeout)]

    async def _set_pending_lora_peft_config(self, peft_config: Mapping[str, Any] | None = None) -> None:
        self._pending_peft_config = None if peft_config is None else dict(peft_config)

    async def _update_weights_from_ipc(
        self, peft_config: Mapping[str, Any] | None = None, base_sync_done: bool = False, **place: Any
    ) -> str:
        if self._receive_weights is None:
            raise WeightsRejectedError(
                "weights must come in buckets here, got a call that announces others; use lora.merge=True."
            )
        update = await self.begin_weights(peft_config=peft_config, base_sync_done=base_sync_done)
        try:
            current = self._update_of(update)
            named = await asyncio.to_thread(self._receive_weights, **place)
            if current.receiver is None:
                current.factors |= dict(named)
            else:
                await asyncio.to_thread(current.receiver.put, base_tensors(named))
            return await self.commit_weights(update)
        except BaseException:
            await self.drop_weights(update)
            raise

    def _update_of(self, number: int) -> _Update:
        if self._update is None or self._update.number != number:
            raise WeightsRejectedError(
                "the weights must be of the update that began last, got those of another one; begin the update again."
            )
        return self._update

    def _note_steps(self, version: str, global_steps: int | None) -> None:
        if global_steps is not None:
            self._global_steps = int(global_steps)
        self._steps_of[version] = self._global_steps
        while len(self._steps_of) > _MOST_VERSIONS:
            del self._steps_of[next(iter(self._steps_of))]

    def _running(self) -> tuple[Engine, RequestGatherer]:
        if self._engine is None or self._gatherer is None:
            raise ShuttingDownError("the server must be launched to answer, got no engine; call launch_server first.")
        return self._engine, self._gatherer


def _check_unused(given: Mapping[str, Any], prompt_mask: Any) -> None:
    for name, value in given.items():
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            raise InvalidRequestError(
                f"{name} must be left out, since flowroll's plug-in makes pictures of text, got {str(value)[:80]}; remove it.",
                field=name,
            )
    if prompt_mask is not None and not bool(prompt_mask.all()):
        raise InvalidRequestError(
            "prompt_mask must mark every token, got padding; send the token ids without padding.", field="prompt_mask"
        )
