"""Rollouts as a dataset of plain PyTorch, made ahead of the training loop by an engine or a server.

    dataset = RolloutDataset(client, prompts, max_staleness=1, num_outputs_per_prompt=8, return_dit_trajectory=True)
    for groups in DataLoader(dataset, batch_size=4, collate_fn=list):
        ...

This module owns the order of the prompts and the rule of how old weights may be, and `work` the threads that ask for rollouts.
They must not know what a trainer does with these.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from torch.utils.data import IterableDataset, get_worker_info

from flowroll.errors import InvalidRequestError, OutdatedWeightsError
from flowroll.integrations.torch.work import PromptItem, Slot, Work, source_of
from flowroll.types import Rollout, SamplingParams
from flowroll.types.arguments import refuse_unknown
from flowroll.types.policies import DEFAULT_POLICY
from flowroll.types.rules import is_int, require
from flowroll.types.weights import version_number

# How often a group is made anew because the weights went on, before that is an error.
_MAX_REMAKES = 8
# Of each item, so not of all of them.
_OWN_FIELDS = ("prompt", "seed", "seeds", "request_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt.

    Attributes:
        index: The place of the prompt in the iterable, counted from 0.
        item: What the iterable yielded, the very object.
        rollouts: One rollout per sample, in the order of the seeds.
        weight_version: The version of the weights that made them.
        staleness: The number of versions that the weights have gone on since, when the group was handed out; None where
            `max_staleness` is None and nobody asked.
    """

    index: int
    item: PromptItem
    rollouts: tuple[Rollout, ...]
    weight_version: str
    staleness: int | None


class RolloutDataset(IterableDataset[RolloutGroup]):
    """Yields one `RolloutGroup` per prompt, in the order of the prompts, and makes the next ones meanwhile.

    Up to `prefetch` groups are made or kept ahead of the one that the loop works on. They are of the weights that the source
    has when their requests run, so a group may be older than the source when its turn comes. If it is older by more than
    `max_staleness` versions then, it is thrown away and made again with the same seeds. What is handed out is therefore
    never older than that, and with `max_staleness=0` it is always of the present weights.

    The rollouts are made on threads of this process, which end with the iterator: when it is exhausted, fails, or is dropped
    (a `break` drops it), and when the dataset is closed. What runs then is aborted. It works in a `DataLoader` with
    `num_workers=0`; give it `batch_size=None`, or `collate_fn=list` for several groups a batch. Ranks of a distributed trainer
    are given their own prompts each.

    Args:
        source: A `flowroll.engine.Engine` or a `flowroll.client.Client`.
        prompts: Texts, or mappings of fields of `SamplingParams`, which win over `request`. It is advanced by the thread that
            iterates. A list begins again with every iteration; of a generator each iteration takes what is left.
        max_staleness: The most versions that a group's weights may be behind, >= 0. It needs versions that are numbers, as
            they are unless a trainer gives others. None: any.
        prefetch: The number of groups that are made ahead, >= 0. 0: a group is made when it is asked for.
        seed: Where the seeds of the groups come from, >= 0: seed, epoch and index give the 31-bit seed of each group's first
            sample. Items with a seed of their own keep it. None: the source draws them.
        epoch: The number of the first iteration; each iteration has the next one. Set `dataset.epoch` to go on with another.
        **request: Fields of `SamplingParams` for all prompts.

    Attributes:
        epoch: The number of the next iteration.
        num_discarded: How many groups were thrown away because they were too old.

    Raises:
        InvalidRequestError: An argument breaks its rule.
    """

    def __init__(
        self,
        source: Any,
        prompts: Iterable[PromptItem],
        *,
        max_staleness: int | None = 1,
        prefetch: int = 2,
        seed: int | None = 0,
        epoch: int = 0,
        **request: Any,
    ) -> None:
        self._source = source_of(source)
        ok = isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping)
        require(ok, "prompts", "be an iterable of prompts", prompts, "put one prompt into a list")
        for name, value, optional in (
            ("max_staleness", max_staleness, True),
            ("prefetch", prefetch, False),
            ("seed", seed, True),
            ("epoch", epoch, False),
        ):
            ok = (optional and value is None) or (is_int(value) and value >= 0)  # type: ignore[operator]  # no bool, no None
            require(ok, name, "be an integer >= 0" + (" or None" if optional else ""), value, "use such a number")
        for name in _OWN_FIELDS:
            require(name not in request, name, "be given with the prompts", request.get(name), "put it into their mappings")
        refuse_unknown(request)
        if not any(name in request for name in ("prompt_token_ids", "prompt_embeds")):
            SamplingParams(prompt="", **request)
        _check_policy(request, max_staleness)
        self._prompts, self._request = prompts, dict(request)
        self._max_staleness, self._prefetch, self._seed = max_staleness, prefetch, seed
        self.epoch, self.num_discarded = epoch, 0
        self._pid = os.getpid()
        self._works: weakref.WeakSet[Work] = weakref.WeakSet()

    def __enter__(self) -> RolloutDataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        """Returns the number of prompts.

        Raises:
            TypeError: The prompts have no length.
        """
        if not isinstance(self._prompts, Sized):
            raise TypeError(f"prompts must have a length to be counted, got {type(self._prompts).__name__}; use a list.")
        return len(self._prompts)

    def __reduce__(self) -> NoReturn:
        raise _elsewhere("a copy of it")

    def __iter__(self) -> Iterator[RolloutGroup]:
        if get_worker_info() is not None or os.getpid() != self._pid:
            raise _elsewhere("an iteration in another one")
        epoch, self.epoch = self.epoch, self.epoch + 1
        work = Work(self._source, num_threads=self._prefetch + 1)
        self._works.add(work)
        return _RolloutIterator(self, work, iter(self._prompts), epoch)

    def close(self) -> None:
        """Ends all iterations and waits for their threads. It may be called twice, and from any thread."""
        for work in list(self._works):
            work.stop()

    def fields_of(self, item: object, *, epoch: int, index: int) -> dict[str, Any]:
        """Returns the fields of the request for what the iterable of prompts yielded.

        Raises:
            InvalidRequestError: The item is neither a text nor a mapping of fields, or a value breaks its rule.
        """
        ok = isinstance(item, str | Mapping)
        require(ok, f"prompts[{index}]", "be a text or a mapping of fields", item, "yield one of these")
        own: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"prompt": item}
        given = {**self._request, **own}
        if self._seed is not None and given.get("seed") is None and given.get("seeds") is None:
            given["seed"] = group_seed(self._seed, epoch=epoch, index=index)
        refuse_unknown(given)
        _check_policy(given, self._max_staleness)
        SamplingParams(**given)
        return given


def group_seed(seed: int, *, epoch: int, index: int) -> int:
    """Returns the seed of the first sample of a group.

    It is the first 31 bits, big-endian, of the SHA-256 of the text "seed/epoch/index", so that seeds and their neighbors, which
    the other samples of a group have, stay below 2^32.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()[:4]) >> 1


def _check_policy(fields: Mapping[str, Any], max_staleness: int | None) -> None:
    """Refuses a policy beside a bound on its age: a policy stays behind the weights for as long as it is kept."""
    ok = max_staleness is None or fields.get("policy") in (None, DEFAULT_POLICY)
    require(ok, "policy", "be left out where max_staleness bounds the age", fields.get("policy"), "use max_staleness=None")


def _elsewhere(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"a RolloutDataset must stay in the process that made it, got {what}; use num_workers=0 in the DataLoader, the dataset "
        "works on threads of its own.",
        field="num_workers",
    )


class _RolloutIterator:
    """Hands out the groups of one iteration in their order."""

    def __init__(self, dataset: RolloutDataset, work: Work, prompts: Iterator[PromptItem], epoch: int) -> None:
        self._dataset, self._work, self._prompts, self._epoch = dataset, work, prompts, epoch
        self._num_pulled, self._is_exhausted = 0, False
        # Also at the end of the program, where nothing drops the iterator.
        self._finalizer = weakref.finalize(self, work.stop)

    def __iter__(self) -> _RolloutIterator:
        return self

    def __next__(self) -> RolloutGroup:
        try:
            group = self._next_group()
        except BaseException:
            self._finalizer()
            raise
        if group is None:
            self._finalizer()
            raise StopIteration
        return group

    def _next_group(self) -> RolloutGroup | None:
        self._fill()
        slots, changed = self._work.slots, self._work.changed
        while True:
            with changed:
                if self._work.is_stopped or not slots:
                    return None
                head = slots[0]
                while not (self._work.is_stopped or head.rollouts or head.error):
                    changed.wait()
                if self._work.is_stopped:
                    return None
                if head.error is not None:
                    raise head.error
            staleness = self._renew()
            if head.rollouts is not None:
                break
        with changed:
            slots.popleft()
        assert head.item is not None
        return RolloutGroup(
            index=head.index,
            item=head.item,
            rollouts=head.rollouts,
            weight_version=head.weight_version,
            staleness=staleness,
        )

    def _fill(self) -> None:
        """Takes prompts until there are enough groups on their way. An error of theirs waits for its turn."""
        while not (self._is_exhausted or len(self._work.slots) > self._dataset._prefetch):
            slot = Slot(index=self._num_pulled, item=None)
            try:
                item = slot.item = next(self._prompts)
                slot.fields = self._dataset.fields_of(item, epoch=self._epoch, index=slot.index)
            except StopIteration:
                self._is_exhausted = True
                return
            except Exception as error:
                slot.error, self._is_exhausted = error, True
            self._num_pulled += 1
            with self._work.changed:
                self._work.slots.append(slot)
                self._work.changed.notify_all()

    def _renew(self) -> int | None:
        """Has all groups made anew that are too old; returns how far the first one, if it is not, is behind."""
        most = self._dataset._max_staleness
        if most is None:
            return None
        current, behind = self._dataset._source.weight_version(), None
        with self._work.changed:
            for place, slot in enumerate(self._work.slots):
                if slot.rollouts is None:
                    continue
                lag = _lag(slot.weight_version, current)
                if place == 0:
                    behind = lag
                if lag <= most:
                    continue
                if slot.remakes == _MAX_REMAKES:
                    raise OutdatedWeightsError(
                        f"rollouts must be at most {most} versions old, got {lag} after {_MAX_REMAKES} attempts "
                        f"(version {slot.weight_version}, now {current}); update less often, or allow a greater max_staleness.",
                        field="max_staleness",
                    )
                slot.rollouts, slot.remakes = None, slot.remakes + 1
                self._dataset.num_discarded += 1
            self._work.changed.notify_all()
        return behind


def _lag(made: str, current: str) -> int:
    numbers = version_number(made), version_number(current)
    if numbers[0] is None or numbers[1] is None:
        raise InvalidRequestError(
            f"max_staleness must be None where versions are no numbers, got versions {made} and {current}; number them.",
            field="max_staleness",
        )
    # A group that was made after the question is not behind.
    return max(numbers[1] - numbers[0], 0)
