"""The engine: a checkpoint in memory that turns requests into rollouts. No server needed."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.arguments import as_params, refuse_rollout_fields, refuse_rollout_params
from flowroll.engine.batching import Accepted, Batcher, BatchLimits, ExclusiveMode
from flowroll.engine.batching.limits import ONE_BY_ONE
from flowroll.engine.batching.steps import LedSteps
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import EngineInfo, Limits, resolve_device, resolve_dtype
from flowroll.engine.estimate import describe_memory
from flowroll.engine.finishing import Finished, as_image, as_rollout
from flowroll.engine.loading import LoadedModel, load_model
from flowroll.engine.plan import RequestPlan, plan_geometry, plan_request
from flowroll.engine.replica import FailureListener, Replica, open_replica
from flowroll.engine.scoring import ScorePlan, check_sample, forward_rows, plan_score, recipe_of, sample_scores, velocities_of
from flowroll.engine.weight_store import WeightStore
from flowroll.engine.weights import StagedWeights, WeightFiles, find_weights
from flowroll.engine.work import ModelWork
from flowroll.errors import InvalidRequestError, RankLostError, ShuttingDownError
from flowroll.families import StepScore
from flowroll.parallel.linears import count_parameters
from flowroll.types import (
    DenoisingEnv,
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
T = TypeVar("T")
RequestKind: TypeAlias = Literal["rollout", "generate"]


class Engine:
    """Rolls out one checkpoint.

    Calls from several threads share forwards, each with the bits that it has alone, under the CPU thread count of its caller. A
    context manager: `close` frees the model.

    Args:
        model: A diffusers checkpoint folder.
        variant: Variant of the model family, e.g. "turbo" for Z-Image-Turbo; None: the family's first.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 on the CPU.
        device: "cpu", "cuda", "cuda:N", or "auto".
        limits: What one request may ask for.
        batching: How much runs at once; an engine of several ranks runs one sample at a time.
        layout: How the transformer is spread over ranks. The other ranks are started here, one process each, on this machine;
            under torchrun they are its processes, which call `follow`.
        rank_timeout_s: How long ranks wait for each other before the replica is taken down.

    Raises:
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
        InvalidRequestError: A device, dtype or layout that is not to be had.
        RankLostError: A rank ended before it was up.
    """

    # Runs its requests: cancels, pauses, counts them; see `Batcher`.
    batcher: Batcher
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
        batching: BatchLimits | None = None,
        layout: Layout | None = None,
        rank_timeout_s: float = 60.0,
    ) -> None:
        place = resolve_device(device)
        limits, layout = limits or Limits(), layout or Layout()
        checkpoint = examine_checkpoint(Path(model), variant=variant)
        weights = resolve_dtype(dtype, place)
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
        self._weights = WeightStore(self._pipeline, self._replica)
        self._work = ModelWork(self._model, self._pipeline, self._weights.versions)
        self.batcher = self._open_batcher(batching or BatchLimits())
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
        return self._answer(self.submit(plan, "rollout"))

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
        return self._answer(self.submit(plan, "generate"))

    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["rollout"], *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> Accepted[Rollout]: ...
    @overload
    def submit(
        self, plan: RequestPlan, kind: Literal["generate"], *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> Accepted[GeneratedImage]: ...
    def submit(
        self, plan: RequestPlan, kind: RequestKind, *, timeout_s: float | None = None, max_waiting: int | None = None
    ) -> Accepted[Any]:
        """Takes a planned request without waiting for its answer.

        Args:
            plan: From `plan`.
            kind: What its samples become.
            timeout_s: It is given up when it has not ended after so long; None: never.
            max_waiting: It is refused where so many wait; None: never.

        Raises:
            PausedError: Between `pause` and `resume`.
            QueueFullError: Too many wait.
            ShuttingDownError: The engine was interrupted or closed.
        """
        self.batcher.start()
        finish: Callable[[RequestPlan, Finished], Any] = self._as_rollout if kind == "rollout" else self._as_image
        return self.batcher.submit(plan, finish, timeout_s=timeout_s, max_waiting=max_waiting)

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
        self._check_interrupt()
        geometry = plan_geometry(self._model, height=height, width=width)
        if tuple(latents.shape) != geometry.latent_shape:
            raise InvalidRequestError(
                f"latents must have the shape {geometry.latent_shape} at {width} x {height}, got {tuple(latents.shape)}; "
                "give one sample's latents, without batch dimension.",
                field="latents",
            )
        return self._between_steps(lambda: self._work.picture(latents.to(self._model.device), geometry))

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
        scores = self._submit_scoring(lambda: self._score_sample(sample, log_probs_only=False)).result()
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
        return self.submit_scores(plan).result()

    def submit_scores(self, plan: ScorePlan) -> Future[ScoreAnswer]:
        """As `run_scores`, without waiting: between two steps of what runs, or, with several ranks, between requests.

        Raises:
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._submit_scoring(lambda: self._score_samples(plan))

    def _submit_scoring(self, action: Callable[[], T]) -> Future[T]:
        self._check_interrupt()
        self.batcher.start()
        # Ranks in the middle of a request wait for its next step, and would take a score for it.
        return self.batcher.between_steps(action) if self._replica is None else self.batcher.exclusive(action)

    def _score_samples(self, plan: ScorePlan) -> ScoreAnswer:
        started = time.perf_counter()
        found = []
        for index, sample in enumerate(plan.params.samples):
            try:
                found.append(self._score_sample(sample, log_probs_only=plan.params.log_probs_only))
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None
        return ScoreAnswer(
            request_id=plan.request_id,
            weight_version=self.weight_version,
            samples=tuple(found),
            inference_time_s=time.perf_counter() - started,
        )

    @torch.no_grad()
    def _score_sample(self, sample: RecordedSteps, *, log_probs_only: bool) -> SampleScores:
        """Scores one checked sample, on every rank and on the loop's thread."""
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
            ShuttingDownError: The engine was interrupted or closed.
        """
        staged = self.stage_weights(find_weights(folder, module))
        return self.commit_weights(staged, weight_version=weight_version, mode=mode)

    def stage_weights(self, files: WeightFiles) -> StagedWeights:
        """The first half of an update: reads and checks; may be called from any thread, while requests run.

        Raises:
            WeightsRejectedError: Files that cannot be read to their end, or are not the module's.
            ShuttingDownError: The engine was interrupted or closed.
        """
        self._check_interrupt()
        return self._weights.stage(files)

    def commit_weights(
        self, staged: StagedWeights, *, weight_version: str | None = None, mode: ExclusiveMode = "drain"
    ) -> WeightUpdate:
        """The second half: exchanges the weights once no request runs.

        Args:
            staged: From `stage_weights`.
            weight_version: Of the new weights; None: one more than the highest number that a version had so far.
            mode: What becomes of the requests that run; see `Batcher.exclusive`.

        Raises:
            InvalidRequestError: A version that is no short text.
            WeightsRejectedError: Another rank cannot read its part. Everything is as it was.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._alone(lambda: self._weights.commit(staged, weight_version), mode)

    def weights_checksum(self, module: str = "transformer") -> str:
        """sha256 over the module's tensors in the order of their names, of each its name and then its bytes, of all ranks.

        Waits for the requests that run. `flowroll.replay.weights_checksum` is the same for a trainer's module.

        Args:
            module: "transformer", "text_encoder" or "vae".

        Raises:
            InvalidRequestError: Another module.
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._alone(lambda: self._weights.checksum(module))

    def verify_weights(self, expected: Iterable[tuple[str, str]], *, module: str = "transformer") -> int:
        """Compares every tensor of a module with what the caller expects. Waits for the requests that run.

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
        return self._alone(lambda: self._weights.verify(expected, module))

    def describe_memory(self) -> str:
        """How much memory the samples that run at once can take, in words."""
        defaults = self.info.defaults
        geometry = plan_geometry(self._model, height=defaults.height, width=defaults.width)
        return describe_memory(self.info, geometry, self.batcher.limits)

    def interrupt(self) -> None:
        """Ends every request, and every later call, in a `ShuttingDownError`; may be called from any thread."""
        self.batcher.stop(_shutting_down())

    def close(self) -> None:
        """Interrupts what runs, waits for it, ends the other ranks and frees the model; may be called twice."""
        self.interrupt()
        # Given up where a lost rank may hold a step for ever.
        while not self.batcher.halt(_RELEASE_S) and self.failure is None:
            pass
        if self._replica is not None:
            self._replica.close()
        if hasattr(self, "_model"):
            self._work.release()
            self._weights.release()
            del self._model, self._pipeline
            if self.info.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _open_batcher(self, limits: BatchLimits) -> Batcher:
        if self._replica is None:
            return Batcher(self._work, limits)
        batcher = Batcher(self._work, ONE_BY_ONE, steps=LedSteps(self._replica), max_running_requests=1)
        self._replica.add_listener(batcher.stop)
        return batcher

    def _check_interrupt(self) -> None:
        if (stopped := self.failure or self.batcher.stopped) is not None:
            raise stopped

    def _open_model(self) -> LoadedModel:
        self._check_interrupt()
        model: LoadedModel | None = getattr(self, "_model", None)
        if model is None:  # closed since the check
            raise _shutting_down()
        return model

    def _check_all_ranks(self) -> None:
        """Whether the next step is to be taken; every rank comes to the same answer."""
        assert self._replica is not None
        if not self._replica.goes_on(self.batcher.stopped is not None):
            raise _shutting_down()

    def _answer(self, accepted: Accepted[Any]) -> list[Any]:
        """Waits for a request, which goes if its caller does."""
        try:
            return accepted.result()
        except BaseException:
            self.batcher.cancel(accepted)
            raise

    def _alone(self, action: Callable[[], T], mode: ExclusiveMode = "drain") -> T:
        """Does it while no request runs; at once where that is the case already, inside of an `exclusive` action."""
        self._check_interrupt()
        if self.batcher.is_alone:
            return action()
        self.batcher.start()
        return self.batcher.exclusive(action, mode=mode).result()

    def _between_steps(self, action: Callable[[], T]) -> T:
        self.batcher.start()
        return self.batcher.between_steps(action).result()

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
