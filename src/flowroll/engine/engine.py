"""The engine: a checkpoint in memory that turns requests into rollouts. It needs no server."""

from __future__ import annotations

import contextlib
import functools
import resource
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.checkpoints import find_checkpoint
from flowroll.engine.adapters.files import AdapterFiles, adapter_of, find_adapter
from flowroll.engine.adapters.pushed import LoraFactors
from flowroll.engine.adapters.store import AdapterStore, StagedAdapter
from flowroll.engine.arguments import image_request, rollout_request
from flowroll.engine.checkpoint import Checkpoint, examine_checkpoint
from flowroll.engine.config import (
    AdapterLimits,
    EngineInfo,
    FastMode,
    Graphs,
    Limits,
    resolve_device,
    resolve_dtype,
    resolve_graphs,
)
from flowroll.engine.estimate import describe_memory
from flowroll.engine.facts import ModelFacts
from flowroll.engine.fast import check_fast, turn_fast
from flowroll.engine.images import blank_image
from flowroll.engine.loading import LoadedModel, load_model, modules_of
from flowroll.engine.outputs import Finished, as_image, as_rollout
from flowroll.engine.plan import RequestPlan, plan_geometry, plan_request
from flowroll.engine.policies.store import PolicyStore
from flowroll.engine.recompute import LogProbs
from flowroll.engine.runner.changes import Sleep
from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.model_runner import forward
from flowroll.engine.runner.peers import FailureListener
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.rank_group import open_peers
from flowroll.engine.runner.sample import Sample
from flowroll.engine.scheduler import BatchLimits, ExclusiveMode, RequestFuture, Scheduler
from flowroll.engine.scoring import ScorePlan, check_sample, plan_score
from flowroll.engine.weights.digests import Pieces
from flowroll.engine.weights.offload import SleepMode, WeightOffload
from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, find_weights, slots_of
from flowroll.engine.weights.store import WeightStore
from flowroll.engine.weights.versions import VersionState, WeightVersions
from flowroll.errors import InvalidRequestError, RankLostError, ShuttingDownError, fresh
from flowroll.exact import (
    FINDINGS,
    Certificate,
    GraphCounts,
    cache_folder,
    certify,
    check_can_compile,
    is_compiled,
    kernels_of,
    use_exact_kernels,
)
from flowroll.families import StepScore
from flowroll.openmp import release_team
from flowroll.parallel.linears import count_parameters
from flowroll.types import (
    AdapterChange,
    DenoisingEnv,
    Exactness,
    GeneratedImage,
    ImageFields,
    Layout,
    LoraAdapter,
    MemoryChange,
    Number,
    Policy,
    PolicyChange,
    Provenance,
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
from flowroll.wire.safetensors import StoredTensor

RequestKind: TypeAlias = Literal["rollout", "generate"]
T = TypeVar("T")

# How long the scheduler's threads may take to end before `close` checks whether a rank was lost, in seconds.
_RELEASE_S = 5.0
# How long the loop may take to return from a collective after a rank was lost, before its requests are ended without it.
_LOST_S = 3.0
# What a fast engine's compiled blocks are called; replay has no such kernels.
_FAST_KERNELS = f"compiled by torch {torch.__version__} with its own settings"
# Rows and columns of tokens of the sample that blocks are compiled for first.
_WARM_TOKENS = 8


class Engine:
    """Runs rollouts and plain generation with one checkpoint.

    Calls from several threads share forwards, and each result is bit for bit the same as alone, with the CPU thread count of
    its caller. The engine is a context manager, and `close` frees the model. After `close` every call raises
    `ShuttingDownError`, and after a rank was lost, `RankLostError`. Changes of the model (weights, adapters, memory) wait for
    the running requests.

    Args:
        model: The path of a diffusers checkpoint folder, or the name of one that flowroll ships, e.g. "shapes-z_image".
        variant: The variant of the model family, e.g. "turbo" for Z-Image-Turbo; None: the one that the folder's flowroll.json
            names, else the family's first.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 on the CPU.
        device: "cpu", "cuda", "cuda:N", or "auto".
        limits: The limits of one request.
        batching: The limits of what runs at the same time.
        adapter_limits: The limits of the LoRA adapters.
        layout: How the transformer is distributed over ranks. The engine starts the other ranks on this machine, one process
            each; under torchrun they are its other processes, which call `follow`.
        rank_timeout_s: How many seconds ranks wait for each other before the engine is taken down.
        compile: Whether the transformer's blocks run compiled (`exact/compiled.py`): other kernels, exact among themselves. A
            replay needs a transformer that `replay.compile_blocks` has prepared. One rank alone, and samples run one by one.
        graphs: "auto": with one rank on CUDA and eager kernels, forwards of samples of up to 724 x 724 pixels that are met
            again are recorded as CUDA graphs and replayed (`exact/graphs.py`), with the same bits; "off": none are.
        max_graph_bytes: The most memory that recordings take; those that were used longest ago are dropped for new ones.
        exactness: "exact", or "fast": ordinary batches and faster kernels, without any promise about bits (`engine/fast.py`).
            Every sample says so, and `info.fast` says how far off it is. One rank alone.
        fast_parts: What makes it fast, of "batch", "attention", "compile" and "fp8"; None: what the device has of the first
            three, and on a CPU "batch" alone.
        cache_dir: The folder in which what is found about this machine's kernels is kept; None: that of the environment
            variable FLOWROLL_CACHE_DIR, else `flowroll` in the user's cache.

    Attributes:
        info: What is loaded, and how.
        scheduler: The request scheduler, which runs, cancels, pauses and counts requests.

    Raises:
        CheckpointError: The folder is not a complete checkpoint.
        UnsupportedModelError: No family supports the checkpoint.
        InvalidRequestError: The device, dtype or layout is not available, or ranks would have other bits than one rank.
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
        compile: bool = False,
        graphs: Graphs = "auto",
        max_graph_bytes: int = 4 * 2**30,
        exactness: Exactness = "exact",
        fast_parts: Sequence[str] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        place = resolve_device(device)
        kernels, cache = use_exact_kernels(place), cache_folder(cache_dir)
        FINDINGS.load(cache, kernels, place)
        self._keep_findings = functools.partial(FINDINGS.save, cache, kernels, place)
        limits, layout, adapter_limits = limits or Limits(), layout or Layout(), adapter_limits or AdapterLimits()
        check_fast(exactness, fast_parts, layout=layout, compile=compile)
        if compile:
            _check_compile(layout, place)
        # The fast mode runs ordinary batches and kernels that are compiled, which were not looked at in a recording.
        other_kernels = compile or exactness == "fast"
        self._graphs = resolve_graphs(graphs, max_graph_bytes, device=place, layout=layout, compile=other_kernels)
        checkpoint = examine_checkpoint(find_checkpoint(model), variant=variant)
        weights = resolve_dtype(dtype, place)
        self._peers = open_peers(checkpoint, layout, limits, dtype=weights, device=place, timeout_s=rank_timeout_s)
        with contextlib.ExitStack() as opened:
            opened.callback(self._peers.close)
            self._model, self._pipeline = load_model(
                checkpoint, device=place, dtype=weights, mesh=self._peers.mesh, compile=compile, graphs=self._graphs
            )
            self._peers.serve(self._model.spec, limits)
            certificate = certify(self._model.transformer, kernels, device=place, dtype=weights)
            self._keep_findings()
            fast: FastMode | None = None
            if exactness == "fast":
                self._model, fast = turn_fast(self._model, self._pipeline, fast_parts)
            transformer = self._model.transformer
            self._offload = WeightOffload(
                functools.partial(_parameters, self._model, self._pipeline),
                lambda: [slot.live for slot in slots_of(transformer).values()],
            )
            versions = WeightVersions()
            self._policies = PolicyStore(self._model.adapters, self._offload, versions, adapter_limits.max_policies)
            self._work = PipelineRunner(self._model, self._pipeline, versions, self._offload, self._policies)
            self._executor = Executor(self._model, self._work, self._peers, self._offload)
            self._weights = WeightStore(self._pipeline, self._executor, self._model.adapters, self._offload, versions)
            self._adapters = AdapterStore(self._model.adapters, self._executor, self._offload, versions, adapter_limits)
            self._log_probs = LogProbs(
                self._model, self._executor, self._offload, versions, self._policies, exactness=exactness
            )
            self.scheduler = Scheduler(self._executor, batching or BatchLimits())
            self._peers.add_listener(functools.partial(self.scheduler.stop, patience_s=_LOST_S))
            self.info = _describe(self._model, checkpoint, layout, limits, adapter_limits, certificate, fast)
            if self._graphs is not None:
                self.info = replace(self.info, graphs="on", max_graph_bytes=max_graph_bytes)
            self._weights.note_checksum(limits.max_hashed_bytes)
            if compile:
                self._compile()
            opened.pop_all()
        release_team()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Requests

    def plan(self, params: SamplingParams) -> RequestPlan:
        """Checks a request against the model and fills in its defaults, without model work. May be called from any thread.

        Raises:
            InvalidRequestError: A value is off the model's grid or above a limit, or the adapter is not loaded.
            AsleepError: The memory of the weights is released.
            OutdatedWeightsError: The weights are older than the request demands, or allows.
        """
        self.check_ready(params)
        return plan_request(params, self._open_model(), self.info.limits)

    def check_ready(self, params: SamplingParams) -> None:
        """Checks what can change after planning: adapters, policies, memory and version. The errors are those of `plan`."""
        self._check_weights(params.min_weight_version)
        self._work.check_recent(params)
        self._open_model().adapters.record(params.lora_name)

    def rollout(
        self, request: str | SamplingParams | RequestPlan | None = None, /, **values: Unpack[RolloutFields]
    ) -> list[Rollout]:
        """Runs the rollouts of one request, e.g. `engine.rollout("a red fox", seed=42)`.

        Args:
            request: The prompt, or the whole request, in which case no fields are given.
            **values: Fields of `SamplingParams`.

        Returns:
            One `Rollout` per sample, in the order of the seeds, on the CPU.

        Raises:
            InvalidRequestError: The request is invalid; this is raised before any model work.
        """
        return self._answer(self.submit(self._planned(rollout_request(request, values)), "rollout"))

    def generate(
        self, request: str | SamplingParams | RequestPlan | None = None, /, **values: Unpack[ImageFields]
    ) -> list[GeneratedImage]:
        """Runs plain text-to-image generation, bit for bit as the diffusers pipeline.

        Args:
            request: The prompt, or the whole request, with `rollout=False` and every rollout field at its default.
            **values: Fields of `SamplingParams` that are not rollout fields.

        Returns:
            One `GeneratedImage` per sample, in the order of the seeds, on the CPU.

        Raises:
            InvalidRequestError: The request is invalid or has a rollout field; this is raised before any model work.
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
        """Accepts a planned request, and returns a future of its answer.

        Args:
            plan: The planned request, from `plan`.
            kind: Whether its samples become rollouts or plain images.
            timeout_s: The request fails if it has not ended after this many seconds; None: no limit.
            max_waiting: The request is refused if this number of requests waits; None: no limit.

        Raises:
            InvalidRequestError: The policy was dropped since the request was planned.
            PausedError: The scheduler is paused.
            QueueFullError: Too many requests wait.
        """
        self.scheduler.start()
        # Here, because a plan may be made where the policies are not known.
        plan = replace(plan, held_policy=self._policies.weights_of(plan.params.policy))
        finish: Callable[[RequestPlan, Finished], Any] = self._as_rollout if kind == "rollout" else self._as_image
        return self.scheduler.submit(plan, finish, timeout_s=timeout_s, max_waiting=max_waiting)

    def decode(self, latents: Float[Tensor, " *latent"], *, height: int, width: int) -> Float[Tensor, " colors 1 height width"]:
        """Decodes the latents of one sample into a picture, e.g. those of a predicted clean image.

        Args:
            latents: The latents of one sample, without batch dimension.
            height: The height of the picture in pixels.
            width: The width of the picture in pixels.

        Returns:
            The picture as float32 in [0, 1], on the CPU.

        Raises:
            InvalidRequestError: The size is off the model's grid, or the latents do not have that size or are not finite.
            EngineError: The VAE returned NaN or infinity.
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
        policy: str | None = None,
    ) -> StepScore:
        """Recomputes log-prob, mean and velocity of one recorded step with the current weights, by the code that replay uses.

        Args:
            latents: The latents before the step, as a trajectory holds them.
            next_latents: The latents after the step.
            step: The index of the step, counted from 0.
            env: The denoising environment of the rollout.
            record: The `sampling` record of the rollout.
            sde_step_indices: The indices of the rollout's stochastic steps; None: every step is stochastic.
            policy: The policy to compute with, in place of the weights and the rollout's adapter; None or "default": these.

        Returns:
            The log-prob, mean and velocity as float32 on the CPU, and the std.

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
        self._check_adapter(sample, policy)
        check_sample(sample, self._open_model(), self.info.limits)
        held = self._policies.weights_of(policy)
        scores = self._score(
            lambda: self._log_probs.with_weights_of(held, self._log_probs.sample(sample, policy=policy, log_probs_only=False)),
            held,
        ).result()
        assert scores.velocities is not None and scores.means is not None
        return StepScore(
            velocity=scores.velocities[0], mean=scores.means[0], std=scores.stds[0].item(), log_prob=scores.log_probs[0]
        )

    def plan_score(self, params: ScoreParams) -> ScorePlan:
        """Checks a request to recompute log-probs, without model work. May be called from any thread.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
            OutdatedWeightsError: The weights are older than the request demands.
        """
        self.check_ready_to_score(params)
        return plan_score(params, self._open_model(), self.info.limits)

    def check_ready_to_score(self, params: ScoreParams) -> None:
        """Checks what can change after planning: adapters, policies, memory, version. The errors are those of `plan_score`."""
        self._check_weights(params.min_weight_version)
        self._policies.record(params.policy)
        for index, sample in enumerate(params.samples):
            try:
                self._check_adapter(sample, params.policy)
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None

    def run_scores(self, params: ScoreParams | ScorePlan) -> ScoreAnswer:
        """Recomputes the log-probs of several steps of several samples.

        Each step has its own forward, as in `score`, so neither the order nor the number of steps changes a result.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
        """
        return self.submit_scores(params if isinstance(params, ScorePlan) else self.plan_score(params)).result()

    def submit_scores(self, plan: ScorePlan, *, timeout_s: float | None = None) -> Future[ScoreAnswer]:
        """Accepts a request to recompute log-probs, which runs between steps, and returns a future of its answer.

        Under a policy of whole weights it runs while no request does, and then puts the weights back.

        Args:
            plan: The planned request, from `plan_score`.
            timeout_s: The request fails if it has not ended after this many seconds; None: no limit.

        Raises:
            InvalidRequestError: The policy was dropped since the request was planned.
        """
        self._check_open()
        # Here, because a plan may be made where the policies are not known.
        plan = replace(plan, held_policy=self._policies.weights_of(plan.params.policy))
        return self._score(
            lambda: self._log_probs.answer(plan), plan.held_policy, request_id=plan.request_id, timeout_s=timeout_s
        )

    def _score(self, action: Callable[[], Any], held: str | None, **options: Any) -> Future[Any]:
        self.scheduler.start()
        submit = self.scheduler.between_steps if held is None else self.scheduler.exclusive
        scores: Future[Any] = submit(action, **options)
        return scores

    # Weights

    @property
    def weight_version(self) -> str:
        """The version of the weights in memory."""
        return self._weights.versions.current

    @property
    def versions(self) -> VersionState:
        """The version of the weights in memory, its number, and the versions before it."""
        return self._weights.versions.state

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules of the checkpoint that have weights, e.g. "transformer", "text_encoder", "vae"."""
        return self._weights.modules

    def update_weights_from_disk(
        self,
        folder: str | Path,
        *,
        module: str = "transformer",
        weight_version: str | None = None,
        mode: ExclusiveMode = "drain",
    ) -> WeightUpdate:
        """Replaces all weights of a module by others of the same shapes, from files. If anything fails, none is replaced.

        Requests go on while the files are read and checked; then the change waits for the running ones. The other ranks read
        their own parts from the same path at that time. Afterwards, rollouts are bit for bit those of an engine that was
        started with the new weights.

        Args:
            folder: A checkpoint folder, whose subfolder with the module's name is read; the module's own folder; or one
                .safetensors file.
            module: "transformer" or "vae".
            weight_version: The version of the new weights; None: one more than the highest number that a version had so far.
            mode: What happens to running requests: "drain": they finish first; "abort": they start again from their beginning,
                with the new weights.

        Raises:
            InvalidRequestError: The module takes no new weights, or the version is not a valid short text.
            WeightsRejectedError: The files cannot be read to their end, or do not fit the module. Nothing has changed.
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
        """Replaces weights of a module by copies of a trainer's tensors in this process. If anything fails, none is replaced.

        Args:
            named_tensors: The tensors by the names of the module's state_dict, e.g. `trainer.state_dict()`; they are taken one
                at a time. DTensors, which FSDP2 uses, are gathered, so every rank of the trainer has to make this call, each on
                its own engine.
            module: "transformer" or "vae".
            weight_version: The version of the new weights; None: one more than the highest number that a version had so far.
            mode: What happens to running requests; see `update_weights_from_disk`.
            partial: Whether tensors that are not given keep their values; otherwise a missing tensor is an error.

        Raises:
            InvalidRequestError: The module takes no new weights, or the version is not a valid short text.
            WeightsRejectedError: The tensors do not fit the module. Nothing has changed.
        """
        incoming = self.receive_weights(module, partial=partial)
        for name, tensor in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
            incoming.put([(name, plain_tensor(tensor, name, device=None))])
        return self.commit_weights(incoming.stage(), weight_version=weight_version, mode=mode)

    def stage_weights(self, files: WeightFiles) -> StagedWeights:
        """Reads and checks new weights, the first half of an update. May be called from any thread while requests run.

        Raises:
            WeightsRejectedError: The files cannot be read to their end, or do not fit the module.
        """
        self._check_open()
        return self._weights.stage(files)

    def receive_weights(self, module: str = "transformer", *, partial: bool = False) -> WeightReceiver:
        """Returns a receiver for new weights that arrive in buckets while requests run; `commit_weights` takes its `stage()`.

        Args:
            module: "transformer" or "vae".
            partial: Whether tensors that do not arrive keep their values; otherwise a missing tensor is an error.

        Raises:
            InvalidRequestError: The module takes no new weights.
        """
        self._check_open()
        return self._weights.receive(module, partial=partial)

    def commit_weights(
        self, staged: StagedWeights, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> WeightUpdate:
        """Exchanges the weights once no request runs, the second half of an update; see `update_weights_from_disk`."""

        def change() -> WeightUpdate:
            update = self._weights.commit(staged, weight_version)
            if update.module == "transformer":
                self._weights.note_checksum(self.info.limits.max_hashed_bytes)
            return update

        return self._exchange(change, weight_version, mode)

    def restore_versions(self, state: VersionState) -> None:
        """Takes over the versions of another engine, whose weights this one was given."""
        self.exclusive(lambda: self._weights.versions.adopt(state))

    def weights_checksum(self, module: str = "transformer") -> str:
        """Returns the sha256 over a module's whole tensors in the order of their names: of each, its name and then its bytes.

        It is computed between the steps of running requests, and kept until the weights change.
        `flowroll.replay.weights_checksum` computes the same for a trainer's module.

        Args:
            module: The name of the module, one of `modules`.

        Raises:
            InvalidRequestError: There is no such module.
        """
        return self._read_weights(lambda weights: weights.checksums([module]))[module]

    def submit_read(self, read: Callable[[WeightStore], Pieces[T]]) -> Future[T]:
        """Reads the weights between steps, in pieces, and returns a future of the result. The weights do not change meanwhile.

        Args:
            read: Begins the reading, e.g. with `WeightStore.checksums`.
        """
        self._check_open()
        self.scheduler.start()
        future: Future[T] = self.scheduler.between_steps(lambda: read(self._weights))
        return future

    def verify_weights(self, expected: Iterable[tuple[str, str]], *, module: str = "transformer") -> int:
        """Compares every tensor of a module with the expected checksum, between the steps of running requests.

        Args:
            expected: The name of every tensor with the sha256 of its raw bytes.
            module: The name of the module, one of `modules`.

        Returns:
            The number of tensors.

        Raises:
            WeightsMismatchError: Names are unknown, missing or doubled, or tensors differ; the error lists them.
            InvalidRequestError: There is no such module.
        """
        return self._read_weights(lambda weights: weights.verify(expected, module))[0]

    def differing_weights(self, expected: Mapping[str, str], *, module: str = "transformer") -> tuple[list[str], list[str]]:
        """Compares tensors of a module with the expected checksums, between the steps of running requests.

        Args:
            expected: The `typed_tensor_checksum` of tensors, by name; tensors that are not named are not compared.
            module: The name of the module, one of `modules`.

        Returns:
            The names that the module does not have, and those whose tensors differ.

        Raises:
            InvalidRequestError: There is no such module.
        """
        return self._read_weights(lambda weights: weights.differing(expected, module))

    # Adapters

    def lora_adapters(self) -> tuple[LoraAdapter, ...]:
        """Returns the loaded adapters."""
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

        A loaded adapter with the same name is replaced. The adapter keeps the dtype that it was saved in, as in peft. Requests
        go on while it is read and checked; then the change waits for the running ones. The model without adapter stays the
        same.

        Args:
            folder: The folder with adapter_config.json and adapter_model.safetensors.
            name: The name, a printable text of 1 to 128 characters.
            merged: Whether to add the adapter to a copy of the weights that it changes. The copy takes the memory of these
                weights once more, and the adapter then costs nothing in a forward; a rollout is bit for bit that of a
                checkpoint that peft's `merge_and_unload` made. Otherwise the adapter runs beside the weights, and a rollout
                is bit for bit that of a trainer's peft model.
            weight_version: The version of the engine's weights from now on; None: one more than the highest number so far.
            mode: What happens to running requests: "drain": they finish first; "abort": they start again from their beginning.

        Raises:
            InvalidRequestError: The name or the version is not a valid short text.
            WeightsRejectedError: The adapter cannot be read to its end, is no plain LoRA of this model's linears, or there is
                no room for it. Nothing has changed.
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
        """Loads an adapter from a trainer in this process; see `load_lora_adapter`. All ranks must be on this machine.

        Args:
            tensors: The tensors, as `peft.get_peft_model_state_dict(model)` returns them.
            config: The configuration, as `model.peft_config["default"].to_dict()` returns it.
            name: The name, a printable text of 1 to 128 characters.
            merged: Whether the adapter is added to a copy of the weights.
            weight_version: The version of the engine's weights from now on; None: one more than the highest number so far.
            mode: What happens to running requests; see `load_lora_adapter`.
        """
        staged = self.stage_lora_adapter(adapter_of(tensors, config), name=name, merged=merged)
        return self.commit_lora_adapter(staged, weight_version=weight_version, mode=mode)

    def check_lora_adapter(
        self, config: Mapping[str, Any], stored: Sequence[StoredTensor], *, name: str, merged: bool = False
    ) -> None:
        """Checks an adapter before the data of its tensors has come; the errors are those of `stage_lora_adapter`."""
        self._check_open()
        self._check_takes_adapters()
        self._adapters.check(config, stored, name=name, merged=merged)

    def stage_lora_adapter(self, files: AdapterFiles, *, name: str, merged: bool = False) -> StagedAdapter:
        """Reads and checks an adapter, the first half of loading it. May be called from any thread while requests run.

        Raises:
            InvalidRequestError: The name is not a valid short text.
            WeightsRejectedError: The adapter is refused.
        """
        self._check_open()
        self._check_takes_adapters()
        return self._adapters.stage(files, name=name, merged=merged)

    def stage_pushed_lora(self, factors: Mapping[str, LoraFactors], *, merged: bool) -> StagedAdapter:
        """Makes an adapter from factors that a trainer has pushed; see `AdapterStore.stage_pushed`."""
        self._check_open()
        self._check_takes_adapters()
        return self._adapters.stage_pushed(factors, merged=merged)

    def commit_lora_adapter(
        self, staged: StagedAdapter, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """Puts a staged adapter in place once no request runs, the second half of loading it; see `load_lora_adapter`."""
        return self._exchange(lambda: self._adapters.commit(staged, weight_version), weight_version, mode)

    def unload_lora_adapter(
        self, name: str, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> AdapterChange:
        """Unloads an adapter. Waiting requests that name it end in an error.

        Args:
            name: The name that it was loaded under.
            weight_version: The version of the engine's weights from now on; None: one more than the highest number so far.
            mode: What happens to running requests; see `load_lora_adapter`.

        Raises:
            InvalidRequestError: There is no such adapter, or the version is not a valid short text.
        """
        return self._exchange(lambda: self._adapters.unload(name, weight_version), weight_version, mode)

    # Policies

    def policies(self) -> tuple[Policy, ...]:
        """Returns the policies that requests can choose beside the default, in the order in which they were made."""
        self._check_open()
        return tuple(self._policies.held.values())

    def copy_policy(self, name: str, *, source: str | None = None, mode: ExclusiveMode = "drain") -> PolicyChange:
        """Makes a policy that requests can choose by its name, or replaces it, as a copy of another one.

        It stays what it is when the engine gets other weights. The weights of a policy are kept in the host's memory; when the
        turn of its requests comes, and nothing else runs, they are exchanged with those in place. A policy that is made from an
        adapter is an adapter, and shares forwards' weights with all others.

        Args:
            name: The name, a printable text of 1 to 128 characters.
            source: The policy or adapter that is copied; None: the default, which is the weights in place, or the adapter that
                a trainer has pushed in SGLang's mode "lora_merge".
            mode: What happens to running requests; see `update_weights_from_disk`.

        Raises:
            InvalidRequestError: The name cannot be that of a policy, there is no such source, or no more policies may be held.
            EngineError: There is no room for it on some rank. Nothing has changed.
        """
        return self.exclusive(lambda: self._policies.copy(name, source, self._executor.change), mode)

    def average_policy(
        self, name: str, *, decay: Number, source: str | None = None, mode: ExclusiveMode = "drain"
    ) -> PolicyChange:
        """Moves a policy towards another one, by an exponential moving average.

        Its weights become decay x their own + (1 - decay) x those of the source, computed and kept in float32; for a
        rollout they are rounded to the engine's dtype. A policy that there is not yet begins as a copy.

        Args:
            name: The name of the policy.
            decay: Its own share, from 0 to 1.
            source: The policy or adapter that it moves towards; None: the default.
            mode: What happens to running requests; see `update_weights_from_disk`.

        Raises:
            InvalidRequestError: The decay is not from 0 to 1, or the source is of another kind; or as for `copy_policy`.
            EngineError: There is no room on some rank. Nothing has changed.
        """
        return self.exclusive(lambda: self._policies.average(name, source, decay, self._executor.change), mode)

    def drop_policy(self, name: str, *, mode: ExclusiveMode = "drain") -> PolicyChange:
        """Forgets a policy. Waiting requests that name it end in an error.

        Raises:
            InvalidRequestError: There is no such policy.
        """
        return self.exclusive(lambda: self._policies.drop(name, self._executor.change), mode)

    # Memory

    @property
    def is_asleep(self) -> bool:
        """Whether the weights are not in place: their memory is released, or they were discarded and no update has come."""
        return self._offload.mode is not None

    @property
    def memory_mode(self) -> SleepMode | None:
        """How the memory of the weights was released; None if they are in place."""
        return self._offload.mode

    def sleep(self, mode: SleepMode = "offload") -> MemoryChange:
        """Releases the memory of all weights and adapters, on every rank, once the running requests have finished.

        Until `wake`, everything that needs weights ends in an `AsleepError`: requests, also those that wait already, updates
        and checksums. If the engine sleeps already, nothing changes.

        Args:
            mode: "offload": weights on a GPU are moved to pinned memory of the host; those on a CPU stay, and nothing is
                released. "disk": weights are moved to an unnamed file in the folder for temporary files (TMPDIR).
                "discard": the transformer's weights are not kept, for a trainer that pushes all of them after `wake`; until
                such an update is committed, the engine answers as in sleep. The text encoder, the VAE, adapters and policies
                are kept as with "offload".

        Raises:
            EngineError: There is not enough room there, on some rank. Nothing has changed.
        """
        return self._change_memory(mode)

    def wake(self) -> MemoryChange:
        """Restores the weights bit for bit, those that were discarded without values. If the engine is awake, nothing changes.

        Raises:
            EngineError: There is not enough memory, or the disk fails, on some rank. The engine stays asleep.
        """
        return self._change_memory(None)

    @property
    def graph_counts(self) -> GraphCounts:
        """What became of the forwards that may be recorded; all zeros where none are."""
        return GraphCounts() if self._graphs is None else self._graphs.counts

    def describe_memory(self) -> str:
        """Returns a text that says how much memory the samples that run at the same time can take."""
        defaults = self.info.defaults
        geometry = plan_geometry(self._model, height=defaults.height, width=defaults.width)
        return describe_memory(self.info, geometry, self.scheduler.limits)

    # Ranks and life

    @property
    def failure(self) -> RankLostError | None:
        """The error that took this engine's ranks down; None while they are up."""
        return self._peers.failure

    @property
    def facts(self) -> ModelFacts:
        """The facts about the model that requests are checked and planned with."""
        return self._open_model().facts

    @property
    def rank_pids(self) -> Mapping[int, int]:
        """The process ids of the ranks that this engine started, by rank."""
        return self._peers.pids

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """The number of bytes that rank 0 has received from other ranks, by mesh axis."""
        return self._peers.received_bytes

    def on_failure(self, listener: FailureListener) -> None:
        """Calls the listener, normally on another thread, once the ranks of this engine are down."""
        self._peers.add_listener(listener)

    def exclusive(self, action: Callable[[], T], mode: ExclusiveMode = "drain", *, is_newer: bool = False) -> T:
        """Runs an action on the model while no request runs, before waiting requests are admitted.

        Args:
            action: The function to call, on the scheduler's thread, or directly if the caller runs in such an action itself.
            mode: What happens to running requests; see `update_weights_from_disk`.
            is_newer: Whether weights of a newer version are in place afterwards: running requests that allow no such age
                (`max_staleness`) then end in an `OutdatedWeightsError`.
        """
        self._check_open()
        if self.scheduler.is_in_exclusive_task:
            return self._changing(action)
        self.scheduler.start()
        result: T = self.scheduler.exclusive(lambda: self._changing(action), mode=mode, is_newer=is_newer).result()
        return result

    def _changing(self, action: Callable[[], T]) -> T:
        """Runs an action that may change weights, and forgets what was computed with the old ones."""
        # A request that was cancelled may have left work on any stream, which reads the weights.
        self._open_model().streams.synchronize()
        try:
            return action()
        finally:
            self._executor.forget_modulations()

    def interrupt(self) -> None:
        """Ends every request and every later call in a `ShuttingDownError`. May be called from any thread."""
        self.scheduler.stop(_shutting_down())

    def close(self) -> None:
        """Ends all requests, waits for the current work, ends the other ranks and frees the model. May be called twice."""
        self.interrupt()
        # The wait is given up if a rank was lost, since the current step may then never end.
        while not self.scheduler.halt(_RELEASE_S) and self.failure is None:
            pass
        self._peers.close()
        if hasattr(self, "_model"):
            self._work.release()
            self._weights.release()
            self._offload.forget()
            self._keep_findings()
            del self._model, self._pipeline, self._adapters, self._log_probs
            if self.info.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _check_takes_adapters(self) -> None:
        fast = self.info.fast
        if self.info.compiled is not None or (fast is not None and any(one.startswith("fp8") for one in fast.parts)):
            raise InvalidRequestError(
                "adapters must be left out of compiled blocks and of float8 weights, with which they were not proved, got one; "
                "start the engine without compile, or with other fast_parts.",
                field="lora_name",
            )

    def _compile(self) -> None:
        """Compiles the blocks by the steps of a small sample, so that no request has to wait for it.

        A first step may run other calls than a later one: the one of Qwen-Image-2.1 fills a cache, and none of its calls is
        compiled.
        """
        side = _WARM_TOKENS * self.info.pixel_unit
        images = (blank_image(),) if self.info.max_images else None
        plan = self.plan(
            SamplingParams(prompt="a red circle", images=images, height=side, width=side, num_inference_steps=2, rollout=False)
        )
        sample = Sample.start(self._work.encode(plan).handed_over(), plan.samples[0])
        with torch.no_grad():
            while sample.num_steps_left:
                sample.take_step(*forward([sample]))

    def _check_open(self) -> None:
        if (stopped := self.failure or self.scheduler.stopped) is not None:
            raise fresh(stopped)
        if not hasattr(self, "_model"):
            raise _shutting_down()

    def _open_model(self) -> LoadedModel:
        self._check_open()
        model: LoadedModel | None = getattr(self, "_model", None)
        if model is None:  # the engine was closed since the check
            raise _shutting_down()
        return model

    def _check_weights(self, min_weight_version: str | None) -> None:
        self._check_open()
        self._offload.check_awake()
        self._weights.versions.demand(min_weight_version)

    def _check_adapter(self, sample: RecordedSteps, policy: str | None) -> None:
        lora = sample.sampling.lora
        try:
            self._open_model().adapters.record(None if lora is None else lora.name, policy)
        except InvalidRequestError as error:
            raise error.within("sampling") from None

    def _read_weights(self, read: Callable[[WeightStore], Pieces[T]]) -> T:
        if not self.scheduler.is_in_exclusive_task:
            return self.submit_read(read).result()
        pieces = read(self._weights)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                value: T = end.value
                return value

    def _between_steps(self, action: Callable[[], Any]) -> Any:
        self.scheduler.start()
        return self.scheduler.between_steps(action).result()

    def _change_memory(self, mode: SleepMode | None) -> MemoryChange:
        def make() -> MemoryChange:
            started_s = time.perf_counter()
            num_bytes = 0
            if self._offload.is_released == (mode is None):
                self._work.forget_texts()
                self._executor.free_memory()
                num_bytes = self._executor.change(Sleep(mode=mode))
            return MemoryChange(mode=self.memory_mode, num_bytes=num_bytes, seconds=time.perf_counter() - started_s)

        return self.exclusive(make)

    def _exchange(self, action: Callable[[], T], weight_version: str | None, mode: ExclusiveMode) -> T:
        return self.exclusive(action, mode, is_newer=weight_version is None or weight_version != self.weight_version)

    def _planned(self, request: SamplingParams | RequestPlan) -> RequestPlan:
        return request if isinstance(request, RequestPlan) else self.plan(request)

    def _answer(self, future: RequestFuture[T]) -> list[T]:
        """Waits for a request's answer. If the wait is interrupted, the request is cancelled."""
        try:
            return future.result()
        except BaseException:
            self.scheduler.cancel(future)
            raise

    def _as_image(self, plan: RequestPlan, finished: Finished) -> GeneratedImage:
        with self._model.streams.decoding():
            return as_image(plan, finished, weight_version=self._version_of(finished), exactness=self.info.exactness)

    def _as_rollout(self, plan: RequestPlan, finished: Finished) -> Rollout:
        with self._model.streams.decoding():
            return as_rollout(
                plan,
                finished,
                weight_version=self._version_of(finished),
                peak_memory_mb=self._peak_memory_mb(),
                maker=self._maker(finished),
            )

    def _maker(self, finished: Finished) -> Provenance:
        policy = finished.sample.conditioning.plan.held_policy
        return Provenance(
            layout=self.info.layout.name,
            strategy=self._model.strategy.name,
            versions=self.info.versions,
            compiled=self.info.compiled,
            certificate=self.info.certificate.name,
            weights_sha256=self._weights.known_checksum() if policy is None else None,
            exactness=self.info.exactness,
            fast_parts=() if self.info.fast is None else self.info.fast.parts,
        )

    def _version_of(self, finished: Finished) -> str:
        policy = finished.sample.conditioning.record.policy
        return self.weight_version if policy is None else policy.weight_version

    def _peak_memory_mb(self) -> float:
        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._model.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _describe(
    model: LoadedModel,
    checkpoint: Checkpoint,
    layout: Layout,
    limits: Limits,
    adapter_limits: AdapterLimits,
    certificate: Certificate,
    fast: FastMode | None,
) -> EngineInfo:
    return EngineInfo(
        model=str(checkpoint.folder),
        family=model.family.name,
        variant=model.variant,
        pipeline=checkpoint.pipeline_class,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        parameters=count_parameters(model.transformer),
        layout=layout,
        transformer_bytes=sum(parameter.nbytes for parameter in model.transformer.parameters()),
        limits=limits,
        adapter_limits=adapter_limits,
        defaults=model.defaults,
        pixel_unit=model.spec.pixel_unit,
        max_images=min(model.spec.max_images, limits.max_images),
        versions={name: version(name) for name in ("flowroll", "torch", "diffusers", "transformers")},
        compiled=(kernels_of(model.transformer) or _FAST_KERNELS) if is_compiled(model.transformer) else None,
        certificate=certificate,
        exactness="exact" if fast is None else "fast",
        fast=fast,
    )


def _check_compile(layout: Layout, device: torch.device) -> None:
    """Refuses compiled blocks where they are not proved, before anything is loaded.

    Raises:
        InvalidRequestError: There are several ranks, or this machine cannot compile.
    """
    if layout.num_ranks > 1:
        raise InvalidRequestError(
            f"compile must be off for several ranks, whose blocks talk to each other, got the layout {layout.name}; leave "
            "compile out, or start one rank a replica.",
            field="compile",
        )
    check_can_compile(device)


def _parameters(model: LoadedModel, pipeline: Any) -> Iterator[Tensor]:
    """Yields all weights of this rank, tables that are stored with them too."""
    for module in modules_of(pipeline).values():
        yield from (*module.parameters(), *module.buffers())
    yield from model.adapters.parameters()


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the engine must run to answer, got a shutdown; send the request to another replica.")
