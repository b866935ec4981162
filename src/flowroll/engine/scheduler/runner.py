"""The interface through which the loop and its stages run the model; `Executor` implements it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowroll.engine.plan import RequestPlan
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome
from flowroll.engine.starts import PlannedSample
from flowroll.types import StepStamp


@runtime_checkable
class Runner(Protocol):
    """Runs the model on all ranks; `Executor` documents the methods in full."""

    @property
    def shares_forwards(self) -> bool:
        """Whether samples take less time in a shared forward than in forwards of their own."""

    def use_threads(self, num_threads: int) -> None:
        """Sets torch's per-thread settings on the calling thread, for a caller with this number of CPU threads."""

    def encode(self, plan: RequestPlan) -> Conditioning:
        """Encodes the prompts of a request. The encode stage calls it."""

    def add_request(self, request_id: int, conditioning: Conditioning) -> None:
        """Prepares every rank for the samples of a request."""

    def start_sample(self, sample_id: int, request_id: int, planned: PlannedSample) -> Hashable:
        """Draws a sample's initial noise on every rank; returns its batch key: samples with equal keys can share a forward."""

    def start_child(
        self, sample_id: int, request_id: int, planned: PlannedSample, parent_id: int
    ) -> tuple[Hashable, StepOutcome]:
        """Starts a child of a sample at a fork on every rank; returns its batch key, and the outcome of the fork's step."""

    def step(self, sample_ids: Sequence[int]) -> StepOutcome:
        """Takes one step of samples with equal batch keys on every rank. After an error, no sample has advanced."""

    def drop_request(self, request_id: int) -> None:
        """Forgets a request and its samples on every rank."""

    def put_in_place(self, policy: str | None) -> None:
        """Puts the weights of a policy in place on every rank; None: those that the engine was last given. Nothing runs."""

    def stamp(self, conditioning: Conditioning) -> StepStamp:
        """Returns the time, and the version of the weights that the samples of a request run on."""

    def check_recent(self, plan: RequestPlan, *, coming: int = 0) -> None:
        """Refuses weights that are more versions behind than the request allows, once so many newer ones are in place."""

    def free_memory(self) -> None:
        """Returns memory that torch has cached to the device, after a forward that failed."""

    def decode(self, sample: Sample, beside: Sequence[Sample] = ()) -> Tensor | None:
        """Decodes a finished sample into its picture, or None where none is asked for. The decode stage calls it.

        Others that will be decoded after it may share its work.
        """
