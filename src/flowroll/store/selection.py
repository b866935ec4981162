"""What a store has of what was asked for: the rows of its index, and the rollouts themselves, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from flowroll.errors import InvalidRequestError
from flowroll.store.index import MAX_ROWS, SAMPLES
from flowroll.types import Rollout

# The name of a reward where there is one alone, and the name under which notes stand among what came later.
REWARD, NOTE = "reward", "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """What the index says of one sample; the rollout itself is not read for it.

    Attributes:
        id: Its id in the store.
        request_id: Id of its request; the samples of a group have the same.
        prompt: The prompt's text; None where there were token ids alone.
        seed: Its seed.
        weight_version: The version of the weights that made it.
        family: The model's family.
        variant: The family's variant.
        sde_type: Its dynamics.
        noise_level: The user's knob n.
        guidance_scale: The effective guidance scale.
        num_inference_steps: The number of steps T.
        height: Height in pixels.
        width: Width in pixels.
        image_format: The form of its picture.
        lora: The name of its adapter; None: the model as it is.
        policy: The name of its policy; None: the default.
        mean_log_prob: The mean log-prob of its stochastic steps; None where there are none.
        num_bytes: The bytes of its tensors.
        written_at: When it was written, in seconds since 1970.
        rewards: Its rewards by name, the latest of each.
        notes: Its notes, the oldest first.
        sigmas: The first digits of a digest of its noise levels; None in indexes from before this field, as the next two.
        start: Those of the digest of the state that it started from; None for an evaluation.
        noise: Those of a digest of the noise of all its steps; None where no step drew any.
    """

    id: str
    request_id: str
    prompt: str | None
    seed: int
    weight_version: str
    family: str
    variant: str
    sde_type: str
    noise_level: float
    guidance_scale: float
    num_inference_steps: int
    height: int
    width: int
    image_format: str
    lora: str | None
    policy: str | None
    mean_log_prob: float | None
    num_bytes: int
    written_at: float
    rewards: Mapping[str, float]
    notes: tuple[str, ...]
    sigmas: str | None = None
    start: str | None = None
    noise: str | None = None

    @property
    def reward(self) -> float | None:
        """The reward named "reward"; None: it has none."""
        return self.rewards.get(REWARD)


class Selection(Sequence[Rollout]):
    """Some samples of a store, in the order in which they were written.

    It is a sequence of rollouts that are read from the disk when they are asked for, and not kept: `replay` takes it as it is,
    and a loop over a million has one of them in memory at a time. A slice is a selection.

    Args:
        rows: Their rows of the index.
        later: The rewards and notes that came later, the oldest first.
        load: Reads the rollout of a key.
    """

    def __init__(self, rows: pa.Table, later: pa.Table, load: Callable[[int], Rollout]) -> None:
        self._rows, self._later, self._load = rows, later, load

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Rollout | Selection:
        if isinstance(index, slice):
            return self._of(self._rows.take(pa.array(range(len(self))[index], pa.int64())))
        return self._load(self._rows.column("key")[range(len(self))[index]].as_py())

    def __iter__(self) -> Iterator[Rollout]:
        yield from map(self._load, self._keys())

    def __repr__(self) -> str:
        return f"Selection({len(self)} samples)"

    @property
    def ids(self) -> list[str]:
        """The ids of the samples."""
        return list(map(id_of, self._keys()))

    def samples(self) -> Iterator[StoredSample]:
        """Yields what the index says of each sample, without reading a rollout."""
        rewards, notes = _by_key(self._later.filter(pc.is_in(self._later.column("key"), value_set=self._key_array())))
        own = {field.name for field in fields(StoredSample)}
        for batch in self._rows.to_batches(max_chunksize=MAX_ROWS):
            for row in batch.to_pylist():
                key, note = row["key"], row["note"]
                known = {**dict(row["rewards"] or ()), **rewards.get(key, {})}
                texts = (*(() if note is None else (note,)), *notes.get(key, ()))
                values = {name: value for name, value in row.items() if name in own}
                yield StoredSample(**{**values, "id": id_of(key), "rewards": known, "notes": texts})

    def groups(self) -> Iterator[Selection]:
        """Yields the samples of each request together, where they were written together."""
        requests = self._rows.column("request_id").to_pylist()
        first = 0
        for index in range(1, len(requests) + 1):
            if index == len(requests) or requests[index] != requests[first]:
                yield self._of(self._rows.slice(first, index - first))
                first = index

    def rewards(self, name: str = REWARD) -> list[float | None]:
        """Returns the rewards of a name, one per sample; None where a sample has none."""
        return reward_column(self._rows, self._later, name).to_pylist()  # type: ignore[no-any-return]

    def to_arrow(self) -> pa.Table:
        """Returns the index's rows as an Arrow table, e.g. for pandas, with each sample's `id` and its latest `reward`."""
        table = self._rows.append_column("id", pa.array(self.ids, pa.string()))
        return table.append_column(REWARD, reward_column(self._rows, self._later, REWARD))

    def _of(self, rows: pa.Table) -> Selection:
        return Selection(rows, self._later, self._load)

    def _keys(self) -> list[int]:
        return self._rows.column("key").to_pylist()  # type: ignore[no-any-return]

    def _key_array(self) -> pa.Array:
        return self._rows.column("key").combine_chunks()


def select(rows: pa.Table, later: pa.Table, load: Callable[[int], Rollout], wanted: Mapping[str, Any]) -> Selection:
    """Returns the samples that match every criterion; see `RolloutStore.select`.

    Raises:
        InvalidRequestError: A criterion has no value that a sample could have.
    """
    mask = None
    for name in ("prompt", "weight_version", "request_id", "seed", "family", "sde_type", "lora", "policy"):
        if wanted.get(name) is not None:
            mask = _both(mask, _is_one_of(rows, name, wanted[name]))
    if wanted.get("prompt_contains") is not None:
        text = rows.column("prompt").cast(pa.string())
        mask = _both(mask, pc.match_substring(text, wanted["prompt_contains"], ignore_case=True))
    bounds = [("min_reward", pc.greater_equal), ("max_reward", pc.less_equal)]
    if any(wanted.get(bound) is not None for bound, _ in bounds):
        rewards = reward_column(rows, later, wanted.get("reward") or REWARD)
        for bound, compare in bounds:
            if wanted.get(bound) is not None:
                mask = _both(mask, compare(rewards, float(wanted[bound])))
    # A sample without a value, e.g. a reward, matches no criterion about it.
    return Selection(rows if mask is None else rows.filter(mask, null_selection_behavior="drop"), later, load)


def reward_column(rows: pa.Table, later: pa.Table, name: str) -> pa.ChunkedArray:
    """Returns the latest reward of a name for each row, null where there is none."""
    first = pc.map_lookup(rows.column("rewards"), pa.scalar(name), "last")
    named = later.filter(pc.equal(later.column("name").cast(pa.string()), name))
    if not len(named):
        return first
    # The latest comes first, which is the one that is found.
    latest = named.take(pa.array(range(len(named) - 1, -1, -1), pa.int64()))
    places = pc.index_in(rows.column("key"), value_set=latest.column("key").combine_chunks())
    found = latest.column("value").combine_chunks().take(places.combine_chunks())
    return pa.chunked_array([pc.coalesce(found, first.combine_chunks())])


def id_of(key: int) -> str:
    """Returns the id of a key: shard and row, e.g. "000012-003"."""
    return f"{key // MAX_ROWS:06d}-{key % MAX_ROWS:03d}"


def key_of(sample: str) -> int:
    """Returns the key of an id.

    Raises:
        InvalidRequestError: It is no id of a store's sample.
    """
    shard, _, row = sample.partition("-") if isinstance(sample, str) else ("", "", "")
    if not (shard.isdecimal() and row.isdecimal() and int(row) < MAX_ROWS):
        raise InvalidRequestError(f"id must be that of a sample in the store, got {sample!r}; take it from append.", field="id")
    return int(shard) * MAX_ROWS + int(row)


def _both(mask: Any, other: Any) -> Any:
    return other if mask is None else pc.and_kleene(mask, other)


def _is_one_of(rows: pa.Table, name: str, wanted: object) -> Any:
    values = list(wanted) if isinstance(wanted, Collection) and not isinstance(wanted, str) else [wanted]
    column = rows.column(name)
    kind = pa.string() if pa.types.is_dictionary(column.type) else column.type
    try:
        value_set = pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise InvalidRequestError(
            f"{name} must be {kind} or several, got {wanted!r}; compare with those.", field=name
        ) from error
    return pc.is_in(column.cast(kind), value_set=value_set)


def _by_key(later: pa.Table) -> tuple[dict[int, dict[str, float]], dict[int, list[str]]]:
    """Returns rewards and notes by key, the oldest first."""
    rewards: dict[int, dict[str, float]] = {}
    notes: dict[int, list[str]] = {}
    for row in later.to_pylist():
        if row["value"] is not None:
            rewards.setdefault(row["key"], {})[row["name"]] = row["value"]
        if row["text"] is not None:
            notes.setdefault(row["key"], []).append(row["text"])
    return rewards, notes


assert {field.name for field in fields(StoredSample)} - {"id", "notes"} <= set(SAMPLES.names)
