"""The engine: a checkpoint in memory that turns requests into rollouts. No server needed."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine import denoising
from flowroll.engine.arguments import as_params, refuse_rollout_fields, refuse_rollout_params
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import EngineInfo, Limits, resolve_device, resolve_dtype
from flowroll.engine.denoising import DenoisingTask, Sample
from flowroll.engine.finishing import Finished, as_image, as_rollout, record_of
from flowroll.engine.loading import LoadedModel, load_model
from flowroll.engine.plan import RequestPlan, plan_geometry, plan_request
from flowroll.engine.replica import FailureListener, Replica, open_replica
from flowroll.engine.scoring import ScorePlan, check_sample, forward_rows, plan_score, recipe_of, sample_scores, velocities_of
from flowroll.engine.weight_store import WeightStore
from flowroll.engine.weights import StagedWeights, WeightFiles, find_weights
from flowroll.errors import InvalidRequestError, RankLostError, ShuttingDownError
from flowroll.families import StepScore
from flowroll.parallel.linears import count_parameters
from flowroll.types import (
    DenoisingEnv,
    EnvValue,
    GeneratedImage,
    Layout,
    RecordedSteps,
    Rollout,
    SampleScores,
    SamplingParams,
    SamplingRecord,
    ScoreAnswer,
    ScoreParams,
    WeightUpdate,
)

# How long a failed replica may take to let go of the request that it failed.
_RELEASE_S = 5.0
Result = TypeVar("Result")


class Engine:
    """Rolls out one checkpoint.

    One request runs at a time; calls from several threads wait for each other. A context manager: `close` frees the model.

    Args:
        model: A diffusers checkpoint folder.
        variant: Variant of the model family, e.g. "turbo" for Z-Image-Turbo; None: the family's first.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 on the CPU.
        device: "cpu", "cuda", "cuda:N", or "auto".
        limits: What one request may ask for.
        layout: How the transformer is spread over ranks. The other ranks are started here, one process each, on this machine;
            under torchrun they are its processes, which call `follow`.
        rank_timeout_s: How long ranks wait for each other before the replica is taken down.

    Raises:
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
        InvalidRequestError: A device, dtype or layout that is not to be had.
        RankLostError: A rank ended before it was up.
    """

    # Of an engine with several ranks.
    _replica: Replica | None = None

    def __init__(
        self,
        model: str | Path,
        *,
        variant: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        limits: Limits | None = None,
        layout: Layout | None = None,
        rank_timeout_s: float = 60.0,
    ) -> None:
        place = resolve_device(device)
        limits, layout = limits or Limits(), layout or Layout()
        checkpoint = examine_checkpoint(Path(model), variant=variant)
        weights = resolve_dtype(dtype, place)
        self._lock = threading.Lock()
        self._interrupted = threading.Event()
        if layout.num_ranks > 1:
            self._replica = open_replica(checkpoint, layout, limits, dtype=weights, device=place, timeout_s=rank_timeout_s)
        mesh = self._replica.mesh if self._replica else None
        try:
            self._model, self._pipeline = load_model(checkpoint, device=place, dtype=weights, mesh=mesh)
            if self._replica is not None:
                self._replica.serve(self._model.spec, limits)
        except BaseException:
            if self._replica is not None:
                self._replica.close()
            raise
        transformer = self._model.transformer
        self._weights = WeightStore(self._pipeline, self._replica)
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
            defaults=self._model.family.variants[self._model.variant],
            pixel_unit=self._model.spec.pixel_unit,
            versions={name: version(name) for name in ("flowroll", "torch", "diffusers", "transformers")},
        )

    @property
    def failure(self) -> RankLostError | None:
        """Why this engine's ranks are down; None while they are up."""
        return self._replica.failure if self._replica else None

    @property
    def weight_version(self) -> str:
        """Version of the weights in memory."""
        return self._weights.versions.current

    @property
    def rank_pids(self) -> Mapping[int, int]:
        """Process ids of the ranks that this engine started, by rank."""
        return self._replica.pids if self._replica else {}

    @property
    def received_bytes(self) -> Mapping[str, int]:
        """Bytes that rank 0 has received from other ranks, by mesh axis."""
        return {str(axis): count for axis, count in self._replica.mesh.received_bytes.items()} if self._replica else {}

    def on_failure(self, listener: FailureListener) -> None:
        """Calls it, on a thread of its own, once the ranks of this engine are down."""
        if self._replica is not None:
            self._replica.add_listener(listener)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def plan(self, params: SamplingParams) -> RequestPlan:
        """Checks a request against the model and fills in its defaults, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A value is off the model's grid or above a limit.
            OutdatedWeightsError: The weights are older than the request demands.
            ShuttingDownError: The engine was interrupted or closed.
        """
        model = self._open_model()
        self._weights.versions.demand(params.min_weight_version)
        return plan_request(params, model, self.info.limits)

    def rollout(self, params: SamplingParams | RequestPlan | None = None, /, **values: Any) -> list[Rollout]:
        """Rolls out one request: one `Rollout` per sample, on the CPU.

        Args:
            params: The request; or give the fields of `SamplingParams` by name.
            **values: Fields of `SamplingParams`.

        Raises:
            InvalidRequestError: Before any model work.
            ShuttingDownError: The engine was interrupted or closed.
        """
        plan = params if isinstance(params, RequestPlan) else self.plan(as_params(params, values))
        return self._run(plan, self._as_rollout)

    def generate(self, params: SamplingParams | RequestPlan | None = None, /, **values: Any) -> list[GeneratedImage]:
        """Plain text-to-image generation: the bits of the diffusers pipeline, one `GeneratedImage` per sample, on the CPU.

        Args:
            params: The request, with `rollout=False` and every rollout field at its default; or give fields by name.
            **values: Fields of `SamplingParams` that are no rollout fields.

        Raises:
            InvalidRequestError: Before any model work; also for a rollout field.
            ShuttingDownError: The engine was interrupted or closed.
        """
        if params is None:
            refuse_rollout_fields(values)
            params = as_params(None, {**values, "rollout": False})
        plan = params if isinstance(params, RequestPlan) else self.plan(params)
        refuse_rollout_params(plan.params)
        return self._run(plan, self._as_image)

    def decode(self, latents: Float[Tensor, " *latent"], *, height: int, width: int) -> Float[Tensor, " 3 1 height width"]:
        """The picture of one sample's latents, e.g. of a predicted clean image.

        Args:
            latents: One sample's latents, without batch dimension.
            height: Pixels.
            width: Pixels.

        Returns:
            float32 in [0, 1], on the CPU.

        Raises:
            InvalidRequestError: The size is off the model's grid, or the latents are not of that size.
            ShuttingDownError: The engine was interrupted or closed.
        """
        with self._lock, torch.no_grad():
            self._check_interrupt()
            geometry = plan_geometry(self._model, height=height, width=width)
            if tuple(latents.shape) != geometry.latent_shape:
                raise InvalidRequestError(
                    f"latents must have the shape {geometry.latent_shape} at {width} x {height}, got {tuple(latents.shape)}; "
                    "give one sample's latents, without batch dimension.",
                    field="latents",
                )
            return self._model.family.decode(self._pipeline, latents.to(self._model.device), geometry).cpu()

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
            env: Of the rollout.
            record: Its `sampling`.
            sde_step_indices: Of the rollout; None: every step is stochastic.

        Returns:
            On the CPU, float32.

        Raises:
            InvalidRequestError: The record is of another model, dtype or schema, or a value does not fit it.
            ShuttingDownError: The engine was interrupted or closed.
        """
        sample = RecordedSteps(
            steps=(step,),
            latents=latents[None],
            next_latents=next_latents[None],
            denoising_env=env,
            sampling=record,
            sde_step_indices=None if sde_step_indices is None else tuple(sorted(sde_step_indices)),
        )
        check_sample(sample, self._open_model(), self.info.limits)
        with self._lock, torch.no_grad():
            scores = self._score_sample(sample, log_probs_only=False)
        assert scores.velocities is not None and scores.means is not None
        return StepScore(
            velocity=scores.velocities[0], mean=scores.means[0], std=scores.stds[0].item(), log_prob=scores.log_probs[0]
        )

    def plan_score(self, params: ScoreParams) -> ScorePlan:
        """Checks a request for scores against the model, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return plan_score(params, self._open_model(), self.info.limits)

    def run_scores(self, params: ScoreParams | ScorePlan) -> ScoreAnswer:
        """As `score`, for several steps of several samples; each is scored alone, so neither their order nor number matters.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
            ShuttingDownError: The engine was interrupted or closed.
        """
        plan = params if isinstance(params, ScorePlan) else self.plan_score(params)
        started = time.perf_counter()
        found = []
        with self._lock, torch.no_grad():
            for index, sample in enumerate(plan.params.samples):
                try:
                    found.append(self._score_sample(sample, log_probs_only=plan.params.log_probs_only))
                except InvalidRequestError as error:
                    raise error.within(f"samples[{index}]") from None
            version = self.weight_version
        return ScoreAnswer(
            request_id=plan.request_id,
            weight_version=version,
            samples=tuple(found),
            inference_time_s=time.perf_counter() - started,
        )

    def _score_sample(self, sample: RecordedSteps, *, log_probs_only: bool) -> SampleScores:
        """Scores one checked sample, on every rank; the lock is held."""
        self._check_interrupt()
        model = self._model
        recipe = recipe_of(sample, model, device=model.device)
        rows = forward_rows(sample, recipe, log_probs_only=log_probs_only)
        steps, velocities = [sample.steps[row] for row in rows], list[Tensor]()
        if rows:
            env, latents = sample.denoising_env.to(model.device), sample.latents[rows].to(model.device)
            if self._replica is None:
                velocities = velocities_of(model, recipe, latents, steps, env, self._check_interrupt)
            else:
                with self._replica.in_step():
                    self._replica.begin_scores(sample.sampling, sample.sde_step_indices, steps, latents, env)
                    velocities = velocities_of(model, recipe, latents, steps, env, self._check_all_ranks)
                self._replica.finish_sample(torch.stack(velocities))
        return sample_scores(sample, recipe, dict(zip(rows, velocities, strict=True)), log_probs_only=log_probs_only)

    def update_weights_from_disk(
        self, folder: str | Path, *, module: str = "transformer", weight_version: str | None = None
    ) -> WeightUpdate:
        """Replaces the weights of a module by others of the same shapes: all of them, or, whatever goes wrong, none.

        Requests go on while the files are read and checked; then the change waits for the one that runs. With several ranks
        each reads its own part, from the same path, when its turn has come. Afterwards rollouts have the bits of an engine that
        was started on the new weights.

        Args:
            folder: A checkpoint folder, whose subfolder of the module's name is read; the module's own folder; or one
                .safetensors file.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.

        Raises:
            InvalidRequestError: Another module, or a version that is no short text.
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self.commit_weights(self.stage_weights(find_weights(folder, module)), weight_version=weight_version)

    def stage_weights(self, files: WeightFiles) -> StagedWeights:
        """The first half of an update: reads and checks; may be called from any thread, while requests run.

        Raises:
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's.
            ShuttingDownError: The engine was interrupted or closed.
        """
        self._check_interrupt()
        return self._weights.stage(files)

    def commit_weights(self, staged: StagedWeights, *, weight_version: str | None = None) -> WeightUpdate:
        """The second half: waits for the request that runs, then exchanges the weights.

        Raises:
            InvalidRequestError: A version that is no short text.
            WeightsRejectedError: Another rank cannot read its part. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        with self._lock:
            self._check_interrupt()
            return self._weights.commit(staged, weight_version)

    def weights_checksum(self, module: str = "transformer") -> str:
        """sha256 over the module's tensors in the order of their names, of each its name and then its bytes, of all ranks.

        Waits for the request that runs. `flowroll.replay.weights_checksum` is the same for a trainer's module.

        Args:
            module: "transformer", "text_encoder" or "vae".

        Raises:
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        with self._lock:
            self._check_interrupt()
            return self._weights.checksum(module)

    def verify_weights(self, expected: Iterable[tuple[str, str]], *, module: str = "transformer") -> int:
        """Compares every tensor of a module with what the caller expects. Waits for the request that runs.

        Args:
            expected: Name and sha256 of the raw bytes, of every tensor.
            module: "transformer", "text_encoder" or "vae".

        Returns:
            How many tensors there are.

        Raises:
            WeightsMismatchError: Names that are unknown, missing or doubled, or tensors that differ; lists them.
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        with self._lock:
            self._check_interrupt()
            return self._weights.verify(expected, module)

    def interrupt(self) -> None:
        """Makes what runs, and every later call, raise `ShuttingDownError` at its next step; may be called from any thread."""
        self._interrupted.set()

    def close(self) -> None:
        """Interrupts what runs, waits for it, ends the other ranks and frees the model; may be called twice."""
        self.interrupt()
        has_lock = self._acquire()
        try:
            if self._replica is not None:
                self._replica.close()
            if hasattr(self, "_model"):
                del self._model, self._pipeline
                self._weights.release()
                if self.info.device.startswith("cuda"):
                    torch.cuda.empty_cache()
        finally:
            if has_lock:
                self._lock.release()

    def _acquire(self) -> bool:
        """Takes the lock; gives up where a failed replica may hold its request, which is lost, in a collective for ever."""
        while not self._lock.acquire(timeout=_RELEASE_S):
            if self.failure is not None:
                return False
        return True

    def _check_interrupt(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._interrupted.is_set():
            raise _shutting_down()

    def _open_model(self) -> LoadedModel:
        self._check_interrupt()
        model: LoadedModel | None = getattr(self, "_model", None)
        if model is None:  # closed since the check
            raise _shutting_down()
        return model

    def _check_all_ranks(self) -> None:
        """Whether the next step is to be taken; every rank comes to the same answer."""
        assert self._replica is not None
        if not self._replica.goes_on(self._interrupted.is_set()):
            raise _shutting_down()

    def _run(self, plan: RequestPlan, finish: Callable[[RequestPlan, Finished], Result]) -> list[Result]:
        """Runs every sample of a request, in the order of the seeds; the lock is held until the last is finished."""
        with self._lock, torch.no_grad():
            self._check_interrupt()
            # Again: the weights may have been changed, even to older ones, while the request waited.
            self._weights.versions.demand(plan.params.min_weight_version)
            if self._model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._model.device)
            task = DenoisingTask.build(plan, self._model, self._encode(plan))
            if self._replica is not None:
                with self._replica.in_step():
                    self._replica.begin(plan, task.env)
            record = record_of(plan, task.env)
            return [finish(plan, self._run_sample(task, record, seed)) for seed in plan.seeds]

    def _run_sample(self, task: DenoisingTask, record: SamplingRecord, seed: int) -> Finished:
        started = time.perf_counter()
        sample = self._denoise(task, seed)
        if sample.recorder is not None:
            sample.recorder.check_finite(sample.latents)
        image = self._model.family.decode(self._pipeline, sample.latents, task.plan.geometry).cpu()
        seconds = time.perf_counter() - started
        return Finished(sample=sample, env=task.env, record=record, image=image, seconds=seconds)

    def _denoise(self, task: DenoisingTask, seed: int) -> Sample:
        """All steps of a sample, on every rank."""
        if self._replica is None:
            sample = denoising.start(task, seed)
            denoising.denoise(task, sample, self._check_interrupt)
            return sample
        with self._replica.in_step():
            self._replica.start_sample(seed)
            sample = denoising.start(task, seed)
            denoising.denoise(task, sample, self._check_all_ranks)
        self._replica.finish_sample(sample.latents)
        return sample

    def _encode(self, plan: RequestPlan) -> DenoisingEnv:
        """Encodes each distinct prompt of the request once, one prompt per call."""
        family, pipeline = self._model.family, self._pipeline
        encoded: dict[str, Mapping[str, EnvValue]] = {}
        for prompt in (plan.params.prompt, plan.negative_prompt):
            if prompt is not None and prompt not in encoded:
                encoded[prompt] = family.encode(pipeline, prompt)
        negative = None if plan.negative_prompt is None else encoded[plan.negative_prompt]
        return family.env(encoded[plan.params.prompt], negative, plan.geometry)

    def _as_image(self, plan: RequestPlan, finished: Finished) -> GeneratedImage:
        return as_image(plan, finished, weight_version=self.weight_version)

    def _as_rollout(self, plan: RequestPlan, finished: Finished) -> Rollout:
        peak_memory_mb = self._peak_memory_mb()
        return as_rollout(plan, finished, weight_version=self.weight_version, peak_memory_mb=peak_memory_mb)

    def _peak_memory_mb(self) -> float:
        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._model.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the engine must run to answer, got a shutdown; send the request to another replica.")
