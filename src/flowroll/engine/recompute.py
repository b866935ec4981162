"""Recomputes log-probs of recorded steps on all ranks of an engine; scoring.py has the parts that need no engine."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace

from flowroll.engine.loading import LoadedModel
from flowroll.engine.runner.executor import Executor
from flowroll.engine.runner.model_runner import Recomputation
from flowroll.engine.scoring import ScorePlan, forward_rows, recipe_of, sample_scores
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import InvalidRequestError
from flowroll.types import RecordedSteps, SampleScores, ScoreAnswer


class LogProbs:
    """Recomputes log-probs one step at a time, so that the scheduler can run the steps of requests in between.

    Args:
        model: The model in memory.
        executor: Runs the forwards on every rank.
        offload: Tells whether the weights are in memory.
        versions: The versions of the weights.
    """

    def __init__(self, model: LoadedModel, executor: Executor, offload: WeightOffload, versions: WeightVersions) -> None:
        self._model, self._executor = model, executor
        self._offload, self._versions = offload, versions

    def answer(self, plan: ScorePlan) -> Generator[None, None, ScoreAnswer]:
        """Recomputes the steps of a checked request. Yields after each forward, and returns the answer."""
        # Checked again, because the weights may have been changed, even to older ones, while the request waited.
        self._versions.demand(plan.params.min_weight_version)
        started_s = time.perf_counter()
        found = []
        for index, sample in enumerate(plan.params.samples):
            try:
                scores = yield from self.sample(sample, log_probs_only=plan.params.log_probs_only)
                found.append(scores)
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None
        return ScoreAnswer(
            request_id=plan.request_id,
            weight_version=self._versions.current,
            samples=tuple(found),
            inference_time_s=time.perf_counter() - started_s,
        )

    def sample(self, sample: RecordedSteps, *, log_probs_only: bool) -> Generator[None, None, SampleScores]:
        """Recomputes the steps of one checked sample. Yields after each forward, and returns the log-probs."""
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
