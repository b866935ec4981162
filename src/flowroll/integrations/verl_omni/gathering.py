"""Gathers samples that arrive one by one into requests: those of one prompt are encoded once, and begin together."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowroll.integrations.verl_omni.mapping import group_request
from flowroll.types import Rollout, SamplingParams

if TYPE_CHECKING:
    from flowroll.engine import Engine, RequestFuture


@dataclass(slots=True, kw_only=True, eq=False)
class _Group:
    """The samples of one prompt that wait, or run, together.

    Attributes:
        seeds: The seed of each sample.
        answers: The future of each sample's rollout, which its caller may cancel.
        timer: Sends the group off; None once it was sent.
        running: The engine's request; None before.
    """

    seeds: list[int] = field(default_factory=list)
    answers: list[asyncio.Future[Rollout]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    running: RequestFuture[Rollout] | None = None


class RequestGatherer:
    """Runs single samples on an engine, and joins those that arrive within a short time and are equal but for their seeds.

    All methods are called on one event loop. A rollout is bit for bit the same whether it was gathered or not.

    Args:
        engine: The engine.
        wait_s: How long the first sample of a group waits for others, in seconds.
        most: The largest number of samples of a group.
    """

    def __init__(self, engine: Engine, *, wait_s: float, most: int) -> None:
        assert wait_s >= 0 and most >= 1
        self._engine, self._wait_s, self._most = engine, wait_s, most
        self._waiting: dict[SamplingParams, _Group] = {}
        self._groups_sent = 0

    @property
    def groups_sent(self) -> int:
        """The number of requests that were sent to the engine so far."""
        return self._groups_sent

    async def run(self, params: SamplingParams, seed: int) -> Rollout:
        """Runs one sample.

        If the caller is cancelled, so is the sample; its group's request goes on as long as anybody waits for a sample of it.

        Args:
            params: The request without a seed.
            seed: The seed of the sample.

        Raises:
            FlowrollError: The engine refused the request, or could not run it.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Rollout] = loop.create_future()
        group = self._waiting.get(params)
        if group is None:
            group = self._waiting[params] = _Group()
            group.timer = loop.call_later(self._wait_s, self._send, params, group)
        group.seeds.append(seed)
        group.answers.append(answer)
        if len(group.seeds) == self._most:
            self._send(params, group)
        try:
            return await answer
        finally:
            # A caller that was cancelled has cancelled its future.
            if group.running is not None and all(one.cancelled() for one in group.answers):
                self._engine.scheduler.cancel(group.running)

    def flush(self) -> None:
        """Sends off every group that waits for more samples."""
        for params, group in list(self._waiting.items()):
            self._send(params, group)

    def _send(self, params: SamplingParams, group: _Group) -> None:
        if self._waiting.get(params) is group:
            del self._waiting[params]
        if group.timer is None:
            return
        group.timer.cancel()
        group.timer = None
        wanted = [place for place, answer in enumerate(group.answers) if not answer.cancelled()]
        group.seeds = [group.seeds[place] for place in wanted]
        group.answers = [group.answers[place] for place in wanted]
        if not wanted:
            return
        loop = asyncio.get_running_loop()
        try:
            plan = self._engine.plan(group_request(params, group.seeds))
            group.running = self._engine.submit(plan, "rollout")
        except Exception as error:  # whatever it is, everybody who waits is told
            _fail(group, error)
            return
        self._groups_sent += 1
        group.running.add_done_callback(lambda done: loop.call_soon_threadsafe(_finish, group, done))


def _finish(group: _Group, done: Future[list[Rollout]]) -> None:
    try:
        rollouts = done.result()
    except (Exception, FutureCancelledError) as error:
        _fail(group, error)
        return
    for answer, rollout in zip(group.answers, rollouts, strict=True):
        if not answer.done():
            answer.set_result(rollout)


def _fail(group: _Group, error: BaseException) -> None:
    for answer in group.answers:
        if not answer.done():
            answer.set_exception(error)
