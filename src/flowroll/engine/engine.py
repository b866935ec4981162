"""The engine: a checkpoint in memory that turns requests into rollouts. No server needed."""

from __future__ import annotations

import resource
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TypeAlias, Unpack, overload

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.arguments import image_request, rollout_request
from flowroll.engine.lora import LoraEngine
from flowroll.engine.outputs import Finished, as_image, as_rollout
from flowroll.engine.plan import RequestPlan, plan_geometry, plan_request
from flowroll.engine.scheduler import RequestFuture
from flowroll.engine.scores import ScoringEngine
from flowroll.engine.sleeping import SleepingEngine
from flowroll.engine.updates import UpdatableEngine
from flowroll.errors import InvalidRequestError
from flowroll.types import GeneratedImage, ImageFields, Rollout, RolloutFields, SamplingParams, all_finite

RequestKind: TypeAlias = Literal["rollout", "generate"]


class Engine(ScoringEngine, UpdatableEngine, LoraEngine, SleepingEngine):
    """Rolls out one checkpoint.

    Calls from several threads share forwards, each with the bits that it has alone, under the CPU thread count of its caller. A
    context manager: `close` frees the model.

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
        rank_timeout_s: How long ranks wait for each other before the replica is taken down.

    Raises:
        CheckpointError: The folder is no checkpoint, or an incomplete one.
        UnsupportedModelError: No family covers the checkpoint.
        InvalidRequestError: A device, dtype or layout that is not to be had.
        RankLostError: A rank ended before it was up.
    """

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def plan(self, params: SamplingParams) -> RequestPlan:
        """Checks a request against the model and fills in its defaults, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A value is off the model's grid or above a limit.
            AsleepError: The memory of the weights is released.
            OutdatedWeightsError: The weights are older than the request demands.
            ShuttingDownError: The engine was interrupted or closed.
        """
        model = self._open_model()
        self._offload.check_awake()
        self._weights.versions.demand(params.min_weight_version)
        return plan_request(params, model, self.info.limits)

    def rollout(
        self, request: str | SamplingParams | RequestPlan | None = None, /, **values: Unpack[RolloutFields]
    ) -> list[Rollout]:
        """Rolls out one request, e.g. `engine.rollout("a red fox", seed=42)`: one `Rollout` per sample, on the CPU.

        Args:
            request: The prompt; or the whole request, then without fields.
            **values: Fields of `SamplingParams`.

        Raises:
            InvalidRequestError: Before any model work.
            ShuttingDownError: The engine was interrupted or closed.
        """
        plan = self._planned(rollout_request(request, values))
        return self._answer(self.submit(plan, "rollout"))

    def generate(
        self, request: str | SamplingParams | RequestPlan | None = None, /, **values: Unpack[ImageFields]
    ) -> list[GeneratedImage]:
        """Plain text-to-image generation: the bits of the diffusers pipeline, one `GeneratedImage` per sample, on the CPU.

        Args:
            request: The prompt; or the whole request, with `rollout=False` and every rollout field at its default.
            **values: Fields of `SamplingParams` that are no rollout fields.

        Raises:
            InvalidRequestError: Before any model work; also for a rollout field.
            ShuttingDownError: The engine was interrupted or closed.
        """
        plan = self._planned(image_request(request, values))
        return self._answer(self.submit(plan, "generate"))

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
            ShuttingDownError: The engine was interrupted or closed.
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
        if not all_finite(latents):
            raise InvalidRequestError(
                "latents must be finite, got NaN or infinity; look at the steps that made them.", field="latents"
            )
        return self._between_steps(lambda: self._work.picture(latents.to(self._model.device), geometry))

    def _planned(self, request: SamplingParams | RequestPlan) -> RequestPlan:
        return request if isinstance(request, RequestPlan) else self.plan(request)

    def _answer(self, future: RequestFuture[Any]) -> list[Any]:
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
