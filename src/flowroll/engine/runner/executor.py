"""Rank 0's operations on the model: each is told to the other ranks, then done here. One rank is the case of no peers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner import messages
from flowroll.engine.runner.messages import EnvShape, TensorShape
from flowroll.engine.runner.model_runner import ModelRunner, Recomputation
from flowroll.engine.runner.peers import Peers
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome
from flowroll.engine.weights.offload import SleepMode
from flowroll.engine.weights.shares import as_bytes
from flowroll.engine.weights.staged import WeightFiles
from flowroll.errors import EngineError
from flowroll.types import LoraAdapter, SamplingRecord


class Executor:
    """See the module. The loop's thread calls it, but for `encode` and `decode`, which have stages of their own.

    Args:
        model: The model, or rank 0's part of it.
        pipeline: The text encoder and the VAE.
        peers: The other ranks.
    """

    def __init__(self, model: LoadedModel, pipeline: PipelineRunner, peers: Peers) -> None:
        self._runner = ModelRunner(model, peers.compare)
        self._pipeline, self._peers = pipeline, peers
        self._device = model.device
        self._num_recomputations = 0

    def use_threads(self, num_threads: int) -> None:
        """Gives the calling thread torch's settings for a caller with so many CPU threads."""
        self._runner.use_threads(num_threads)

    def encode(self, plan: RequestPlan) -> Conditioning:
        """Encodes the prompts of a request."""
        return self._pipeline.encode(plan)

    def decode(self, sample: Sample) -> Tensor:
        """Makes the picture of a finished sample, on the CPU."""
        return self._pipeline.decode(sample)

    def add_request(self, request_id: int, conditioning: Conditioning) -> None:
        """Makes every rank ready for the samples of a request."""
        plan, env = conditioning.plan, conditioning.env
        # What the others need to take the same steps; they record nothing that is returned.
        params = replace(
            plan.params,
            seed=None,
            seeds=plan.seeds,
            num_outputs_per_prompt=None,
            request_id=plan.request_id,
            rollout_debug_mode=False,
            rollout_return_denoising_env=False,
            rollout_return_dit_trajectory=False,
            rollout_return_step_indices=None,
        )
        with self._peers.together():
            message = messages.AddRequest(id=request_id, params=params, env=EnvShape.of(env))
            self._peers.send(message, [tensor for _, tensor in env.tensors()])
        self._runner.add_request(request_id, conditioning)

    def start_sample(self, sample_id: int, request_id: int, seed: int) -> Hashable:
        """Draws a sample's initial noise on every rank; returns the key of the forwards that it can share."""
        self._peers.send(messages.StartSample(id=sample_id, request=request_id, seed=seed))
        # A forward runs with one number of CPU threads.
        return torch.get_num_threads(), self._runner.start_sample(sample_id, request_id, seed)

    def step(self, sample_ids: Sequence[int]) -> StepOutcome:
        """Takes one step of samples with equal keys, on every rank, in one forward.

        Raises:
            RankLostError: One rank of several failed alone.
            Exception: The forward failed on the only rank; all samples are where they were.
        """
        with self._peers.together():
            self._peers.send(messages.Step(samples=tuple(sample_ids), num_threads=torch.get_num_threads()))
            outcome = self._runner.step(sample_ids)
        for sample_id, odd in outcome.odd_ranks.items():
            if odd and outcome.finished.pop(sample_id, None) is not None:
                outcome.failures[sample_id] = _disagreement(odd)
        return outcome

    def drop_request(self, request_id: int) -> None:
        """Forgets a request and its samples on every rank."""
        self._runner.drop_request(request_id)
        self._peers.send(messages.DropRequest(id=request_id))

    def free_memory(self) -> None:
        """Gives cached memory of the device back."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def recompute(
        self, record: SamplingRecord, sde_step_indices: tuple[int, ...] | None, recomputation: Recomputation
    ) -> Generator[None, None, list[Tensor]]:
        """Runs recorded steps of one sample again on every rank, a step a piece; returns their velocities.

        Args:
            record: The record of the rollout.
            sde_step_indices: The stochastic steps of the rollout.
            recomputation: The steps.

        Raises:
            EngineError: A rank came to another velocity.
        """
        self._num_recomputations += 1
        number, one = self._num_recomputations, recomputation
        begin = messages.BeginRecomputation(
            id=number,
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
        """Has every other rank prepare new weights of the transformer, from the same files or from these whole tensors.

        Raises:
            WeightsRejectedError: A rank could not, or found another save; all have dropped them.
            RankLostError: A rank ended.
        """
        if isinstance(source, WeightFiles):
            # Between this rank's reading and theirs, somebody may save other weights under the same names.
            assert source.stamps is not None
            config = None if source.config is None else str(source.config)
            files = [str(file) for file in source.files]
            self._peers.stage(messages.StageWeights(files=files, stamps=source.stamps, config=config), field="model_path")
            return
        self._peers.stage(messages.StageTensors(tensors={name: TensorShape.of(tensor) for name, tensor in source.items()}))
        with self._peers.together():
            parts = (as_bytes(tensor.to(self._device)) for tensor in source.values())
            self._peers.send(messages.ReceiveTensors(), parts)

    def stage_adapter(self, folder: Path, about: LoraAdapter) -> None:
        """Has every other rank read an adapter; errors as for `stage_weights`."""
        self._peers.stage(messages.StageAdapter(folder=str(folder), about=about), field="lora_path")

    def stage_release(self, mode: SleepMode) -> None:
        """Has every other rank copy its weights to where they are kept.

        Raises:
            EngineError: A rank could not.
            RankLostError: A rank ended.
        """
        self._peers.stage(messages.StageRelease(mode=mode), error=EngineError)

    def stage_resume(self) -> None:
        """Has every other rank make its weights again; errors as for `stage_release`."""
        self._peers.stage(messages.StageResume(), error=EngineError)

    def commit(self) -> None:
        """Makes what was staged take effect on every other rank. One that cannot ends, and the engine with it."""
        self._peers.send(messages.Commit())

    def drop_staged(self) -> None:
        """Makes every other rank forget what it has staged."""
        self._peers.send(messages.DropStaged())

    def unload_adapter(self, name: str) -> None:
        """Makes every other rank forget an adapter."""
        self._peers.send(messages.UnloadAdapter(name=name))

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Makes every rank go through `whole_tensors` of its transformer, as this one does in the block."""
        with self._peers.together():
            self._peers.send(messages.GatherWeights())
            yield


def _disagreement(odd: Sequence[int]) -> EngineError:
    shown = ", ".join(map(str, odd))
    return EngineError(
        f"every rank must come to the same latents, got others on rank {shown}; use equal devices and library versions."
    )
