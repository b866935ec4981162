"""Rank 0's operations on the model: each is sent to the other ranks, then run here. With one rank there are no peers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowroll.engine.loading import LoadedModel
from flowroll.engine.plan import RequestPlan
from flowroll.engine.policies.held import HeldWeights
from flowroll.engine.runner import messages
from flowroll.engine.runner.changes import AnyChange, PutInPlace, RankWeights, ReadWeights, TakeWeights
from flowroll.engine.runner.model_runner import ModelRunner
from flowroll.engine.runner.peers import Peers
from flowroll.engine.runner.pipeline import PipelineRunner
from flowroll.engine.runner.sample import Conditioning, Sample, StepOutcome
from flowroll.engine.runner.shapes import EnvShape, TensorShape
from flowroll.engine.starts import PlannedSample
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.shares import as_bytes
from flowroll.engine.weights.staged import WeightFiles
from flowroll.errors import EngineError
from flowroll.families import Recipe
from flowroll.types import RecordedSteps, StepStamp
from flowroll.types.params import DEFAULTS, TENSORS

# What the other ranks can take the same steps without: tensors, which follow by themselves, and what only a result holds.
_UNSENT = (
    *TENSORS,
    *("prompt_token_ids", "negative_prompt_token_ids", "images", "seed", "num_outputs_per_prompt", "start_step"),
    *("rollout_debug_mode", "rollout_return_denoising_env", "rollout_return_dit_trajectory", "rollout_return_step_indices"),
    *("return_fields", "decode_step_indices"),
)


class Executor:
    """Runs operations on the model on every rank.

    The scheduler loop's thread calls all methods except `encode` and `decode`, which the encode and decode stages call.

    Args:
        model: The model, or rank 0's part of it.
        pipeline: The text encoder and the VAE.
        peers: Reaches the other ranks.
        offload: Keeps this rank's weights while the engine sleeps.
    """

    def __init__(self, model: LoadedModel, pipeline: PipelineRunner, peers: Peers, offload: WeightOffload) -> None:
        self._runner = ModelRunner(model, peers.compare)
        self._pipeline, self._peers = pipeline, peers
        self._weights = RankWeights(model=model, held=HeldWeights(model.transformer), offload=offload, mesh=peers.mesh)
        self._device = model.device

    @property
    def shares_forwards(self) -> bool:
        """Whether samples take less time in a shared forward than in forwards of their own."""
        return self._runner.model.strategy.name == "merged"

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
        params = replace(
            plan.params,
            **{name: DEFAULTS[name] for name in _UNSENT},
            # The environment is all that is left of the texts, but for whether there is an unconditional one.
            prompt="",
            negative_prompt=None if plan.negative_prompt is None else "",
            seeds=plan.seeds,
            request_id=plan.request_id,
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
        """Returns memory that torch has cached, and that of recorded forwards, to the device."""
        self._runner.forget_recordings()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def recompute(
        self,
        sample: RecordedSteps,
        recipe: Recipe,
        rows: Sequence[int],
        *,
        transformer: Any,
        policy: str | None,
    ) -> Generator[None, None, list[Tensor]]:
        """Runs recorded steps of one sample again on every rank. Yields after each step, and returns the velocities.

        Args:
            sample: The sample.
            recipe: How its steps are taken.
            rows: The rows of its steps that are run.
            transformer: The denoiser of this rank, under the policy, with its adapter or without.
            policy: The policy that they run with, whose weights are in place; None: the default.

        Raises:
            EngineError: A rank computed another velocity than rank 0.
        """
        env, states, velocities = sample.denoising_env.to(self._device), sample.latents[list(rows)].to(self._device), []
        for row, state in zip(rows, states, strict=True):
            # Copied, because a row of a stack has an arbitrary address, and bits can depend on the address.
            latents = state.clone()
            message = messages.Recompute(
                record=sample.sampling,
                sde_step_indices=sample.sde_step_indices,
                policy=policy,
                step=sample.steps[row],
                latents=TensorShape.of(latents),
                env=EnvShape.of(env),
                num_threads=torch.get_num_threads(),
            )
            with self._peers.together():
                self._peers.send(message, [*(tensor for _, tensor in env.tensors()), latents])
                velocity, odd = self._runner.recompute(recipe, transformer, sample.steps[row], latents, env)
            if odd:
                raise _disagreement(odd)
            velocities.append(velocity)
            yield
        return velocities

    def change(self, change: AnyChange, finish: Callable[[], Any] | None = None) -> Any:
        """Makes a change of the weights on every rank, or, after an error, on none. No request may run meanwhile.

        Args:
            change: The change.
            finish: Puts the change into effect on this rank, where its first half was done before; None: both are done here.

        Returns:
            What this rank's second half returns.

        Raises:
            FlowrollError: A rank could not prepare the change; see `Change.prepare`.
            RankLostError: A rank has ended.
        """
        finish = finish or change.prepare(self._weights)
        self._peers.stage(change)
        self.commit()
        return finish()

    def stage_weights(self, source: WeightFiles | Mapping[str, Tensor]) -> None:
        """Makes every other rank prepare new weights of the transformer, from the same files or from these whole tensors.

        Raises:
            WeightsRejectedError: A rank could not prepare them, or found other files than rank 0. All ranks have dropped them.
            RankLostError: A rank has ended.
        """
        if isinstance(source, WeightFiles):
            # The stamps detect weights that were saved under the same names after this rank read its files.
            assert source.stamps is not None
            self._peers.stage(ReadWeights(files=source))
            return
        self._peers.stage(TakeWeights(tensors={name: TensorShape.of(tensor) for name, tensor in source.items()}))
        with self._peers.together():
            parts = (as_bytes(tensor.to(self._device)) for tensor in source.values())
            self._peers.send(messages.ReceiveTensors(), parts)

    def commit(self) -> None:
        """Puts the staged change into effect on every other rank. If a rank fails to, it ends, and the engine fails."""
        self._peers.send(messages.Commit())

    def lose(self, message: str) -> None:
        """Ends the engine on all ranks, because this one can run nothing more."""
        self._peers.lose(message)

    def drop_staged(self) -> None:
        """Makes every other rank drop its staged change."""
        self._peers.send(messages.DropStaged())

    def put_in_place(self, policy: str | None) -> None:
        """Puts the held weights of a policy in place on every rank, or, for None, those that the engine was last given.

        Raises:
            AsleepError: The memory of the weights is released.
            InvalidRequestError: There is no such policy any more.
            EngineError: A rank has no room for the weights in place. No rank has exchanged them.
        """
        if policy != self._weights.held.active:
            self.change(PutInPlace(name=policy))
            self.forget_modulations()

    def forget_modulations(self) -> None:
        """Drops what modulation layers made of timesteps, because weights may have changed."""
        self._runner.forget_modulations()

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
