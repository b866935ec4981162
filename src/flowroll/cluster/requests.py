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
    CancelledRequestError,
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


@dataclass(slots=True, kw_only=True, eq=False)
class _Open:
    """A request that has not ended.

    Attributes:
        id: The id that its caller gave it.
        task: Waits for its answer.
        has_samples: Whether it may be answered with a part of its samples.
        is_cut: Whether it is to be, with those that are finished.
    """

    id: str
    task: asyncio.Task[Any]
    has_samples: bool
    is_cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A request for samples that is being run."""

    plan: RequestPlan
    kind: RequestKind
    deadline_s: float | None
    open: _Open

    @property
    def max_staleness(self) -> int | None:
        """The number of versions by which its weights may be behind the newest."""
        return self.plan.params.max_staleness


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
        num_retried: The number of requests, or parts, that were run again because their replica ended.
        num_split: The number of requests that several replicas have run.
    """

    def __init__(self, replicas: ReplicaSet) -> None:
        self._replicas = replicas
        self.samples, self.scores = Tally(), Tally()
        self.failures: Counter[str] = Counter()
        self._open: dict[_Open, None] = {}
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
        with self._counted(self.samples, plan.request_id, has_samples=True) as opened:
            deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            run = _Run(plan=plan, kind=kind, deadline_s=deadline_s, open=opened)
            minimum = plan.params.min_weight_version
            parts = await self._placed(
                len(plan.samples), plan.num_steps_taken, minimum, waits=False, max_staleness=run.max_staleness
            )
            self.num_split += len(parts) > 1
            answers = await _all_of([self._part(run, part, minimum, spans) for part in parts])
            by_samples = {part.samples: answer for part, answer in zip(parts, answers, strict=True)}
            return _whole(plan, await self._of_one_version(run, by_samples, spans))

    async def _of_one_version(
        self, run: _Run, answers: Mapping[range, list[Any]], spans: list[StageSpan]
    ) -> Mapping[range, list[Any]]:
        """Runs parts again that older weights made than others of the same request: a group is of one version.

        If the weights have changed once more meanwhile, one replica runs all of it, which no change can come between. Of a
        request that is cut short the parts of older weights are left out.

        Args:
            run: The request.
            answers: The answer of each part, by the places of its samples.
            spans: Filled with how the time of the request was spent.
        """
        if run.plan.params.policy is not None or len(versions := _versions_of(answers)) <= 1:
            return answers
        newest = max(versions, key=self._replicas.versions.state.number_of)
        again = [samples for samples, answer in answers.items() if answer and answer[0].weight_version != newest]
        found = await _all_of([self._again(run, samples, newest, spans) for samples in again])
        answers = {**answers, **dict(zip(again, found, strict=True))}
        if len(_versions_of(answers)) <= 1:
            return answers
        everything = range(len(run.plan.samples))
        return {everything: await self._again(run, everything, newest, spans)}

    async def _again(self, run: _Run, samples: range, minimum: str | None, spans: list[StageSpan]) -> list[Any]:
        if run.open.is_cut:
            return []
        steps = run.plan.num_steps_taken * len(samples) // len(run.plan.samples)
        (part,) = await self._placed(len(samples), steps, minimum, max_parts=1, max_staleness=run.max_staleness)
        return await self._part(run, replace(part, samples=samples), minimum, spans)

    async def _part(self, run: _Run, part: Part, minimum: str | None, spans: list[StageSpan]) -> list[Any]:
        """Runs samples of a request on a replica, and on another one if that ends or does not take them.

        Of a request that is cut short the finished samples are returned, which may be none.
        """
        plan = run.plan.part(part.samples)
        asked: list[FlowrollError] = []
        tried: set[str] = set()
        num_lost = 0
        while True:
            replica = self._replicas.there.get(part.replica)
            try:
                if run.open.is_cut:
                    raise cancelled()
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
            except CancelledRequestError:
                if not run.open.is_cut:
                    raise
            else:
                spans[:] = _latest(spans, list(local_spans(outcome)))
                return list(outcome.result)
            finally:
                self._replicas.router.release(part)
            if run.open.is_cut:
                return []
            found = await self._placed(
                len(part.samples), part.image_steps, minimum, max_parts=1, but=tried, max_staleness=run.max_staleness
            )
            if not found:
                raise soonest(asked)
            part = replace(found[0], samples=part.samples)

    async def _placed(
        self,
        num_samples: int,
        image_steps: int,
        minimum: str | None,
        *,
        max_staleness: int | None = None,
        max_parts: int | None = None,
        but: Collection[str] = (),
        waits: bool = True,
    ) -> list[Part]:
        """Finds replicas for samples.

        Args:
            num_samples: The number of samples.
            image_steps: Their denoising steps together.
            minimum: The version that the weights must have at least.
            max_staleness: The number of versions by which they may be behind the newest.
            max_parts: The most parts; None: as many as there are batches.
            but: The replicas that have been asked in vain.
            waits: Whether to wait for a replica if none is there, as a request does that was taken before.
        """
        give_up_s = asyncio.get_running_loop().time() + _NO_REPLICA_S
        has_waited = False
        while True:
            try:
                return self._replicas.router.place(
                    num_samples, image_steps, minimum=minimum, max_staleness=max_staleness, max_parts=max_parts, but=but
                )
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
        with self._counted(self.scores, plan.request_id):
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

    async def abort(self, request_id: str | None, *, keep_partial: bool = False) -> int:
        """Ends the requests with this id, or all if it is None, and returns their number, however many replicas run one."""
        meant = [one for one in self._open if request_id in (None, one.id)]
        for one in meant:
            one.is_cut = keep_partial and one.has_samples
            if not one.is_cut:
                one.task.cancel()
        if any(one.is_cut for one in meant):
            # A replica that ends meanwhile has no sample to give.
            calls = [one.call("abort", request_id, keep_partial=True) for one in self._replicas.running()]
            await asyncio.gather(*calls, return_exceptions=True)
        return len(meant)

    @contextlib.contextmanager
    def _counted(self, tally: Tally, request_id: str, *, has_samples: bool = False) -> Iterator[_Open]:
        tally.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        opened = _Open(id=request_id, task=task, has_samples=has_samples)
        self._open[opened] = None
        try:
            yield opened
        except BaseException as error:
            tally.failed += 1
            self.failures[getattr(error, "code", cancelled().code)] += 1
            raise
        finally:
            del self._open[opened]
        tally.completed += 1


def _versions_of(answers: Mapping[range, Sequence[Any]]) -> set[str]:
    """Returns the versions of the parts' weights; a part is of one version, as any request of one engine is."""
    return {answer[0].weight_version for answer in answers.values() if answer}


def _whole(plan: RequestPlan, answers: Mapping[range, Sequence[Any]]) -> list[Any]:
    """Returns the answer of a request from those of its parts, by the places of their samples.

    Raises:
        CancelledRequestError: It was cut short before a sample was finished.
    """
    leaves = plan.num_answers // len(plan.samples)
    found: dict[int, Any] = {}
    for samples, answer in answers.items():
        left_out = answer[0].left_out if answer else ()
        places = range(samples.start * leaves, samples.stop * leaves)
        kept = [place for number, place in enumerate(places) if answer and number not in left_out]
        found.update(zip(kept, answer, strict=True))
    missing = tuple(place for place in range(plan.num_answers) if place not in found)
    if not found:
        raise cancelled()
    results = [found[place] for place in sorted(found)]
    return [replace(result, left_out=missing) for result in results] if missing else results


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
