"""Holds the samples of one rank and runs their steps. Every rank has a runner, with the same samples under the same ids.

Latents are replicated: each rank draws the same noise and takes the same steps, and only the transformer's forward is divided
among the ranks. The runner does not know in which process it runs or who calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome
from flowroll.engine.starts import PlannedSample
from flowroll.families import Recipe
from flowroll.types import DenoisingEnv

# Returns the ranks whose tensor does not have rank 0's bits. All ranks call it at the same time.
Compare = Callable[[Tensor], list[int]]


class ModelRunner:
    """Holds the samples of one rank and runs their steps.

    Args:
        model: The model, or this rank's part of it.
        compare: Returns the ranks whose tensor differs from rank 0's; all ranks call it at the same time.
    """

    def __init__(self, model: LoadedModel, compare: Compare) -> None:
        self.model, self._compare = model, compare
        self._conditionings: dict[int, Conditioning] = {}
        self._samples: dict[int, Sample] = {}
        self._sample_ids: dict[int, list[int]] = {}
        # How many children of a sample at a fork have not started.
        self._num_unborn: dict[int, int] = {}

    def use_threads(self, num_threads: int) -> None:
        """Sets torch's settings on the calling thread; they belong to each thread separately.

        Args:
            num_threads: The number of CPU threads of the caller whose work follows; on a CPU, bits depend on it.
        """
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if self.model.device.type == "cuda":
            torch.cuda.set_device(self.model.device)

    def add_request(self, request_id: int, conditioning: Conditioning) -> None:
        """Stores the conditioning that the samples of a request share."""
        self._conditionings[request_id], self._sample_ids[request_id] = conditioning.handed_over(), []

    def start_sample(self, sample_id: int, request_id: int, planned: PlannedSample) -> Hashable:
        """Draws a sample's initial noise, and returns its batch key: samples with equal keys can share a forward."""
        sample = Sample.start(self._conditionings[request_id], planned)
        self._samples[sample_id] = sample
        self._sample_ids[request_id].append(sample_id)
        return sample.batch_key

    def start_child(
        self, sample_id: int, request_id: int, planned: PlannedSample, parent_id: int
    ) -> tuple[Hashable, StepOutcome]:
        """Starts a child of a sample at a fork, which takes the step of the fork, without a forward of its own.

        The parent is removed with its last child.

        Returns:
            The child's batch key, and the outcome of its step.
        """
        parent = self._samples[parent_id]
        child, outcome = parent.branch(planned), StepOutcome()
        self._num_unborn[parent_id] -= 1
        if not self._num_unborn[parent_id]:
            del self._samples[parent_id], self._num_unborn[parent_id]
        if not child.num_steps_left:
            outcome.odd_ranks[sample_id] = self._compare(child.latents)
            outcome.finished[sample_id] = child
            return None, outcome
        self._samples[sample_id] = child
        self._sample_ids[request_id].append(sample_id)
        return child.batch_key, outcome

    def step(self, sample_ids: Sequence[int]) -> StepOutcome:
        """Takes one step of samples with equal batch keys, and removes the samples that took their last step.

        Raises:
            Exception: The forward failed, and no sample has advanced. An error in the step of one sample is not raised: it is
                in the outcome, under that sample's id.
        """
        samples = {sample_id: self._samples[sample_id] for sample_id in sample_ids}
        forking = [sample_id for sample_id, sample in samples.items() if sample.is_at_fork]
        ending = [sample_id for sample_id, sample in samples.items() if sample.num_steps_left == 1 and sample_id not in forking]
        outcome = StepOutcome()
        for (sample_id, sample), velocity in zip(samples.items(), forward(list(samples.values())), strict=True):
            if sample_id in forking:
                self._fork(sample_id, sample, velocity)
                outcome.forked[sample_id] = sample
                continue
            try:
                sample.take_step(velocity)
            except BaseException as error:
                outcome.failures[sample_id] = error
        for sample_id in ending:
            outcome.odd_ranks[sample_id] = self._compare(samples[sample_id].latents)
            if sample_id not in outcome.failures:
                outcome.finished[sample_id] = samples[sample_id]
            del self._samples[sample_id]
        return outcome

    def _fork(self, sample_id: int, sample: Sample, velocity: Float[Tensor, " *latent"]) -> None:
        sample.velocity = velocity
        plan = sample.conditioning.plan
        self._num_unborn[sample_id] = plan.forks[len(sample.planned.branches)][1]

    def forget_recordings(self) -> None:
        """Drops recorded forwards and kept modulations, whose memory is needed, or whose weights leave it."""
        if (graphs := self.model.strategy.graphs) is not None:
            graphs.forget()
        self.forget_modulations()

    def forget_modulations(self) -> None:
        """Drops what modulation layers made of timesteps, because weights may have changed."""
        if (modulations := self.model.strategy.modulations) is not None:
            modulations.forget()

    def drop_request(self, request_id: int) -> None:
        """Forgets a request and its samples."""
        del self._conditionings[request_id]
        for sample_id in self._sample_ids.pop(request_id):
            self._samples.pop(sample_id, None)
            self._num_unborn.pop(sample_id, None)

    def recompute(
        self, recipe: Recipe, transformer: Any, step: int, latents: Float[Tensor, " *latent"], env: DenoisingEnv
    ) -> tuple[Float[Tensor, " *latent"], list[int]]:
        """Runs a recorded step again, in a forward of its own; returns its velocity and the ranks whose velocity differs.

        Args:
            recipe: How the steps of the rollout are taken.
            transformer: The denoiser, with an adapter or without.
            step: The index of the step, counted from 0.
            latents: The latents before the step, in memory of their own on the model's device.
            env: The denoising environment of the rollout, on the model's device.
        """
        (velocity,) = self.model.strategy.velocities(transformer, [recipe.step_input(latents, step, env)])
        return velocity, self._compare(velocity)


def forward(samples: Sequence[Sample]) -> list[Tensor]:
    """Computes the velocities of samples with equal batch keys, each bit for bit as in a forward of its own."""
    conditioning = samples[0].conditioning
    model = conditioning.model
    inputs = [sample.next_input() for sample in samples]
    return model.strategy.velocities(conditioning.transformer, inputs)
