"""The server of one replica: what verl's clients, replicas and trainers call. It becomes a Ray actor in `replica`.

It needs neither verl nor Ray. All methods run on one event loop; what takes long runs on threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flowroll.errors import InvalidRequestError
from flowroll.integrations.verl_omni.gathering import RequestGatherer
from flowroll.integrations.verl_omni.mapping import PromptIds, aborted_fields, output_fields, sample_request
from flowroll.integrations.verl_omni.options import ServerOptions
from flowroll.integrations.verl_omni.output import output_class
from flowroll.integrations.verl_omni.updates import ReceiveWeights, WeightUpdates
from flowroll.types import Rollout

if TYPE_CHECKING:
    from flowroll.engine import Engine
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _Active:
    """A sample that runs: its id, and the task that waits for it."""

    request_id: str
    task: asyncio.Task[Rollout]
    is_aborted: bool = False


class RolloutServer(WeightUpdates):
    """Serves one replica of verl with an engine of its own.

    Args:
        options: How it runs.
        receive_weights: Receives weights that come past Ray; None: there are none.
    """

    def __init__(self, options: ServerOptions, receive_weights: ReceiveWeights | None = None) -> None:
        super().__init__(options.adapter, receive_weights)
        self._options = options
        self._gatherer: RequestGatherer | None = None
        self._output: type[Any] | None = None
        self._active: dict[int, _Active] = {}
        # Closed by an abort until the trainer has sent its weights.
        self._gate = asyncio.Event()
        self._gate.set()
        self._rejects = False
        self._idle = asyncio.Event()
        self._idle.set()

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
            WeightsMismatchError: The sample is to be of the old policy, which the trainer has not sent yet.
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
        params = replace(request.params, lora_name=self._lora_name())
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
        engine = self._running_engine()
        if self._options.sleeps and (tags is None or "weights" in tags):
            await asyncio.to_thread(engine.wake)

    async def sleep(self) -> None:
        """Moves all weights to the host's memory, once no sample runs; in a standalone replica it does nothing."""
        engine = self._running_engine()
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

    def _running(self) -> tuple[Engine, RequestGatherer]:
        engine = self._running_engine()
        assert self._gatherer is not None
        return engine, self._gatherer


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
