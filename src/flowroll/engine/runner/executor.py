"""Rank 0's operations on the model: each is sent to the other ranks, then run here. With one rank there are no peers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowroll.engine.adapters.files import AdapterFiles
from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import RequestPlan
from flowroll.engine.policies.held import HeldWeights
from flowroll.engine.runner import messages
from flowroll.engine.runner.messages import EnvShape, TensorShape
from flowroll.engine.runner.model_runner import ModelRunner, Recomputation
from flowroll.engine.runner.peers import Peers
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome
from flowroll.engine.starts import PlannedSample
from flowroll.engine.weights.offload import SleepMode
from flowroll.engine.weights.shares import as_bytes
from flowroll.engine.weights.staged import WeightFiles
from flowroll.errors import EngineError
from flowroll.types import LoraAdapter, Number, SamplingRecord, StepStamp


class Executor:
    """Runs operations on the model on every rank.

    The scheduler loop's thread calls all methods except `encode` and `decode`, which the encode and decode stages call.

    Args:
        model: The model, or rank 0's part of it.
        pipeline: The text encoder and the VAE.
        peers: Reaches the other ranks.
    """

    def __init__(self, model: LoadedModel, pipeline: PipelineRunner, peers: Peers) -> None:
        self._runner = ModelRunner(model, peers.compare)
        self._pipeline, self._peers = pipeline, peers
        self._held = HeldWeights(model.transformer)
        self._device = model.device
        self._num_recomputations = 0

    def use_threads(self, num_threads: int) -> None:
        """Sets torch's per-thread settings on the calling thread, for a caller with this number of CPU threads."""
        self._runner.use_threads(num_threads)

    def encode(self, plan: RequestPlan) -> Conditioning:
        """Encodes the prompts of a request."""
        return self._pipeline.encode(plan)

    def stamp(self, conditioning: Conditioning) -> StepStamp:
        """Returns the time, and the version of the weights that the samples of a request run on."""
        return self._pipeline.stamp(conditioning)

    def check_recent(self, plan: RequestPlan, *, coming: int = 0) -> None:
        """Refuses weights that are more versions behind than a request allows; see `PipelineRunner.check_recent`."""
        self._pipeline.check_recent(plan.params, coming=coming)

    def decode(self, sample: Sample, beside: Sequence[Sample] = ()) -> Tensor | None:
        """Decodes a finished sample into its picture, on the CPU; None where the request asks for no picture."""
        return self._pipeline.decode(sample, beside)

    def add_request(self, request_id: int, conditioning: Conditioning) -> None:
        """Prepares every rank for the samples of a request."""
        plan, env = conditioning.plan, conditioning.env
        # The values that the other ranks need to take the same steps, without the tensors that only a result holds.
        params = replace(
            plan.params,
            # The environment is all that is left of the texts, but for whether there is an unconditional one.
            prompt="",
            prompt_token_ids=None,
            negative_prompt=None if plan.negative_prompt is None else "",
            negative_prompt_token_ids=None,
            prompt_embeds=None,
            pooled_prompt_embeds=None,
            prompt_embeds_mask=None,
            negative_prompt_embeds=None,
            negative_pooled_prompt_embeds=None,
            negative_prompt_embeds_mask=None,
            images=None,
            seed=None,
            seeds=plan.seeds,
            num_outputs_per_prompt=None,
            request_id=plan.request_id,
            rollout_debug_mode=False,
            rollout_return_denoising_env=False,
            rollout_return_dit_trajectory=False,
            rollout_return_step_indices=None,
            return_fields=None,
            decode_step_indices=None,
            latents=None,
            start_step=None,
        )
        with self._peers.together():
            # First, because the current stream has to come after the encoding before anything is sent from it.
            self._runner.add_request(request_id, conditioning)
            latents = None if plan.params.latents is None else plan.params.latents.to(self._device)
            message = messages.AddRequest(
                id=request_id,
                params=params,
                env=EnvShape.of(env),
                latents=None if latents is None else TensorShape.of(latents),
                start_step=plan.steps.start,
                images=plan.record.images or (),
            )
            self._peers.send(message, [*(tensor for _, tensor in env.tensors()), *([] if latents is None else [latents])])

    def start_sample(self, sample_id: int, request_id: int, planned: PlannedSample) -> Hashable:
        """Draws a sample's initial noise on every rank; returns its batch key: samples with equal keys can share a forward."""
        self._peers.send(messages.StartSample(id=sample_id, request=request_id, planned=planned))
        # All samples of a forward run with the same number of CPU threads, so that number is part of the key.
        return torch.get_num_threads(), self._runner.start_sample(sample_id, request_id, planned)

    def start_child(
        self, sample_id: int, request_id: int, planned: PlannedSample, parent_id: int
    ) -> tuple[Hashable, StepOutcome]:
        """Starts a child of a sample at a fork on every rank; returns its batch key, and the outcome of the fork's step."""
        with self._peers.together():
            self._peers.send(messages.StartChild(id=sample_id, request=request_id, planned=planned, parent=parent_id))
            key, outcome = self._runner.start_child(sample_id, request_id, planned, parent_id)
        return (torch.get_num_threads(), key), _agreed(outcome)

    def step(self, sample_ids: Sequence[int]) -> StepOutcome:
        """Takes one step of samples with equal batch keys, in one forward, on every rank.

        Raises:
            RankLostError: There are several ranks, and one of them failed.
            Exception: There is one rank, and its forward failed. No sample has advanced.
        """
        with self._peers.together():
            self._peers.send(messages.Step(samples=tuple(sample_ids), num_threads=torch.get_num_threads()))
            outcome = self._runner.step(sample_ids)
        return _agreed(outcome)

    def drop_request(self, request_id: int) -> None:
        """Forgets a request and its samples on every rank."""
        self._runner.drop_request(request_id)
        self._peers.send(messages.DropRequest(id=request_id))

    def free_memory(self) -> None:
        """Returns memory that torch has cached to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def recompute(
        self,
        record: SamplingRecord,
        sde_step_indices: tuple[int, ...] | None,
        recomputation: Recomputation,
        *,
        policy: str | None,
    ) -> Generator[None, None, list[Tensor]]:
        """Runs recorded steps of one sample again on every rank. Yields after each step, and returns the velocities.

        Args:
            record: The record of how the rollout was sampled.
            sde_step_indices: The indices of the rollout's stochastic steps; None: every step is stochastic.
            recomputation: The steps to run again.
            policy: The policy that they run with, whose weights are in place; None: the default.

        Raises:
            EngineError: A rank computed another velocity than rank 0.
        """
        self._num_recomputations += 1
        number, one = self._num_recomputations, recomputation
        begin = messages.BeginRecomputation(
            id=number,
            policy=policy,
            record=record,
            sde_step_indices=sde_step_indices,
            steps=one.steps,
            latents=TensorShape.of(one.latents),
            env=EnvShape.of(one.env),
        )
        with self._peers.together():
            self._peers.send(begin, [*(tensor for _, tensor in one.env.tensors()), one.latents])
        self._runner.begin_recomputation(number, one)
        velocities = []
        try:
            for row in range(len(one.steps)):
                with self._peers.together():
                    self._peers.send(messages.Recompute(id=number, row=row, num_threads=torch.get_num_threads()))
                    velocity, odd = self._runner.recompute(number, row)
                if odd:
                    raise _disagreement(odd)
                velocities.append(velocity)
                yield
        finally:
            self._runner.end_recomputation(number)
            if self._peers.failure is None:
                self._peers.send(messages.EndRecomputation(id=number))
        return velocities

    def stage_weights(self, source: WeightFiles | Mapping[str, Tensor]) -> None:
        """Makes every other rank prepare new weights of the transformer, from the same files or from these whole tensors.

        Raises:
            WeightsRejectedError: A rank could not prepare them, or found other files than rank 0. All ranks have dropped them.
            RankLostError: A rank has ended.
        """
        if isinstance(source, WeightFiles):
            # The stamps detect weights that were saved under the same names after this rank read its files.
            assert source.stamps is not None
            config = None if source.config is None else str(source.config)
            files = [str(file) for file in source.files]
            self._peers.stage(messages.StageWeights(files=files, stamps=source.stamps, config=config), field="model_path")
            return
        self._peers.stage(messages.StageTensors(tensors={name: TensorShape.of(tensor) for name, tensor in source.items()}))
        with self._peers.together():
            parts = (as_bytes(tensor.to(self._device)) for tensor in source.values())
            self._peers.send(messages.ReceiveTensors(), parts)

    def stage_adapter(self, files: AdapterFiles, about: LoraAdapter) -> None:
        """Makes every other rank read an adapter. The errors are those of `stage_weights`."""
        message = messages.StageAdapter(config=str(files.config), weights=str(files.weights), about=about)
        self._peers.stage(message, field="lora_path")

    def stage_release(self, mode: SleepMode) -> None:
        """Makes every other rank copy its weights to where they are kept while the engine sleeps. Encoded texts are forgotten.

        Raises:
            EngineError: A rank could not copy them.
            RankLostError: A rank has ended.
        """
        self._pipeline.forget_texts()
        self._peers.stage(messages.StageRelease(mode=mode), error=EngineError)

    def stage_resume(self) -> None:
        """Makes every other rank load its kept weights again. The errors are those of `stage_release`."""
        self._peers.stage(messages.StageResume(), error=EngineError)

    def commit(self) -> None:
        """Puts the staged change into effect on every other rank. If a rank fails to, it ends, and the engine fails."""
        self._peers.send(messages.Commit())

    def lose(self, message: str) -> None:
        """Ends the engine on all ranks, because this one can run nothing more."""
        self._peers.lose(message)

    def drop_staged(self) -> None:
        """Makes every other rank drop its staged change."""
        self._peers.send(messages.DropStaged())

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter from every other rank."""
        self._peers.send(messages.UnloadAdapter(name=name))

    def put_in_place(self, policy: str | None) -> None:
        """Puts the held weights of a policy in place on every rank, or, for None, those that the engine was last given.

        No request may run meanwhile.

        Raises:
            InvalidRequestError: There is no such policy any more.
            EngineError: A rank has no room for the weights in place. No rank has exchanged them.
        """
        if policy == self._held.active:
            return
        exchange = self._held.prepare_exchange(policy)
        self._peers.stage(messages.StageExchange(name=policy), error=EngineError)
        self.commit()
        exchange()

    def update_policy(self, name: str, source: str | None, decay: Number | None) -> int:
        """Copies or averages held weights on every rank, and returns their bytes on this one; see `HeldWeights`.

        Raises:
            EngineError: A rank has no room for them. Nothing has changed.
        """
        held = self._held
        keep = held.prepare_copy(name, source) if decay is None else held.prepare_average(name, source, decay)
        self._peers.stage(messages.StagePolicy(name=name, source=source, decay=decay), error=EngineError)
        self.commit()
        keep()
        return held.num_bytes(name)

    def stage_policy_adapter(self, name: str, source: str, decay: Number | None, version: str) -> None:
        """Makes every other rank copy or average an adapter; see `AdapterSet.averaged`."""
        message = messages.StagePolicyAdapter(name=name, source=source, decay=decay, version=version)
        self._peers.stage(message, error=EngineError)

    def drop_policy(self, name: str) -> None:
        """Forgets held weights on every rank."""
        self._held.drop(name)
        self._peers.send(messages.DropPolicy(name=name))

    @contextlib.contextmanager
    def gathering(self, names: tuple[str, ...]) -> Iterator[None]:
        """Makes every other rank iterate over these `whole_tensors` of its transformer, as the caller must within the block."""
        with self._peers.together():
            self._peers.send(messages.GatherWeights(names=names))
            yield


def _agreed(outcome: StepOutcome) -> StepOutcome:
    """Returns the outcome with a failure in the place of each finished sample on whose latents the ranks do not agree."""
    for sample_id, odd in outcome.odd_ranks.items():
        if odd and outcome.finished.pop(sample_id, None) is not None:
            outcome.failures[sample_id] = _disagreement(odd)
    return outcome


def _disagreement(odd: Sequence[int]) -> EngineError:
    shown = ", ".join(map(str, odd))
    return EngineError(
        f"every rank must come to the same latents, got others on rank {shown}; use equal devices and library versions."
    )
