"""What the loop and its stages ask of whoever runs the model; see `Executor`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome


@runtime_checkable
class Runner(Protocol):
    """Runs the model on all ranks; see `Executor`."""

    def use_threads(self, num_threads: int) -> None:
        """Gives the calling thread torch's settings for a caller with so many CPU threads."""

    def encode(self, plan: RequestPlan) -> Conditioning:
        """Encodes the prompts of a request. Called by the encode stage."""

    def add_request(self, request_id: int, conditioning: Conditioning) -> None:
        """Makes every rank ready for the samples of a request."""

    def start_sample(self, sample_id: int, request_id: int, seed: int) -> Hashable:
        """Draws a sample's initial noise on every rank; returns the key of the forwards that it can share."""

    def step(self, sample_ids: Sequence[int]) -> StepOutcome:
        """Takes one step of samples with equal keys on every rank. An error leaves all of them where they were."""

    def drop_request(self, request_id: int) -> None:
        """Forgets a request and its samples on every rank."""

    def free_memory(self) -> None:
        """Gives cached memory of the device back, after a forward that failed."""

    def decode(self, sample: Sample) -> Tensor:
        """Makes the picture of a finished sample. Called by the decode stage."""
