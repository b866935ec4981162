"""An engine's scores of recorded steps."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator
from concurrent.futures import Future
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from flowroll.engine.core import EngineCore
from flowroll.engine.runner.model_runner import Recomputation
from flowroll.engine.scoring import ScorePlan, check_sample, forward_rows, plan_score, recipe_of, sample_scores
from flowroll.errors import InvalidRequestError
from flowroll.families import StepScore
from flowroll.types import DenoisingEnv, RecordedSteps, SampleScores, SamplingRecord, ScoreAnswer, ScoreParams


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
        self.scheduler.start()
        scores = self.scheduler.between_steps(lambda: self._score_sample(sample, log_probs_only=False)).result()
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
        self._offload.check_awake()
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

    def submit_scores(self, plan: ScorePlan, *, timeout_s: float | None = None) -> Future[ScoreAnswer]:
        """As `run_scores`, without waiting: between the steps of what runs.

        Args:
            plan: From `plan_score`.
            timeout_s: It is given up when it has not ended after so long; None: never.

        Raises:
            ShuttingDownError: The engine was interrupted or closed.
        """
        self._check_interrupt()
        self.scheduler.start()
        scores: Future[ScoreAnswer] = self.scheduler.between_steps(
            lambda: self._score_samples(plan), request_id=plan.request_id, timeout_s=timeout_s
        )
        return scores

    def _score_samples(self, plan: ScorePlan) -> Generator[None, None, ScoreAnswer]:
        # Again: the weights may have been changed, even to older ones, while the request waited.
        self._weights.versions.demand(plan.params.min_weight_version)
        started = time.perf_counter()
        found = []
        for index, sample in enumerate(plan.params.samples):
            try:
                scores = yield from self._score_sample(sample, log_probs_only=plan.params.log_probs_only)
                found.append(scores)
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None
        return ScoreAnswer(
            request_id=plan.request_id,
            weight_version=self.weight_version,
            samples=tuple(found),
            inference_time_s=time.perf_counter() - started,
        )

    def _score_sample(self, sample: RecordedSteps, *, log_probs_only: bool) -> Generator[None, None, SampleScores]:
        """Scores one checked sample, on every rank, a step a piece."""
        self._check_interrupt()
        self._offload.check_awake()
        model, lora = self._model, sample.sampling.lora
        name = None if lora is None else lora.name
        transformer, used = model.adapters.transformer(name), model.adapters.record(name)
        recipe = recipe_of(sample, model, device=model.device)
        rows = forward_rows(sample, recipe, log_probs_only=log_probs_only)
        recomputation = Recomputation(
            recipe=recipe,
            transformer=transformer,
            steps=tuple(sample.steps[row] for row in rows),
            latents=sample.latents[rows].to(model.device),
            env=sample.denoising_env.to(model.device),
        )
        velocities = yield from self._executor.recompute(sample.sampling, sample.sde_step_indices, recomputation)
        scores = sample_scores(sample, recipe, dict(zip(rows, velocities, strict=True)), log_probs_only=log_probs_only)
        return replace(scores, lora=used)
