"""The requests of a fleet: placed, split, run again where a replica ends, and counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowroll.cluster.replica import local_spans
from flowroll.cluster.replicas import ReplicaSet
from flowroll.cluster.routing import Part, soonest
from flowroll.cluster.updates import ReplicaLostError
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import StageSpan
from flowroll.engine.scheduler.request import cancelled, too_late
from flowroll.engine.scoring import ScorePlan
from flowroll.engine.service import RequestKind
from flowroll.errors import (
    FlowrollError,
    OutdatedWeightsError,
    QueueFullError,
    RankLostError,
    ShuttingDownError,
)
from flowroll.types import ScoreAnswer

# How long a request that was taken waits for a replica, if none is left.
_NO_REPLICA_S = 300.0
# A request that has ended so many replicas is not given to another one.
_MAX_LOSSES = 3
# Versions whose samples are counted; older ones are forgotten.
_MAX_VERSIONS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A request that is being run."""

    plan: RequestPlan
    kind: RequestKind
    deadline_s: float | None


@dataclass(slots=True, kw_only=True)
class Tally:
    """The numbers of requests of one kind. Always accepted = completed + failed + those under way."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def under_way(self) -> int:
        """The number of requests that have not ended."""
        return self.accepted - self.completed - self.failed


class FleetRequests:
    """Runs requests on replicas. The methods that are named so have the arguments of those of `EngineService`.

    Args:
        replicas: The replicas that run them.

    Attributes:
        samples: The numbers of requests for samples.
        scores: The numbers of requests to recompute log-probs.
        failures: The number of requests that ended in an error, by the error's code.
        by_version: The number of samples by the version that made them.
        num_retried: The number of requests, or parts, that were run again because their replica ended.
        num_split: The number of requests that several replicas have run.
    """

    def __init__(self, replicas: ReplicaSet) -> None:
        self._replicas = replicas
        self.samples, self.scores = Tally(), Tally()
        self.failures: Counter[str] = Counter()
        self.by_version: Counter[str] = Counter()
        self.num_retried = self.num_split = 0

    async def submit(
        self, plan: RequestPlan, kind: RequestKind, *, timeout_s: float | None = None, spans: list[StageSpan]
    ) -> list[Any]:
        """Runs a planned request on one replica, or on several if it is larger than a batch.

        Args:
            plan: The planned request.
            kind: Whether its samples become rollouts or plain images.
            timeout_s: The request fails if it has not ended after this many seconds; None: no limit.
            spans: Filled with how its time was spent.
        """
        with self._counted(self.samples):
            minimum = plan.params.min_weight_version
            parts = await self._placed(len(plan.samples), plan.num_steps_taken, minimum, waits=False)
            self.num_split += len(parts) > 1
            deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            run = _Run(plan=plan, kind=kind, deadline_s=deadline_s)
            answers = await _all_of([self._part(run, part, minimum, spans) for part in parts])
            answers = await self._of_one_version(run, parts, answers, spans)
        results = [result for answer in answers for result in answer]
        self.by_version.update(result.weight_version for result in results)
        while len(self.by_version) > _MAX_VERSIONS:
            del self.by_version[next(iter(self.by_version))]
        return results

    async def _of_one_version(
        self, run: _Run, parts: Sequence[Part], answers: list[list[Any]], spans: list[StageSpan]
    ) -> list[list[Any]]:
        """Runs parts again that older weights made than others of the same request: a group is of one version.

        If the weights have changed once more meanwhile, one replica runs all of it, which no change can come between.
        """
        if run.plan.params.policy is not None or len(set(_versions_of(answers))) == 1:
            return answers
        versions = _versions_of(answers)
        newest = max(versions, key=self._replicas.versions.number_of)
        again = [index for index, version in enumerate(versions) if version != newest]
        found = await _all_of([self._again(run, parts[index].samples, newest, spans) for index in again])
        for index, answer in zip(again, found, strict=True):
            answers[index] = answer
        if len(set(_versions_of(answers))) == 1:
            return answers
        return [await self._again(run, range(len(run.plan.samples)), newest, spans)]

    async def _again(self, run: _Run, samples: range, minimum: str | None, spans: list[StageSpan]) -> list[Any]:
        steps = run.plan.num_steps_taken * len(samples) // len(run.plan.samples)
        (part,) = await self._placed(len(samples), steps, minimum, max_parts=1)
        return await self._part(run, replace(part, samples=samples), minimum, spans)

    async def _part(self, run: _Run, part: Part, minimum: str | None, spans: list[StageSpan]) -> list[Any]:
        """Runs samples of a request on a replica, and on another one if that ends or does not take them."""
        plan = run.plan.part(part.samples)
        asked: list[FlowrollError] = []
        tried: set[str] = set()
        num_lost = 0
        while True:
            replica = self._replicas.there.get(part.replica)
            try:
                if replica is None:
                    raise ReplicaLostError(part.replica)
                left_s = None if run.deadline_s is None else run.deadline_s - asyncio.get_running_loop().time()
                if left_s is not None and left_s <= 0:
                    raise too_late(0.0)
                outcome = await replica.ask("submit", (plan, run.kind), {"timeout_s": left_s})
            except ReplicaLostError as error:
                if replica is not None:
                    self._replicas.lose(replica, error)
                num_lost += 1
                self.num_retried += 1
                if num_lost >= _MAX_LOSSES:
                    raise RankLostError(
                        f"the request must be run by a replica, got the end of {num_lost} of them; see their logs."
                    ) from None
            except (QueueFullError, ShuttingDownError, OutdatedWeightsError) as error:
                asked.append(error)
                tried.add(part.replica)
            else:
                spans[:] = _latest(spans, list(local_spans(outcome)))
                return list(outcome.result)
            finally:
                self._replicas.router.release(part)
            found = await self._placed(len(part.samples), part.image_steps, minimum, max_parts=1, but=tried)
            if not found:
                raise soonest(asked)
            part = replace(found[0], samples=part.samples)

    async def _placed(
        self,
        num_samples: int,
        image_steps: int,
        minimum: str | None,
        *,
        max_parts: int | None = None,
        but: Collection[str] = (),
        waits: bool = True,
    ) -> list[Part]:
        """Finds replicas for samples.

        Args:
            num_samples: The number of samples.
            image_steps: Their denoising steps together.
            minimum: The version that the weights must have at least.
            max_parts: The most parts; None: as many as there are batches.
            but: The replicas that have been asked in vain.
            waits: Whether to wait for a replica if none is there, as a request does that was taken before.
        """
        give_up_s = asyncio.get_running_loop().time() + _NO_REPLICA_S
        has_waited = False
        while True:
            try:
                return self._replicas.router.place(num_samples, image_steps, minimum=minimum, max_parts=max_parts, but=but)
            except OutdatedWeightsError:
                if has_waited or not self._replicas.changing.locked():
                    raise
                has_waited = True
                # The version may be that of the change that is being made.
                async with self._replicas.changing:
                    pass
            except QueueFullError:
                if not waits or asyncio.get_running_loop().time() > give_up_s:
                    raise
                await asyncio.sleep(0.05)

    async def submit_scores(self, plan: ScorePlan, *, timeout_s: float | None = None, spans: list[StageSpan]) -> ScoreAnswer:
        """Recomputes log-probs on one replica; `submit` has the arguments."""
        with self._counted(self.scores):
            steps = sum(len(sample.steps) for sample in plan.params.samples)
            options = {"timeout_s": timeout_s}
            answer = await self.somewhere("submit_scores", (plan,), options, steps, plan.params.min_weight_version)
        assert isinstance(answer, ScoreAnswer)
        return answer

    def of_one(self, method: str) -> Callable[..., Awaitable[Any]]:
        """Returns what calls a method on one replica."""

        async def ask(*args: Any, **options: Any) -> Any:
            return await self.somewhere(method, args, options, 1)

        return ask

    async def somewhere(
        self, method: str, args: tuple[Any, ...], options: Mapping[str, Any], steps: int, minimum: str | None = None
    ) -> Any:
        """Calls a method on the least busy replica, and on another one if that ends or does not take it.

        Args:
            method: The name of a method of `EngineService`.
            args: Its arguments.
            options: Its keyword arguments.
            steps: The work that it is, in image-steps.
            minimum: The version that the weights must have at least.
        """
        asked: list[FlowrollError] = []
        tried: set[str] = set()
        for turn in range(_MAX_LOSSES + len(self._replicas.there)):
            found = await self._placed(1, steps, minimum, max_parts=1, but=tried, waits=turn > 0)
            if not found:
                raise soonest(asked)
            replica = self._replicas.there.get(found[0].replica)
            try:
                if replica is not None:
                    return (await replica.ask(method, args, options)).result
            except ReplicaLostError as error:
                assert replica is not None
                self._replicas.lose(replica, error)
            except (QueueFullError, ShuttingDownError, OutdatedWeightsError) as error:
                asked.append(error)
                tried.add(found[0].replica)
            finally:
                self._replicas.router.release(found[0])
        raise RankLostError("a call must be answered by a replica, got the end of several; see their logs.")

    @contextlib.contextmanager
    def _counted(self, tally: Tally) -> Iterator[None]:
        tally.accepted += 1
        try:
            yield
        except BaseException as error:
            tally.failed += 1
            self.failures[getattr(error, "code", cancelled().code)] += 1
            raise
        tally.completed += 1


def _versions_of(answers: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the version of each part's weights; a part is of one version, as any request of one engine is."""
    return [answer[0].weight_version for answer in answers]


async def _all_of(work: Sequence[Any]) -> list[Any]:
    """Returns all results; the first error cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _latest(one: list[StageSpan], other: list[StageSpan]) -> list[StageSpan]:
    """Returns the spans of the part of a request that ended later."""
    return max(one, other, key=lambda spans: spans[-1].end_s if spans else 0.0)
