"""A run of many prompts on a server: what is sent at a time, what is kept, what became of each."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor

from flowroll import __version__
from flowroll.cli.rewards import Reward, rewards_of
from flowroll.errors import (
    FlowrollError,
    InvalidRequestError,
    QueueFullError,
    RolloutFileError,
    ServerConnectionError,
    UnauthorizedError,
)
from flowroll.extras import check_installed, extra_for
from flowroll.store import RolloutStore, Selection
from flowroll.types import Rollout, SamplingParams, branch_digest
from flowroll.wire.files import write_whole

if TYPE_CHECKING:
    from flowroll.client import AsyncClient

MANIFEST, PICTURES = "manifest.json", "pictures"
# The next prompt would fare no better.
_HOPELESS = (ServerConnectionError, UnauthorizedError, RolloutFileError)
_MAX_CONCURRENCY = 64
_ID_CHARS = 16


@dataclass(slots=True, kw_only=True)
class _Prompt:
    """One prompt of the run, and what became of it.

    Attributes:
        number: Its number in the file, from 1.
        params: The request.
        ids: The samples in the store; None: there are none yet.
        was_there: Whether an earlier run made them.
        error: Why there are none, or why they have no reward or picture.
    """

    number: int
    params: SamplingParams
    ids: list[str] | None = None
    was_there: bool = False
    error: str | None = None


def identified(requests: Sequence[SamplingParams]) -> list[SamplingParams]:
    """Gives every request an id by which a later run knows it: the digest of its fields, and which of several equal ones it is.

    Raises:
        InvalidRequestError: Two requests were given the same id.
    """
    own = Counter(request.request_id for request in requests if request.request_id is not None)
    if doubled := [name for name, count in own.items() if count > 1]:
        raise InvalidRequestError(
            f"request_id must be of one request, got {doubled[0]} in {own[doubled[0]]} lines; leave it out.", field="prompts"
        )
    seen: Counter[str] = Counter()
    found = []
    for request in requests:
        if request.request_id is None:
            digest = _digest(request)
            seen[digest] += 1
            request = replace(request, request_id=f"{digest}-{seen[digest]}")
        found.append(request)
    return found


def _digest(request: SamplingParams) -> str:
    values = {
        one.name: getattr(request, one.name) for one in fields(request) if one.name not in ("request_id", "suppress_logs")
    }
    values = {name: branch_digest({name: value}) if isinstance(value, Tensor) else value for name, value in values.items()}
    given = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
    return hashlib.sha256(msgspec.json.encode(given, order="sorted")).hexdigest()[:_ID_CHARS]


_DEFAULTS = SamplingParams(prompt="")


class Run:
    """Rolls prompts out and keeps the rollouts in a store. It is a context manager, which closes the store.

    Args:
        requests: The requests, each with its id.
        out: The folder.
        score: The reward function; None: there are no rewards.
        pngs: Whether pictures are written.
        is_resumed: Whether an earlier run's rollouts in the folder count.

    Attributes:
        is_interrupted: Whether the user has ended it.

    Raises:
        RolloutFileError: The folder cannot be written to, or holds rollouts that do not count.
    """

    def __init__(
        self, requests: Sequence[SamplingParams], out: Path, *, score: Reward | None, pngs: bool, is_resumed: bool
    ) -> None:
        self.is_interrupted = False
        self._out, self._score, self._pngs = out, score, pngs
        self._prompts = [_Prompt(number=number, params=params) for number, params in enumerate(requests, start=1)]
        self._server: Mapping[str, Any] = {}
        self._is_hopeless = False
        self._writing = threading.Lock()
        self._started_s = time.monotonic()
        if pngs:
            with extra_for("--png", "client"):
                check_installed("PIL")
            (out / PICTURES).mkdir(parents=True, exist_ok=True)
        self._store = RolloutStore(out)
        there = self._store.select()
        if len(there) and not is_resumed:
            raise RolloutFileError(
                f"out must be a new folder, got {out} with {len(there)} rollouts; add --resume to go on, or choose another."
            )
        ids: dict[str, list[str]] = {}
        for sample in there.samples():
            ids.setdefault(sample.request_id, []).append(sample.id)
        for prompt in self._prompts:
            prompt.ids = ids.get(prompt.params.request_id or "")
            prompt.was_there = prompt.ids is not None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._store.close()

    @property
    def num_done(self) -> int:
        """How many prompts need no more work: they are in the store, or have failed."""
        return sum(prompt.ids is not None or prompt.error is not None for prompt in self._prompts)

    async def go(self, client: Callable[[], AsyncClient], concurrency: int | None, on_progress: Callable[[], None]) -> None:
        """Rolls out what is not there, so many prompts at a time.

        Raises:
            FlowrollError: The server does not say how much it can batch.
        """
        self._complete()
        todo = iter([prompt for prompt in self._prompts if prompt.ids is None])
        async with client() as server:
            if concurrency is None:
                self._server = await server.server_info()
                concurrency = _fitting(self._server, self._prompts)

            async def work() -> None:
                while not self._is_hopeless and (prompt := next(todo, None)) is not None:
                    await self._roll_out(server, prompt)
                    on_progress()

            async with asyncio.TaskGroup() as tasks:
                for _ in range(concurrency):
                    tasks.create_task(work())

    async def _roll_out(self, server: AsyncClient, prompt: _Prompt) -> None:
        try:
            while True:
                try:
                    samples = await server.rollout(prompt.params)
                    break
                except QueueFullError as error:
                    # Others use the server too; it has said when there is room.
                    await asyncio.sleep(error.retry_after_s)
            # On a thread, because the other answers are read meanwhile. It ends what it has begun, also at Ctrl-C.
            await asyncio.to_thread(self._keep, prompt, samples)
        except FlowrollError as error:
            prompt.error = error.message
            self._is_hopeless |= isinstance(error, _HOPELESS)

    def _keep(self, prompt: _Prompt, samples: Sequence[Rollout]) -> None:
        """Writes a prompt's samples; a reward that fails costs the reward alone."""
        with self._writing:
            prompt.ids = self._store.append(samples)
            self._write_pictures(prompt.ids, samples)
            self._add_rewards(prompt, prompt.ids, samples)

    def _complete(self) -> None:
        """Makes the pictures and rewards of an earlier run's samples that it left out or did not come to."""
        prompts = {prompt.params.request_id: prompt for prompt in self._prompts if prompt.was_there}
        there = self._store.select()
        without: dict[str, dict[str, Rollout]] = {}
        for number, sample in enumerate(there.samples()):
            needs_picture = self._pngs and sample.image_format != "none" and not self._picture(sample.id).is_file()
            needs_reward = self._score is not None and sample.reward is None
            if sample.request_id in prompts and (needs_picture or needs_reward):
                rollout = there[number]
                if needs_picture:
                    self._write_pictures([sample.id], [rollout])
                if needs_reward:
                    without.setdefault(sample.request_id, {})[sample.id] = rollout
        for request_id, found in without.items():
            self._add_rewards(prompts[request_id], list(found), list(found.values()))

    def _add_rewards(self, prompt: _Prompt, ids: Sequence[str], samples: Sequence[Rollout]) -> None:
        if self._score is None or not ids:
            return
        try:
            self._store.add_rewards(dict(zip(ids, rewards_of(self._score, samples), strict=True)))
        except InvalidRequestError as error:
            prompt.error = error.message

    def _write_pictures(self, ids: Sequence[str], samples: Sequence[Rollout]) -> None:
        for name, sample in zip(ids, samples, strict=True):
            if self._pngs and sample.image is not None:
                sample.save(self._picture(name))

    def _picture(self, sample: str) -> Path:
        return self._out / PICTURES / f"{sample}.png"

    # What it says at the end

    def summary(self) -> str:
        """Says in a few lines what was made."""
        rolled_out = [prompt for prompt in self._prompts if prompt.ids is not None]
        made = [prompt for prompt in rolled_out if not prompt.was_there]
        count = sum(len(prompt.ids or ()) for prompt in made)
        seconds = time.monotonic() - self._started_s
        first = f"{count} rollouts of {len(made)} prompts in {self._out} ({seconds:.1f} s)"
        lines = ["interrupted; --resume goes on: " + first if self.is_interrupted else first]
        if earlier := len(rolled_out) - len(made):
            lines.append(f"{earlier} prompts were there already")
        chosen = self._selection()
        versions = sorted({sample.weight_version for sample in chosen.samples()})
        if versions:
            lines.append(f"weights: {', '.join(versions)}" + (" (mixed)" if len(versions) > 1 else ""))
        rewards = [reward for reward in chosen.rewards() if reward is not None]
        if rewards:
            mean = math.fsum(rewards) / len(rewards)
            lines.append(f"reward: mean {mean:.4f}, from {min(rewards):.4f} to {max(rewards):.4f}, of {len(rewards)} samples")
        return "\n".join(lines)

    def failure_lines(self) -> list[str]:
        """Says which prompts failed and why; empty where none did."""
        failed = [prompt for prompt in self._prompts if prompt.error is not None]
        if not failed:
            return []
        untried = sum(prompt.ids is None and prompt.error is None for prompt in self._prompts)
        first = f"{len(failed)} of {len(self._prompts)} prompts failed"
        return [
            first + (f", {untried} were not tried:" if untried else ":"),
            *(f"prompt {prompt.number}: {prompt.error}" for prompt in failed),
        ]

    def write_manifest(self, command: Mapping[str, Any]) -> None:
        """Writes what became of each prompt to manifest.json, whole or not at all.

        Args:
            command: How the run was started.
        """
        samples: dict[str, list[dict[str, Any]]] = {}
        for sample in self._selection().samples():
            picture = self._picture(sample.id)
            samples.setdefault(sample.request_id, []).append(
                {
                    "id": sample.id,
                    "seed": sample.seed,
                    "weight_version": sample.weight_version,
                    "rewards": dict(sample.rewards),
                    "picture": str(picture.relative_to(self._out)) if picture.is_file() else None,
                }
            )
        prompts = [
            {
                "number": prompt.number,
                "prompt": prompt.params.prompt,
                "request_id": prompt.params.request_id,
                "samples": samples.get(prompt.params.request_id or "", []),
                "error": prompt.error,
            }
            for prompt in self._prompts
        ]
        server = {name: self._server.get(name) for name in ("model", "family", "variant", "dtype", "device", "versions")}
        content = {"flowroll": __version__, "command": dict(command), "server": server, "prompts": prompts}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_whole(self._out / MANIFEST, [text.encode()])

    def _selection(self) -> Selection:
        return self._store.select(request_id=[prompt.params.request_id or "" for prompt in self._prompts])


def _fitting(server: Mapping[str, Any], prompts: Sequence[_Prompt]) -> int:
    """Returns how many requests fill the server's batch, and one more, which is ready when a place is free."""
    batching = server.get("batching") or {}
    most = int(batching.get("max_batch_samples", 1))
    smallest = min((prompt.params.num_samples for prompt in prompts), default=1)
    return min(math.ceil(most / smallest) + 1, _MAX_CONCURRENCY)
