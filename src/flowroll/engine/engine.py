"""The engine: a checkpoint in memory that turns requests into rollouts. No server needed."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine import denoising
from flowroll.engine.checkpoint import LoadedModel, load_model
from flowroll.engine.config import EngineInfo, Limits, resolve_device, resolve_dtype
from flowroll.engine.denoising import DenoisingTask, Sample
from flowroll.engine.plan import RequestPlan, plan_geometry, plan_request
from flowroll.engine.scoring import score_step
from flowroll.errors import InvalidRequestError, ShuttingDownError
from flowroll.families import StepScore
from flowroll.types import ROLLOUT_FIELDS, DenoisingEnv, EnvValue, GeneratedImage, Rollout, SamplingParams, SamplingRecord

_INITIAL_WEIGHT_VERSION = "0"
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished:
    """One finished sample, with its picture on the CPU."""

    sample: Sample
    env: DenoisingEnv
    image: Tensor
    seconds: float


class Engine:
    """Rolls out one checkpoint.

    One request runs at a time; calls from several threads wait for each other. A context manager: `close` frees the model.

    Args:
        model: A diffusers checkpoint folder.
        variant: Variant of the model family, e.g. "turbo" for Z-Image-Turbo; None: the family's first.
        dtype: "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 on the CPU.
        device: "cpu", "cuda", "cuda:N", or "auto".
        limits: What one request may ask for.

    Raises:
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
        InvalidRequestError: A device or dtype that is not to be had.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        variant: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        limits: Limits | None = None,
    ) -> None:
        place = resolve_device(device)
        folder = Path(model)
        self._model = load_model(folder, variant=variant, device=place, dtype=resolve_dtype(dtype, place))
        self._lock = threading.Lock()
        self._interrupted = threading.Event()
        transformer = self._model.pipeline.transformer
        self.info = EngineInfo(
            model=str(folder),
            family=self._model.family.name,
            variant=self._model.variant,
            pipeline=self._model.family.pipeline_class,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(place),
            parameters=sum(parameter.numel() for parameter in transformer.parameters()),
            weight_version=_INITIAL_WEIGHT_VERSION,
            limits=limits or Limits(),
            defaults=self._model.family.variants[self._model.variant],
            pixel_unit=self._model.spec.pixel_unit,
            versions={name: version(name) for name in ("flowroll", "torch", "diffusers", "transformers")},
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def plan(self, params: SamplingParams) -> RequestPlan:
        """Checks a request against the model and fills in its defaults, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A value is off the model's grid or above a limit.
            ShuttingDownError: The engine was interrupted or closed.
        """
        self._check_interrupt()
        model: LoadedModel | None = getattr(self, "_model", None)
        if model is None:  # closed since the check
            raise _shutting_down()
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
        plan = params if isinstance(params, RequestPlan) else self.plan(_as_params(params, values))
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
            _refuse_rollout_fields(values)
            params = _as_params(None, {**values, "rollout": False})
        plan = params if isinstance(params, RequestPlan) else self.plan(params)
        _refuse_rollout_params(plan.params)
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
            return self._model.family.decode(self._model.pipeline, latents.to(self._model.device), geometry).cpu()

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
        with self._lock:
            self._check_interrupt()
            return score_step(
                self._model,
                latents=latents,
                next_latents=next_latents,
                step=step,
                env=env,
                record=record,
                sde_step_indices=sde_step_indices,
            )

    def interrupt(self) -> None:
        """Makes what runs, and every later call, raise `ShuttingDownError` at its next step; may be called from any thread."""
        self._interrupted.set()

    def close(self) -> None:
        """Interrupts what runs, waits for it and frees the model; may be called twice."""
        self.interrupt()
        with self._lock:
            if hasattr(self, "_model"):
                del self._model
                if self.info.device.startswith("cuda"):
                    torch.cuda.empty_cache()

    def _check_interrupt(self) -> None:
        if self._interrupted.is_set():
            raise _shutting_down()

    def _run(self, plan: RequestPlan, finish: Callable[[RequestPlan, _Finished], Result]) -> list[Result]:
        """Runs every sample of a request, in the order of the seeds; the lock is held until the last is finished."""
        with self._lock, torch.no_grad():
            self._check_interrupt()
            if self._model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._model.device)
            task = DenoisingTask.build(plan, self._model, self._encode(plan))
            return [finish(plan, self._run_sample(task, seed)) for seed in plan.seeds]

    def _run_sample(self, task: DenoisingTask, seed: int) -> _Finished:
        started = time.perf_counter()
        sample = denoising.start(task, seed)
        denoising.denoise(task, sample, self._check_interrupt)
        if sample.recorder is not None:
            sample.recorder.check_finite(sample.latents)
        image = self._model.family.decode(self._model.pipeline, sample.latents, task.plan.geometry).cpu()
        return _Finished(sample=sample, env=task.env, image=image, seconds=time.perf_counter() - started)

    def _encode(self, plan: RequestPlan) -> DenoisingEnv:
        """Encodes each distinct prompt of the request once, one prompt per call."""
        family, pipeline = self._model.family, self._model.pipeline
        encoded: dict[str, Mapping[str, EnvValue]] = {}
        for prompt in (plan.params.prompt, plan.negative_prompt):
            if prompt is not None and prompt not in encoded:
                encoded[prompt] = family.encode(pipeline, prompt)
        negative = None if plan.negative_prompt is None else encoded[plan.negative_prompt]
        return family.env(encoded[plan.params.prompt], negative, plan.geometry)

    def _as_image(self, plan: RequestPlan, finished: _Finished) -> GeneratedImage:
        return GeneratedImage(
            request_id=plan.request_id,
            prompt=plan.params.prompt,
            seed=finished.sample.seed,
            image=finished.image,
            latents=finished.sample.latents.cpu(),
            sampling=plan.record,
            weight_version=self.info.weight_version,
            inference_time_s=finished.seconds,
        )

    def _as_rollout(self, plan: RequestPlan, finished: _Finished) -> Rollout:
        recorder = finished.sample.recorder
        steps = None
        if plan.transitions is not None:
            steps = tuple(step for step, transition in enumerate(plan.transitions) if transition.is_stochastic)
        wants_env = recorder is not None and plan.params.return_denoising_env
        return Rollout(
            request_id=plan.request_id,
            prompt=plan.params.prompt,
            seed=finished.sample.seed,
            image=finished.image,
            log_probs=None if recorder is None else recorder.stacked_log_probs(),
            sde_step_indices=steps,
            debug_tensors=None if recorder is None else recorder.debug_tensors(),
            denoising_env=finished.env.to("cpu") if wants_env else None,
            dit_trajectory=None if recorder is None else recorder.trajectory(),
            weight_version=self.info.weight_version,
            sampling=plan.record,
            inference_time_s=finished.seconds,
            peak_memory_mb=self._peak_memory_mb(),
        )

    def _peak_memory_mb(self) -> float:
        if self._model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._model.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the engine must run to answer, got a shutdown; send the request to another replica.")


def _as_params(params: SamplingParams | None, values: dict[str, Any]) -> SamplingParams:
    if params is not None:
        if values:
            raise InvalidRequestError("params must be given alone, got further fields; set them in SamplingParams.")
        return params
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(set(values) - known):
        raise InvalidRequestError(
            f"{unknown[0]} must be a field of SamplingParams, got an unknown name; use one of {', '.join(sorted(known))}.",
            field=unknown[0],
        )
    if "prompt" not in values:
        raise InvalidRequestError("prompt must be given, got nothing; send one prompt as text.", field="prompt")
    return SamplingParams(**values)


def _refuse_rollout_fields(values: Mapping[str, Any]) -> None:
    if given := sorted(ROLLOUT_FIELDS & set(values)):
        raise InvalidRequestError(
            f"{given[0]} must be left out of plain generation, got {values[given[0]]!r}; call rollout.", field=given[0]
        )


def _refuse_rollout_params(params: SamplingParams) -> None:
    blank = SamplingParams(prompt="", rollout=False)
    _refuse_rollout_fields(
        {name: getattr(params, name) for name in ROLLOUT_FIELDS if getattr(params, name) != getattr(blank, name)}
    )
