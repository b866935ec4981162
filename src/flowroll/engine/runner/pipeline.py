"""The text encoder and the VAE of a pipeline, which only rank 0 has."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.images import open_images
from flowroll.engine.loading import LoadedModel
from flowroll.engine.outputs import check_denoised, check_encoded, record_of
from flowroll.engine.plan import RequestPlan
from flowroll.engine.policies.store import PolicyStore
from flowroll.engine.prompts import BranchText
from flowroll.engine.runner.sample import Conditioning, Sample
from flowroll.engine.runner.texts import EncodedTexts
from flowroll.engine.tokens import encode_ids
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import EngineError
from flowroll.exact import SharedDecoding
from flowroll.families import Geometry
from flowroll.types import EnvValue, SamplingParams, StepStamp, all_finite

_log = logging.getLogger(__name__)
# The most pixels that are decoded in one call, so that it takes no more memory than one large picture.
_MOST_PIXELS = 2**20


class PipelineRunner:
    """Encodes prompts and decodes samples with a loaded pipeline, until `release`.

    Args:
        model: The model in memory.
        pipeline: The diffusers pipeline that holds its modules.
        versions: The versions of the weights.
        offload: Tells whether the weights are in memory.
        policies: The policies of the engine.
    """

    def __init__(
        self,
        model: LoadedModel,
        pipeline: Any,
        versions: WeightVersions,
        offload: WeightOffload,
        policies: PolicyStore,
    ) -> None:
        self._loaded: tuple[LoadedModel, Any] | None = (model, pipeline)
        self._versions, self._offload, self._policies = versions, offload, policies
        self.device = model.device
        # The VAE of Qwen-Image keeps state while it encodes or decodes.
        self._vae = threading.Lock()
        self._texts = EncodedTexts()
        self._shared = SharedDecoding(
            lambda *cells, **options: self._get()[1].vae.decode(*cells, **options),
            lambda: self._get()[1].vae.parameters(),
            is_exact=model.strategy.is_exact,
        )

    def encode(self, plan: RequestPlan) -> Conditioning:
        """Makes the conditioning of a request. Each distinct prompt is encoded once, one prompt per call of the encoder.

        A prompt that was encoded a short time ago is not encoded again.
        Its reference images are part of both branches' prompts, and are encoded by the VAE too.
        A prompt that is given as embeddings is not encoded at all.

        Raises:
            AsleepError: The memory of the weights was released while the request waited.
            OutdatedWeightsError: While the request waited, the weights were replaced by older ones than it demands.
            InvalidRequestError: The request's adapter or policy was dropped while the request waited.
            EngineError: The text encoder or the VAE returned NaN or infinity.
        """
        self._offload.check_awake()
        self._versions.demand(plan.params.min_weight_version)
        self.check_recent(plan.params)
        model, pipeline = self._get()
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        with model.streams.encoding():
            return self._encode(plan, model, pipeline)

    def _encode(self, plan: RequestPlan, model: LoadedModel, pipeline: Any) -> Conditioning:
        pictures = open_images(plan.params.images or ())
        images = self._encode_images(model, pipeline, pictures) if pictures else None
        encoded: dict[BranchText, Mapping[str, EnvValue]] = {}
        for one in (plan.prompt, plan.negative_prompt):
            if one is not None and one not in encoded:
                kept = None if pictures else self._texts.get(one)
                encoded[one] = kept or encode_branch(model, pipeline, model.variant, one, pictures)
        negative = None if plan.negative_prompt is None else encoded[plan.negative_prompt]
        env = model.family.env(encoded[plan.prompt], negative, plan.geometry, images=images, embedded=plan.guidance.embedded)
        check_encoded(env)
        if not pictures:
            for text, fields in encoded.items():
                self._texts.keep(text, fields)
        # One copy for all samples, of which the digests are made too.
        copied = env.to("cpu") if plan.params.rollout else None
        record = replace(
            record_of(plan, copied),
            lora=model.adapters.record(plan.params.lora_name, plan.params.policy),
            policy=self._policies.record(plan.params.policy),
        )
        returned = copied if plan.params.return_denoising_env else None
        return Conditioning.build(plan, model, env, record, returned_env=returned)

    def forget_texts(self) -> None:
        """Gives back the memory of the texts that were encoded last."""
        self._texts = EncodedTexts()

    def check_recent(self, params: SamplingParams, *, coming: int = 0) -> None:
        """Refuses to run a request on weights that are more versions behind the newest than it allows.

        Args:
            params: The request.
            coming: The number of newer versions that are ready and wait for running requests to end.

        Raises:
            OutdatedWeightsError: The weights, or those of its policy, are older.
            InvalidRequestError: There is no such policy.
        """
        policy = self._policies.record(params.policy)
        version = self._versions.current if policy is None else policy.weight_version
        self._versions.demand_recent(version, params.max_staleness, coming=coming)

    def stamp(self, conditioning: Conditioning) -> StepStamp:
        """Returns the time, and the version of the weights that the samples of a request run on."""
        policy, state = conditioning.record.policy, self._versions.state
        version = state.current if policy is None else policy.weight_version
        return StepStamp(weight_version=version, version_number=state.number_of(version), time_s=time.time())

    def decode(self, sample: Sample, beside: Sequence[Sample] = ()) -> Tensor | None:
        """Checks a finished sample, and decodes it into its picture, on the CPU; None where the request asks for no picture.

        Args:
            sample: The sample.
            beside: Other finished samples, which are decoded later; where samples share forwards, some of them share this one's
                decoding.

        Raises:
            EngineError: The trajectory left the range of float32, or the VAE returned NaN or infinity.
        """
        if sample.recorder is not None:
            sample.recorder.wait()
        with self._get()[0].streams.decoding():
            return self._decode(sample, beside)

    def _decode(self, sample: Sample, beside: Sequence[Sample]) -> Tensor | None:
        plan = self._after_steps(sample).conditioning.plan
        check_denoised(plan, sample)
        if sample.recorder is not None:
            for step in plan.params.decode_step_indices or ():
                predicted = sample.recorder.fields["x0"][step].to(self.device)
                what = f"prediction at step {step} of the sample with seed {sample.seed}"
                sample.recorder.pictures[step] = self.picture(predicted, plan.geometry, what=what)
        if plan.record.image_format == "none":
            return None
        what = f"image of the sample with seed {sample.seed}"
        if sample.decoded is None:
            self._decode_together([sample, *beside])
        decoded, sample.decoded = sample.decoded, None
        if decoded is None:
            return self.picture(sample.latents, plan.geometry, what=what)
        return self._picture(decoded, what)

    def _decode_together(self, samples: Sequence[Sample]) -> None:
        """Decodes the first sample and some of the others in one call of the VAE, where several may share one."""
        model, pipeline = self._get()
        geometry = samples[0].conditioning.plan.geometry
        fitting = [
            one
            for one in samples
            if one.decoded is None
            and one.conditioning.plan.geometry == geometry
            and one.conditioning.plan.record.image_format != "none"
        ]
        most = min(len(fitting), _MOST_PIXELS // (geometry.height * geometry.width))
        if model.strategy.name == "alone" or most < 2:
            return
        # Each number of samples is analyzed once, so there are few numbers.
        chosen = fitting[: 1 << (most.bit_length() - 1)]
        self._offload.check_awake()
        cells = [model.family.vae_input(pipeline, self._after_steps(one).latents, geometry) for one in chosen]
        try:
            with self._vae:
                decoded = self._shared.decode(cells)
        except (RuntimeError, MemoryError) as error:
            # The first one alone may succeed, or says what is wrong.
            _log.warning("samples are decoded one by one, since several at once failed: %s", error)
            return
        for one, image in zip(chosen, decoded, strict=True):
            one.decoded = model.family.decoded_image(image)

    def _after_steps(self, sample: Sample) -> Sample:
        """Has the current stream come after the steps of a sample; returns it."""
        self._get()[0].streams.after(sample.done, [sample.latents])
        return sample

    def picture(
        self, latents: Float[Tensor, " *latent"], geometry: Geometry, *, what: str = "image"
    ) -> Float[Tensor, " colors 1 height width"]:
        """Decodes the latents of one sample into its picture, on the CPU.

        Args:
            latents: The latents of one sample, on the model's device.
            geometry: The shapes of a sample of this size.
            what: The name of the picture in an error message.

        Raises:
            AsleepError: The memory of the weights is released.
            EngineError: The VAE returned NaN or infinity.
        """
        self._offload.check_awake()
        model, pipeline = self._get()
        with self._vae:
            decoded = model.family.decode(pipeline, latents, geometry)
        return self._picture(decoded, what)

    def _picture(self, decoded: Float[Tensor, " 1 colors height width"], what: str) -> Float[Tensor, " colors 1 height width"]:
        if not all_finite(decoded):
            raise EngineError(f"{what} must be finite, got NaN or infinity from the VAE; check its weights and its dtype.")
        model, pipeline = self._get()
        # The pipeline's image processor clamps values to black and white: unchecked, an infinity would become a color.
        return model.family.picture(pipeline, decoded).cpu()

    def _encode_images(self, model: LoadedModel, pipeline: Any, pictures: Sequence[Any]) -> Mapping[str, EnvValue]:
        with self._vae:
            return model.family.encode_images(pipeline, pictures)

    def release(self) -> None:
        """Drops the references to the model and the pipeline; no other method may be called after that."""
        self._loaded = None

    def _get(self) -> tuple[LoadedModel, Any]:
        assert self._loaded is not None
        return self._loaded


def encode_branch(
    model: LoadedModel, pipeline: Any, variant: str, one: BranchText, images: Sequence[Any] = ()
) -> Mapping[str, EnvValue]:
    """Encodes the text of one branch alone, whichever form it has, and returns its conditioning fields.

    Args:
        model: The model in memory.
        pipeline: The diffusers pipeline that holds its modules.
        variant: The variant that it is taken for.
        one: The text of the branch.
        images: The reference images beside it, as RGB images of Pillow.
    """
    if one.embeds is not None:
        # Copied, because a tensor that was received lies at an arbitrary address, and bits can depend on the address.
        return {name: tensor.to(model.device, copy=True) for name, tensor in one.embeds.items()}
    if one.token_ids is not None:
        return encode_ids(model.family, pipeline, variant, model.tokenizers, one.token_ids, images)
    assert one.text is not None
    return model.family.encode(pipeline, model.family.prompt(one.text, variant, images))
