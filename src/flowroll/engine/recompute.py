"""Recomputes log-probs of recorded steps on all ranks of an engine; scoring.py has the parts that need no engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from dataclasses import replace
from typing import TypeVar

from flowroll.engine.loading import LoadedModel
from flowroll.engine.policies.store import PolicyStore
from flowroll.engine.runner.executor import Executor
from flowroll.engine.scoring import ScorePlan, forward_rows, recipe_of, sample_scores
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.versions import WeightVersions
from flowroll.errors import FlowrollError, InvalidRequestError
from flowroll.types import Exactness, RecordedSteps, SampleScores, ScoreAnswer

_log = logging.getLogger(__name__)

T = TypeVar("T")


class LogProbs:
    """Recomputes log-probs one step at a time, so that the scheduler can run the steps of requests in between.

    Args:
        model: The model in memory.
        executor: Runs the forwards on every rank.
        offload: Tells whether the weights are in memory.
        versions: The versions of the weights.
        policies: The policies.
        exactness: Whether the engine is exact, for the answer to name.
    """

    def __init__(
        self,
        model: LoadedModel,
        executor: Executor,
        offload: WeightOffload,
        versions: WeightVersions,
        policies: PolicyStore,
        *,
        exactness: Exactness,
    ) -> None:
        self._exactness: Exactness = exactness
        self._model, self._executor = model, executor
        self._offload, self._versions, self._policies = offload, versions, policies

    def answer(self, plan: ScorePlan) -> Generator[None, None, ScoreAnswer]:
        """Recomputes the steps of a checked request. Yields after each forward, and returns the answer."""
        # Checked again, because the weights may have been changed, even to older ones, while the request waited.
        self._versions.demand(plan.params.min_weight_version)
        policy = self._policies.record(plan.params.policy)
        if self._policies.weights_of(plan.params.policy) != plan.held_policy:
            raise InvalidRequestError(
                f"policy must stay what it is while a request waits, got {plan.params.policy}, which was made anew of another "
                "kind; send the request again.",
                field="policy",
            )
        started_s = time.perf_counter()
        found = yield from self.with_weights_of(plan.held_policy, self._samples(plan))
        return ScoreAnswer(
            request_id=plan.request_id,
            weight_version=self._versions.current if policy is None else policy.weight_version,
            samples=found,
            inference_time_s=time.perf_counter() - started_s,
            policy=policy,
            exactness=self._exactness,
        )

    def _samples(self, plan: ScorePlan) -> Generator[None, None, tuple[SampleScores, ...]]:
        found, params = [], plan.params
        for index, sample in enumerate(params.samples):
            try:
                scores = yield from self.sample(sample, policy=params.policy, log_probs_only=params.log_probs_only)
                found.append(scores)
            except InvalidRequestError as error:
                raise error.within(f"samples[{index}]") from None
        return tuple(found)

    def with_weights_of(self, held: str | None, pieces: Generator[None, None, T]) -> Generator[None, None, T]:
        """Runs pieces with the held weights of a policy in place, and puts those back that the engine was last given.

        Nothing else may run meanwhile, unless `held` is None.

        Raises:
            InvalidRequestError: The policy was dropped while the request waited.
            EngineError: A rank has no room for the weights in place.
        """
        if held is None:
            return (yield from pieces)
        self._offload.check_awake()
        self._executor.put_in_place(held)
        try:
            return (yield from pieces)
        finally:
            try:
                self._executor.put_in_place(None)
            except FlowrollError:  # a rank is lost, and the engine ends anyway
                _log.debug("the weights could not be put back on every rank", exc_info=True)

    def sample(self, sample: RecordedSteps, *, policy: str | None, log_probs_only: bool) -> Generator[None, None, SampleScores]:
        """Recomputes the steps of one checked sample. Yields after each forward, and returns the log-probs.

        Args:
            sample: The sample.
            policy: The policy to compute with, whose weights are in place; None: the default, with the sample's own adapter.
            log_probs_only: Whether means and velocities are left out.
        """
        self._offload.check_awake()
        model, lora = self._model, sample.sampling.lora
        name = None if lora is None else lora.name
        transformer, used = model.adapters.transformer(name, policy), model.adapters.record(name, policy)
        recipe = recipe_of(sample, model, device=model.device)
        rows = forward_rows(sample, recipe, log_probs_only=log_probs_only)
        velocities = yield from self._executor.recompute(sample, recipe, rows, transformer=transformer, policy=policy)
        scores = sample_scores(sample, recipe, dict(zip(rows, velocities, strict=True)), log_probs_only=log_probs_only)
        return replace(scores, lora=used)
