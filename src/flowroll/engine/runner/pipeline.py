"""The text encoder and the VAE of a pipeline, which rank 0 alone has."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.outputs import check_denoised, check_encoded, record_of
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.sample import Conditioning, Sample
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import EngineError
from flowroll.families import Geometry, Prompt
from flowroll.types import EnvValue, all_finite


class PipelineRunner:
    """Encodes prompts and decodes samples with a loaded pipeline; `release` lets go of it.

    Args:
        model: The model.
        pipeline: The diffusers pipeline that holds its modules.
        versions: The versions of the weights.
        offload: Whether they are there.
    """

    def __init__(self, model: LoadedModel, pipeline: Any, versions: WeightVersions, offload: WeightOffload) -> None:
        self._loaded: tuple[LoadedModel, Any] | None = (model, pipeline)
        self._versions, self._offload = versions, offload
        self.device = model.device
        # The VAE of Qwen-Image keeps state while it decodes.
        self._decoder = threading.Lock()

    def encode(self, plan: RequestPlan) -> Conditioning:
        """Makes the conditioning of a request: each distinct prompt is encoded once, one prompt per call.

        Raises:
            AsleepError: The memory of the weights was released while it waited.
            OutdatedWeightsError: The weights were changed to older ones than it demands while it waited.
            InvalidRequestError: Its adapter was unloaded while it waited.
            EngineError: The text encoder gave NaN or infinity.
        """
        self._offload.check_awake()
        self._versions.demand(plan.params.min_weight_version)
        model, pipeline = self._get()
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        encoded: dict[str, Mapping[str, EnvValue]] = {}
        for prompt in (plan.params.prompt, plan.negative_prompt):
            if prompt is not None and prompt not in encoded:
                encoded[prompt] = model.family.encode(pipeline, Prompt(text=prompt))
        negative = None if plan.negative_prompt is None else encoded[plan.negative_prompt]
        env = model.family.env(encoded[plan.params.prompt], negative, plan.geometry, embedded=plan.guidance.embedded)
        check_encoded(env)
        record = replace(record_of(plan, env), lora=model.adapters.record(plan.params.lora_name))
        return Conditioning.build(plan, model, env, record)

    def decode(self, sample: Sample) -> Tensor:
        """Makes the picture of a finished sample, on the CPU.

        Raises:
            EngineError: Its trajectory left float32's range, or the VAE gave NaN or infinity.
        """
        if sample.recorder is not None:
            sample.recorder.wait()
        plan = sample.conditioning.plan
        check_denoised(plan, sample)
        return self.picture(sample.latents, plan.geometry, what=f"image of the sample with seed {sample.seed}")

    def picture(
        self, latents: Float[Tensor, " *latent"], geometry: Geometry, *, what: str = "image"
    ) -> Float[Tensor, " 3 1 height width"]:
        """Makes the picture of one sample's latents, on the CPU.

        Args:
            latents: One sample's latents, on the model's device.
            geometry: The shapes of a sample of that size.
            what: How a message calls the picture.

        Raises:
            AsleepError: The memory of the weights is released.
            EngineError: The VAE gave NaN or infinity.
        """
        self._offload.check_awake()
        model, pipeline = self._get()
        with self._decoder:
            decoded = model.family.decode(pipeline, latents, geometry)
        if not all_finite(decoded):
            raise EngineError(f"{what} must be finite, got NaN or infinity from the VAE; check its weights and its dtype.")
        # The pipeline's own image processor cuts at black and white, where an infinity would be a color.
        return model.family.picture(pipeline, decoded).cpu()

    def release(self) -> None:
        """Lets go of the model; nothing works after that."""
        self._loaded = None

    def _get(self) -> tuple[LoadedModel, Any]:
        assert self._loaded is not None
        return self._loaded
