"""An engine's scores of recorded steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowroll.engine.core import EngineCore
from flowroll.engine.scoring import ScorePlan, check_sample, forward_rows, plan_score, recipe_of, sample_scores, velocities_of
from flowroll.errors import InvalidRequestError
from flowroll.families import StepScore
from flowroll.types import DenoisingEnv, RecordedSteps, SampleScores, SamplingRecord, ScoreAnswer, ScoreParams

T = TypeVar("T")


class ScoringEngine(EngineCore):
    """The part of `Engine` that scores; scoring.py has what needs no engine."""

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
        sample = RecordedSteps(
            steps=(step,),
            latents=latents[None],
            next_latents=next_latents[None],
            denoising_env=env,
            sampling=record,
            sde_step_indices=None if sde_step_indices is None else tuple(sorted(sde_step_indices)),
        )
        check_sample(sample, self._open_model(), self.info.limits)
        scores = self._submit_scoring(lambda: self._score_sample(sample, log_probs_only=False)).result()
        assert scores.velocities is not None and scores.means is not None
        return StepScore(
            velocity=scores.velocities[0], mean=scores.means[0], std=scores.stds[0].item(), log_prob=scores.log_probs[0]
        )

    def plan_score(self, params: ScoreParams) -> ScorePlan:
        """Checks a request for scores against the model, without model work; may be called from any thread.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
            OutdatedWeightsError: The weights are older than the request demands.
            ShuttingDownError: The engine was interrupted or closed.
        """
        model = self._open_model()
        self._rest.check_awake()
        self._weights.versions.demand(params.min_weight_version)
        return plan_score(params, model, self.info.limits)

    def run_scores(self, params: ScoreParams | ScorePlan) -> ScoreAnswer:
        """As `score`, for several steps of several samples; each is scored alone, so neither their order nor number matters.

        Raises:
            InvalidRequestError: A sample does not fit the model, or is above a limit.
            ShuttingDownError: The engine was interrupted or closed.
        """
        plan = params if isinstance(params, ScorePlan) else self.plan_score(params)
        return self.submit_scores(plan).result()

    def submit_scores(self, plan: ScorePlan) -> Future[ScoreAnswer]:
        """As `run_scores`, without waiting: between two steps of what runs, or, with several ranks, between requests.

        Raises:
            ShuttingDownError: The engine was interrupted or closed.
        """
        return self._submit_scoring(lambda: self._score_samples(plan))

    def _submit_scoring(self, action: Callable[[], T]) -> Future[T]:
        self._check_interrupt()
        self.batcher.start()
        # Ranks in the middle of a request wait for its next step, and would take a score for it.
        return self.batcher.between_steps(action) if self._replica is None else self.batcher.exclusive(action, yields=True)

    def _score_samples(self, plan: ScorePlan) -> ScoreAnswer:
        # Again: the weights may have been changed, even to older ones, while the request waited.
        self._weights.versions.demand(plan.params.min_weight_version)
        started = time.perf_counter()
        found = []
        for index, sample in enumerate(plan.params.samples):
            try:
                found.append(self._score_sample(sample, log_probs_only=plan.params.log_probs_only))
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None
        return ScoreAnswer(
            request_id=plan.request_id,
            weight_version=self.weight_version,
            samples=tuple(found),
            inference_time_s=time.perf_counter() - started,
        )

    @torch.no_grad()
    def _score_sample(self, sample: RecordedSteps, *, log_probs_only: bool) -> SampleScores:
        """Scores one checked sample, on every rank and on the loop's thread."""
        self._check_interrupt()
        self._rest.check_awake()
        model, lora = self._model, sample.sampling.lora
        name = None if lora is None else lora.name
        transformer, used = model.adapters.transformer(name), model.adapters.record(name)
        recipe = recipe_of(sample, model, device=model.device)
        rows = forward_rows(sample, recipe, log_probs_only=log_probs_only)
        steps, velocities = [sample.steps[row] for row in rows], list[Tensor]()
        if rows:
            env, latents = sample.denoising_env.to(model.device), sample.latents[rows].to(model.device)
            if self._replica is None:
                velocities = velocities_of(model, transformer, recipe, latents, steps, env, self._check_interrupt)
            else:
                with self._replica.in_step():
                    self._replica.begin_scores(sample.sampling, sample.sde_step_indices, steps, latents, env)
                    velocities = velocities_of(model, transformer, recipe, latents, steps, env, self._check_all_ranks)
                self._replica.finish_sample(torch.stack(velocities))
        scores = sample_scores(sample, recipe, dict(zip(rows, velocities, strict=True)), log_probs_only=log_probs_only)
        return replace(scores, lora=used)
