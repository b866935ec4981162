"""The engine: a checkpoint in memory that turns requests into rollouts. No server needed."""

from __future__ import annotations

import functools
import resource
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.adapters.files import AdapterFiles, find_adapter, write_adapter
from flowroll.engine.adapters.pushed import LoraFactors
from flowroll.engine.adapters.store import AdapterStore, StagedAdapter
from flowroll.engine.arguments import image_request, rollout_request
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import AdapterLimits, EngineInfo, Limits, resolve_device, resolve_dtype
from flowroll.engine.estimate import describe_memory
from flowroll.engine.facts import ModelFacts
from flowroll.engine.loading import LoadedModel, load_model, modules_of
from flowroll.engine.outputs import Finished, as_image, as_rollout
from flowroll.engine.plan import RequestPlan, plan_geometry, plan_request
from flowroll.engine.recompute import LogProbs
from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.peers import FailureListener
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.rank_group import open_peers
from flowroll.engine.scheduler import BatchLimits, ExclusiveMode, RequestFuture, Scheduler
from flowroll.engine.scoring import ScorePlan, check_sample, plan_score
from flowroll.engine.weights.offload import SleepMode, WeightOffload
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, find_weights
from flowroll.engine.weights.store import WeightStore
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import InvalidRequestError, RankLostError, ShuttingDownError, fresh
from flowroll.families import StepScore
from flowroll.parallel.linears import count_parameters
from flowroll.types import (
    AdapterChange,
    DenoisingEnv,
    GeneratedImage,
    ImageFields,
    Layout,
    LoraAdapter,
    MemoryChange,
    RecordedSteps,
    Rollout,
    RolloutFields,
    SamplingParams,
    SamplingRecord,
    ScoreAnswer,
    ScoreParams,
    WeightUpdate,
    all_finite,
)
from flowroll.types.tensors import plain_tensor

RequestKind: TypeAlias = Literal["rollout", "generate"]
T = TypeVar("T")

# How long lost ranks may take to let go of what they failed.
_RELEASE_S = 5.0
# How long the loop may take to come back from a collective of lost ranks, before its requests are ended without it.
_LOST_S = 3.0


class Engine:
    """Rolls out one checkpoint.

    Calls from several threads share forwards, each with the bits that it has alone, under the CPU thread count of its caller. A
    context manager: `close` frees the model. After `close`, and after a rank was lost, every call raises `ShuttingDownError` or
    `RankLostError`. What changes the model (weights, adapters, memory) waits for the requests that run.

    Args:
        model: A diffusers checkpoint folder.
        variant: Variant of the model family, e.g. "turbo" for Z-Image-Turbo; None: the family's first.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 on the CPU.
        device: "cpu", "cuda", "cuda:N", or "auto".
        limits: What one request may ask for.
        batching: How much runs at once.
        adapter_limits: How many LoRA adapters it holds.
        layout: How the transformer is spread over ranks. The other ranks are started here, one process each, on this machine;
            under torchrun they are its processes, which call `follow`.
        rank_timeout_s: How long ranks wait for each other before the engine is taken down.

    Attributes:
        info: What is loaded, and how.
        scheduler: Runs the requests: cancels, pauses, counts them.

    Raises:
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
        InvalidRequestError: A device, dtype or layout that is not to be had.
        RankLostError: A rank ended before it was up.
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
    ) -> None:
        place = resolve_device(device)
        limits, layout, adapter_limits = limits or Limits(), layout or Layout(), adapter_limits or AdapterLimits()
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
        self._adapters = AdapterStore(self._model.adapters, self._executor, self._offload, versions, adapter_limits)
        self._log_probs = LogProbs(self._model, self._executor, self._offload, versions)
        self.scheduler = Scheduler(self._executor, batching or BatchLimits())
        self._peers.add_listener(functools.partial(self.scheduler.stop, patience_s=_LOST_S))
        self.info = _describe(self._model, str(checkpoint.folder), layout, limits, adapter_limits)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Requests

    def plan(self, params: SamplingParams) -> RequestPlan:
        """Checks a request against the model and fills in its defaults, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A value is off the model's grid or above a limit, or the adapter is not loaded.
            AsleepError: The memory of the weights is released.
            OutdatedWeightsError: The weights are older than the request demands.
        """
        self.check_ready(params)
        return plan_request(params, self._open_model(), self.info.limits)

    def check_ready(self, params: SamplingParams) -> None:
        """Checks what may change from one moment to the next: adapters, memory and version; errors as for `plan`."""
        self._check_weights(params.min_weight_version)
        self._open_model().adapters.record(params.lora_name)

    def rollout(
        self, request: str | SamplingParams | RequestPlan | None = None, /, **values: Unpack[RolloutFields]
    ) -> list[Rollout]:
        """Rolls out one request, e.g. `engine.rollout("a red fox", seed=42)`: one `Rollout` per sample, on the CPU.

        Args:
            request: The prompt; or the whole request, then without fields.
            **values: Fields of `SamplingParams`.

        Raises:
            InvalidRequestError: Before any model work.
        """
        return self._answer(self.submit(self._planned(rollout_request(request, values)), "rollout"))

    def generate(
        self, request: str | SamplingParams | RequestPlan | None = None, /, **values: Unpack[ImageFields]
    ) -> list[GeneratedImage]:
        """Plain text-to-image generation: the bits of the diffusers pipeline, one `GeneratedImage` per sample, on the CPU.

        Args:
            request: The prompt; or the whole request, with `rollout=False` and every rollout field at its default.
            **values: Fields of `SamplingParams` that are no rollout fields.

        Raises:
            InvalidRequestError: Before any model work; also for a rollout field.
        """
        return self._answer(self.submit(self._planned(image_request(request, values)), "generate"))

    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["rollout"], *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> RequestFuture[Rollout]: ...
    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["generate"], *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> RequestFuture[GeneratedImage]: ...
    def submit(
        self, plan: RequestPlan, kind: RequestKind, *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> RequestFuture[Any]:
        """Takes a planned request without waiting for its answer.

        Args:
            plan: From `plan`.
            kind: What its samples become.
            timeout_s: It is given up when it has not ended after so long; None: never.
            max_waiting: It is refused where so many wait; None: never.

        Raises:
            PausedError: Between `pause` and `resume`.
            QueueFullError: Too many wait.
        """
        self.scheduler.start()
        finish: Callable[[RequestPlan, Finished], Any] = self._as_rollout if kind == "rollout" else self._as_image
        return self.scheduler.submit(plan, finish, timeout_s=timeout_s, max_waiting=max_waiting)

    def decode(self, latents: Float[Tensor, " *latent"], *, height: int, width: int) -> Float[Tensor, " 3 1 height width"]:
        """The picture of one sample's latents, e.g. of a predicted clean image.

        Args:
            latents: One sample's latents, without batch dimension.
            height: Pixels.
            width: Pixels.

        Returns:
            float32 in [0, 1], on the CPU.

        Raises:
            InvalidRequestError: The size is off the model's grid, or the latents are not of that size or not finite.
            EngineError: The VAE gave NaN or infinity.
        """
        self._check_open()
        geometry = plan_geometry(self._model, height=height, width=width)
        if tuple(latents.shape) != geometry.latent_shape:
            raise InvalidRequestError(
                f"latents must have the shape {geometry.latent_shape} at {width} x {height}, got {tuple(latents.shape)}; "
                "give one sample's latents, without batch dimension.",
                field="latents",
            )
        if not all_finite(latents):
            raise InvalidRequestError(
                "latents must be finite, got NaN or infinity; look at the steps that made them.", field="latents"
            )
        picture: Tensor = self._between_steps(lambda: self._work.picture(latents.to(self._model.device), geometry))
        return picture

    # Log-probs of recorded steps

    def score(
        self,
        *,
        latents: Float[Tensor, " *latent"],
        next_latents: Float[Tensor, " *latent"],
        step: int,
        env: DenoisingEnv,
        record: SamplingRecord,
        sde_step_indices: Collection[int] | None = None,
    ) -> StepScore:
        """Log-prob, mean and velocity of one recorded step under the weights in memory, by the code that replay uses.

        Args:
            latents: x before the step, as a trajectory holds it.
            next_latents: x after it.
            step: Which step, counted from 0.
            env: The environment of the rollout.
            record: Its `sampling`.
            sde_step_indices: The stochastic steps of the rollout; None: every step is stochastic.

        Returns:
            On the CPU, float32.

        Raises:
            InvalidRequestError: The record is of another model, dtype or schema, or a value does not fit it.
        """
        sample = RecordedSteps(
            steps=(step,),
            latents=latents[None],
            next_latents=next_latents[None],
            denoising_env=env,
            sampling=record,
            sde_step_indices=None if sde_step_indices is None else tuple(sorted(sde_step_indices)),
        )
        self._check_adapter(sample)
        check_sample(sample, self._open_model(), self.info.limits)
        scores = self._between_steps(lambda: self._log_probs.sample(sample, log_probs_only=False))
        assert scores.velocities is not None and scores.means is not None
        return StepScore(
            velocity=scores.velocities[0], mean=scores.means[0], std=scores.stds[0].item(), log_prob=scores.log_probs[0]
        )

    def plan_score(self, params: ScoreParams) -> ScorePlan:
        """Checks a request to recompute log-probs, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
            OutdatedWeightsError: The weights are older than the request demands.
        """
        self.check_ready_to_score(params)
        return plan_score(params, self._open_model(), self.info.limits)

    def check_ready_to_score(self, params: ScoreParams) -> None:
        """Checks what may change from one moment to the next; errors as for `plan_score`."""
        self._check_weights(params.min_weight_version)
        for index, sample in enumerate(params.samples):
            try:
                self._check_adapter(sample)
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None

    def run_scores(self, params: ScoreParams | ScorePlan) -> ScoreAnswer:
        """As `score`, for several steps of several samples; each is scored alone, so neither their order nor number matters.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
        """
        return self.submit_scores(params if isinstance(params, ScorePlan) else self.plan_score(params)).result()

    def submit_scores(self, plan: ScorePlan, *, timeout_s: float | None = None) -> Future[ScoreAnswer]:
        """As `run_scores`, without waiting: between the steps of what runs.

        Args:
            plan: From `plan_score`.
            timeout_s: It is given up when it has not ended after so long; None: never.
        """
        self._check_open()
        self.scheduler.start()
        scores: Future[ScoreAnswer] = self.scheduler.between_steps(
            lambda: self._log_probs.answer(plan), request_id=plan.request_id, timeout_s=timeout_s
        )
        return scores

    # Weights

    @property
    def weight_version(self) -> str:
        """Version of the weights in memory."""
        return self._weights.versions.current

    @property
    def modules(self) -> tuple[str, ...]:
        """The parts of the checkpoint that have weights, e.g. "transformer", "text_encoder", "vae"."""
        return self._weights.modules

    def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> WeightUpdate:
        """Replaces the weights of a module by others of the same shapes: all of them, or, whatever goes wrong, none.

        Requests go on while the files are read and checked; then the change waits for those that run. With several ranks
        each reads its own part, from the same path, when its turn has come. Afterwards rollouts have the bits of an engine that
        was started on the new weights.

        Args:
            folder: A checkpoint folder, whose subfolder of the module's name is read; the module's own folder; or one
                .safetensors file.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.
            mode: What becomes of the requests that run: "drain": they finish first; "abort": they are done again, wholly, with
                the new weights.

        Raises:
            InvalidRequestError: Another module, or a version that is no short text.
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's. Everything is as it was.
        """
        staged = self.stage_weights(find_weights(folder, module))
        return self.commit_weights(staged, weight_version=weight_version, mode=mode)

    def update_weights_from_tensors(
        self,
        named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
        partial: bool = False,
    ) -> WeightUpdate:
        """Replaces the weights of a module by copies of a trainer's tensors in this process: all of them, or none.

        Args:
            named_tensors: By the names of the module's state_dict, e.g. `trainer.state_dict()`; taken one at a time. DTensors,
                as FSDP2 has them, are gathered: every rank of the trainer has to make this call, on an engine of its own.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.
            mode: What becomes of the requests that run; see `update_weights_from_disk`.
            partial: Whether what is not given stays as it is; otherwise it is an error.

        Raises:
            InvalidRequestError: Another module, or a version that is no short text.
            WeightsRejectedError: Tensors that are not the module's. Everything is as it was.
        """
        incoming = self.receive_weights(module, partial=partial)
        for name, tensor in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
            incoming.put([(name, plain_tensor(tensor, name, device=None))])
        return self.commit_weights(incoming.stage(), weight_version=weight_version, mode=mode)

    def stage_weights(self, files: WeightFiles) -> StagedWeights:
        """The first half of an update: reads and checks; may be called from any thread, while requests run.

        Raises:
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's.
        """
        self._check_open()
        return self._weights.stage(files)

    def receive_weights(self, module: str = "transformer", *, partial: bool = False) -> WeightReceiver:
        """Makes room for new weights that arrive in buckets, while requests run; what `stage` then gives can be committed.

        Args:
            module: "transformer" or "vae".
            partial: Whether tensors that do not arrive stay as they are; otherwise it is an error.

        Raises:
            InvalidRequestError: Another module.
        """
        self._check_open()
        return self._weights.receive(module, partial=partial)

    def commit_weights(
        self, staged: StagedWeights, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> WeightUpdate:
        """The second half of an update: exchanges the weights once no request runs; see `update_weights_from_disk`."""
        return self.exclusive(lambda: self._weights.commit(staged, weight_version), mode)

    def weights_checksum(self, module: str = "transformer") -> str:
        """sha256 over the module's tensors in the order of their names, of each its name and then its bytes, of all ranks.

        Waits for the requests that run. `flowroll.replay.weights_checksum` is the same for a trainer's module.

        Args:
            module: One of `modules`.

        Raises:
            InvalidRequestError: Another module.
        """
        return self.exclusive(lambda: self._weights.checksum(module))

    def verify_weights(self, expected: Iterable[tuple[str, str]], *, module: str = "transformer") -> int:
        """Compares every tensor of a module with what the caller expects. Waits for the requests that run.

        Args:
            expected: Name and sha256 of the raw bytes, of every tensor.
            module: One of `modules`.

        Returns:
            How many tensors there are.

        Raises:
            WeightsMismatchError: Names that are unknown, missing or doubled, or tensors that differ; lists them.
            InvalidRequestError: Another module.
        """
        return self.exclusive(lambda: self._weights.verify(expected, module))

    def differing_weights(self, expected: Mapping[str, str], *, module: str = "transformer") -> tuple[list[str], list[str]]:
        """Compares tensors of a module with what the caller expects. Waits for the requests that run.

        Args:
            expected: `typed_tensor_checksum` by name; tensors that are not named are not looked at.
            module: One of `modules`.

        Returns:
            The names that the module does not have, and those whose tensors differ.

        Raises:
            InvalidRequestError: Another module.
        """
        return self.exclusive(lambda: self._weights.differing(expected, module))

    # Adapters

    def lora_adapters(self) -> tuple[LoraAdapter, ...]:
        """The loaded adapters."""
        self._check_open()
        return self._adapters.loaded

    def load_lora_adapter(
        self,
        folder: str | Path,
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> AdapterChange:
        """Loads a LoRA adapter that peft has saved, for requests that give its name as `lora_name`.

        One that has the name is replaced, at once. The adapter keeps the dtype that it was saved in, as in peft. Requests go on
        while it is read and checked; then the change waits for those that run. The model without adapter is not touched.

        Args:
            folder: With adapter_config.json and adapter_model.safetensors.
            name: Printable text of 1 to 128 characters.
            merged: Add it to a copy of the weights that it changes, which takes their memory once more, and then costs
                nothing in a forward; a rollout has the bits of a checkpoint that peft's `merge_and_unload` made. Otherwise it
                runs beside the weights, and a rollout has the bits of a trainer's peft model.
            weight_version: Of the engine's weights from now on; None: one more than the highest number so far.
            mode: What becomes of the requests that run: "drain": they finish first; "abort": they are done again, wholly.

        Raises:
            InvalidRequestError: A name or version that is no short text.
            WeightsRejectedError: It cannot be read to its end, is no plain LoRA of this model's linears, or there is no room
                for it. Everything is as it was.
        """
        staged = self.stage_lora_adapter(find_adapter(folder), name=name, merged=merged)
        return self.commit_lora_adapter(staged, weight_version=weight_version, mode=mode)

    def load_lora_adapter_from_tensors(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str,
        merged: bool = False,
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> AdapterChange:
        """Loads an adapter from a trainer in this process; see `load_lora_adapter`. Other ranks must be on this machine.

        Args:
            tensors: `peft.get_peft_model_state_dict(model)`.
            config: `model.peft_config["default"].to_dict()`.
            name: Printable text of 1 to 128 characters.
            merged: Whether it is added to a copy of the weights.
            weight_version: Of the engine's weights from now on; None: one more than the highest number so far.
            mode: What becomes of the requests that run.
        """
        # In a folder, where other ranks read it too.
        with tempfile.TemporaryDirectory(prefix="flowroll-") as folder:
            write_adapter(Path(folder), tensors, config)
            return self.load_lora_adapter(folder, name=name, merged=merged, weight_version=weight_version, mode=mode)

    def stage_lora_adapter(self, files: AdapterFiles, *, name: str, merged: bool = False) -> StagedAdapter:
        """The first half of loading: reads and checks; may be called from any thread, while requests run.

        Raises:
            InvalidRequestError: A name that is no short text.
            WeightsRejectedError: It cannot be taken.
        """
        self._check_open()
        return self._adapters.stage(files, name=name, merged=merged)

    def stage_pushed_lora(self, factors: Mapping[str, LoraFactors], folder: Path, *, merged: bool) -> StagedAdapter:
        """Makes an adapter of factors that a trainer has pushed; see `AdapterStore.stage_pushed`."""
        self._check_open()
        return self._adapters.stage_pushed(factors, folder, merged=merged)

    def commit_lora_adapter(
        self, staged: StagedAdapter, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """The second half of loading: puts it in place once no request runs; see `load_lora_adapter`."""
        return self.exclusive(lambda: self._adapters.commit(staged, weight_version), mode)

    def unload_lora_adapter(
        self, name: str, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """Forgets an adapter; requests that wait for it end in an error.

        Args:
            name: The name that it was loaded under.
            weight_version: Of the engine's weights from now on; None: one more than the highest number so far.
            mode: What becomes of the requests that run; see `load_lora_adapter`.

        Raises:
            InvalidRequestError: There is no such adapter, or a version that is no short text.
        """
        return self.exclusive(lambda: self._adapters.unload(name, weight_version), mode)

    # Memory

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of the weights is released."""
        return self._offload.mode is not None

    @property
    def memory_mode(self) -> SleepMode | None:
        """Where the weights are kept while their memory is released; None: they are in place."""
        return self._offload.mode

    def sleep(self, mode: SleepMode = "offload") -> MemoryChange:
        """Releases the memory of all weights and adapters, on every rank, once the requests that run have finished.

        Until `wake`, whatever needs weights, requests that wait already included, ends in an `AsleepError`; also updates and
        checksums. An engine that sleeps already goes on as it does.

        Args:
            mode: "offload": weights of a GPU go to pinned memory of the host; those of a CPU stay, and nothing is released.
                "disk": they go to a file without a name in the folder for temporary files (TMPDIR).

        Raises:
            EngineError: There is no room there, on some rank. Everything is as it was.
        """
        return self._change_memory(
            lambda: self.is_asleep, lambda: self._offload.prepare_release(mode), lambda: self._executor.stage_release(mode)
        )

    def wake(self) -> MemoryChange:
        """Brings the weights back, bit for bit; one that does not sleep stays as it is.

        Raises:
            EngineError: There is no memory for them, or the disk fails, on some rank. The engine sleeps on.
        """
        return self._change_memory(lambda: not self.is_asleep, self._offload.prepare_resume, self._executor.stage_resume)

    def describe_memory(self) -> str:
        """How much memory the samples that run at once can take, in words."""
        defaults = self.info.defaults
        geometry = plan_geometry(self._model, height=defaults.height, width=defaults.width)
        return describe_memory(self.info, geometry, self.scheduler.limits)

    # Ranks and life

    @property
    def failure(self) -> RankLostError | None:
        """Why this engine's ranks are down; None while they are up."""
        return self._peers.failure

    @property
    def facts(self) -> ModelFacts:
        """What requests are checked and planned with."""
        return self._open_model().facts

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

    def exclusive(self, action: Callable[[], T], mode: ExclusiveMode = "drain") -> T:
        """Does something to the model while no request runs, before those that wait.

        Args:
            action: What is to be done; called on the scheduler's thread, or at once where the caller is in such an action.
            mode: What becomes of the requests that run; see `update_weights_from_disk`.
        """
        self._check_open()
        if self.scheduler.is_in_exclusive_task:
            return action()
        self.scheduler.start()
        return self.scheduler.exclusive(action, mode=mode).result()

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
            del self._model, self._pipeline, self._adapters, self._log_probs
            if self.info.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _check_open(self) -> None:
        if (stopped := self.failure or self.scheduler.stopped) is not None:
            raise fresh(stopped)
        if not hasattr(self, "_model"):
            raise _shutting_down()

    def _open_model(self) -> LoadedModel:
        self._check_open()
        model: LoadedModel | None = getattr(self, "_model", None)
        if model is None:  # closed since the check
            raise _shutting_down()
        return model

    def _check_weights(self, min_weight_version: str | None) -> None:
        self._check_open()
        self._offload.check_awake()
        self._weights.versions.demand(min_weight_version)

    def _check_adapter(self, sample: RecordedSteps) -> None:
        lora = sample.sampling.lora
        try:
            self._open_model().adapters.record(None if lora is None else lora.name)
        except InvalidRequestError as error:
            raise error.within("sampling") from None

    def _between_steps(self, action: Callable[[], Any]) -> Any:
        self.scheduler.start()
        return self.scheduler.between_steps(action).result()

    def _change_memory(
        self, is_done: Callable[[], bool], prepare: Callable[[], Callable[[], int]], stage: Callable[[], None]
    ) -> MemoryChange:
        def change() -> MemoryChange:
            started_s = time.perf_counter()
            num_bytes = 0
            if not is_done():
                take = prepare()
                stage()
                self._executor.commit()
                num_bytes = take()
            return MemoryChange(mode=self.memory_mode, num_bytes=num_bytes, seconds=time.perf_counter() - started_s)

        return self.exclusive(change)

    def _planned(self, request: SamplingParams | RequestPlan) -> RequestPlan:
        return request if isinstance(request, RequestPlan) else self.plan(request)

    def _answer(self, future: RequestFuture[T]) -> list[T]:
        """Waits for a request, which goes if its caller does."""
        try:
            return future.result()
        except BaseException:
            self.scheduler.cancel(future)
            raise

    def _as_image(self, plan: RequestPlan, finished: Finished) -> GeneratedImage:
        return as_image(plan, finished, weight_version=self.weight_version)

    def _as_rollout(self, plan: RequestPlan, finished: Finished) -> Rollout:
        peak_memory_mb = self._peak_memory_mb()
        return as_rollout(plan, finished, weight_version=self.weight_version, peak_memory_mb=peak_memory_mb)

    def _peak_memory_mb(self) -> float:
        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._model.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _describe(model: LoadedModel, folder: str, layout: Layout, limits: Limits, adapter_limits: AdapterLimits) -> EngineInfo:
    return EngineInfo(
        model=folder,
        family=model.family.name,
        variant=model.variant,
        pipeline=model.family.pipeline_class,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        parameters=count_parameters(model.transformer),
        layout=layout,
        transformer_bytes=sum(parameter.nbytes for parameter in model.transformer.parameters()),
        limits=limits,
        adapter_limits=adapter_limits,
        defaults=model.family.variants[model.variant],
        pixel_unit=model.spec.pixel_unit,
        versions={name: version(name) for name in ("flowroll", "torch", "diffusers", "transformers")},
    )


def _parameters(model: LoadedModel, pipeline: Any) -> Iterator[Tensor]:
    """All weights of this rank."""
    for module in modules_of(pipeline).values():
        yield from module.parameters()
    yield from model.adapters.parameters()


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the engine must run to answer, got a shutdown; send the request to another replica.")
