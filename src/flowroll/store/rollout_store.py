"""A folder of rollouts: appended to, annotated, selected from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from torch import Tensor

from flowroll.errors import InvalidRequestError, RolloutFileError
from flowroll.store.index import MAX_ROWS, NOTES, SAMPLES, Ranges, row_of, rows_of_shard
from flowroll.store.selection import NOTE, REWARD, Selection, id_of, key_of, select
from flowroll.store.shards import SampleHead, Shard, write_shard
from flowroll.types import Number, Rollout
from flowroll.types.shown import tensors_of
from flowroll.wire.files import PART, write_whole

MARKER = "flowroll-store.json"
STORE_VERSION = 1
_SHARD = re.compile(r"(\d{8})\.safetensors")
# Shards that are kept open; each costs the memory of its header.
_MAX_OPEN = 4
Rewards: TypeAlias = Sequence[Number | None] | Mapping[str, Sequence[Number | None]]
# One value, or several of which any will do.
Texts: TypeAlias = str | Collection[str]


def is_store(path: Path) -> bool:
    """Tells whether a folder is a store."""
    return (path / MARKER).is_file()


class RolloutStore:
    """A folder of rollouts.

    What a call of `append` was given is on the disk when it returns; after a kill in the middle of it, none of it is there, and
    the store is whole. Threads and processes that write to one store wait for each other; readers wait for nobody, and see what
    was there when they selected. On a network disk, writers on several machines need one that locks (`flock`).

    Args:
        path: The folder; it is made if it is not there.
        read_only: Whether to leave the folder as it is, and to refuse to write.

    Raises:
        RolloutFileError: There is no store to read, the folder cannot be written to, or the store is of a later version.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only
        self._shards = self.path / "shards"
        self._index = Ranges(self.path / "index", SAMPLES, self._rows_again)
        self._notes = Ranges(self.path / "notes", NOTES)
        self._open: dict[int, Shard] = {}
        self._guard = threading.Lock()
        self._last = -1
        if not read_only:
            self._prepare()
        self._check_version()

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RolloutStore({str(self.path)!r}, {len(self)} samples)"

    def __len__(self) -> int:
        return len(self._index.read(self._numbers(), ["key"]))

    def close(self) -> None:
        """Closes the shards that are open for reading. The store may be used again."""
        with self._guard:
            self._open.clear()

    def append(
        self, rollouts: Sequence[Rollout], *, rewards: Rewards | None = None, notes: Sequence[str | None] | None = None
    ) -> list[str]:
        """Writes rollouts, all of them or none, e.g. a group.

        Args:
            rollouts: At most 4096; they become one file.
            rewards: One number for each, which is its "reward"; or by name, several rewards. None: not known yet; `add_rewards`
                takes them later.
            notes: Free text for each.

        Returns:
            The id of each, by which it is found again.

        Raises:
            InvalidRequestError: There are too many rollouts or none, or not one finite reward or None for each.
            RolloutFileError: The store cannot be written to.
        """
        heads = _heads(rollouts, rewards, notes)
        with self._writing():
            number = self._next_number()
            write_shard(self._shard_path(number), rollouts, heads)
            _sync_folder(self._shards)
            self._last, first = number, number * MAX_ROWS
            samples = zip(range(first, first + len(rollouts)), rollouts, heads, strict=True)
            rows = [row_of(key, rollout, rollout.log_probs, head) for key, rollout, head in samples]
            # The samples are in the store, and an index that cannot be written is made again from them.
            with contextlib.suppress(RolloutFileError):
                self._index.add(number, rows)
        return [id_of(first + row) for row in range(len(rollouts))]

    def add_rewards(self, rewards: Mapping[str, Number], *, name: str = REWARD) -> None:
        """Adds rewards to samples that are there; the latest reward of a name counts. No shard is written again.

        Args:
            rewards: By id.
            name: What kind of reward it is.

        Raises:
            InvalidRequestError: An id is not in the store, or a reward is not finite.
            RolloutFileError: The store cannot be written to.
        """
        self._annotate([{"key": self._key(one), "name": name, "value": _reward(value)} for one, value in rewards.items()])

    def add_notes(self, notes: Mapping[str, str]) -> None:
        """Adds notes, free text by id, to samples that are there. No shard is written again.

        Raises:
            InvalidRequestError: An id is not in the store.
            RolloutFileError: The store cannot be written to.
        """
        self._annotate([{"key": self._key(one), "name": NOTE, "text": text} for one, text in notes.items()])

    def load(self, sample: str) -> Rollout:
        """Reads one rollout, with every tensor bit for bit.

        Args:
            sample: Its id.

        Raises:
            InvalidRequestError: The id is not in the store.
            RolloutFileError: Its shard is damaged.
        """
        return self._load(self._key(sample))

    def picture(self, sample: str) -> Tensor | bytes | None:
        """Reads the picture alone of one rollout, as `Rollout.image` has it.

        Args:
            sample: Its id.

        Raises:
            InvalidRequestError: The id is not in the store.
            RolloutFileError: Its shard is damaged.
        """
        number, row = divmod(self._key(sample), MAX_ROWS)
        return self._shard(number).picture(row)

    def select(
        self,
        *,
        prompt: Texts | None = None,
        prompt_contains: str | None = None,
        weight_version: Texts | None = None,
        min_reward: Number | None = None,
        max_reward: Number | None = None,
        reward: str = REWARD,
        request_id: Texts | None = None,
        seed: int | Collection[int] | None = None,
        family: Texts | None = None,
        sde_type: Texts | None = None,
        lora: Texts | None = None,
        policy: Texts | None = None,
    ) -> Selection:
        """Selects the samples that match all that is given; without arguments, all samples. No rollout is read for it.

        Args:
            prompt: The whole text of the prompt, or several texts of which any will do; so for all that follow.
            prompt_contains: A part of the prompt's text, in upper or lower case.
            weight_version: The version of the weights.
            min_reward: The least reward; samples without one are left out.
            max_reward: The largest reward; samples without one are left out.
            reward: The name of the reward that the two bounds are about.
            request_id: The id of the request: its group.
            seed: The sample's seed.
            family: The model's family.
            sde_type: The dynamics.
            lora: The name of the adapter.
            policy: The name of the policy.

        Raises:
            InvalidRequestError: A value is not of its column's kind.
            RolloutFileError: The index is damaged.
        """
        wanted = {name: value for name, value in locals().items() if name != "self"}
        return select(self._index.read(self._numbers()), self._notes.read(), self._load, wanted)

    # Reading

    def _numbers(self) -> set[int]:
        """Returns the numbers of the shards that are there."""
        names = os.listdir(self._shards) if self._shards.is_dir() else []
        return {int(match[1]) for match in map(_SHARD.fullmatch, names) if match}

    def _shard_path(self, number: int) -> Path:
        return self._shards / f"{number:08d}.safetensors"

    def _shard(self, number: int) -> Shard:
        with self._guard:
            if (shard := self._open.pop(number, None)) is None:
                shard = Shard(self._shard_path(number))
            # The last one that was used is the last to go.
            self._open[number] = shard
            if len(self._open) > _MAX_OPEN:
                del self._open[next(iter(self._open))]
            return shard

    def _load(self, key: int) -> Rollout:
        return self._shard(key // MAX_ROWS).rollout(key % MAX_ROWS)

    def _rows_again(self, number: int) -> list[dict[str, Any]]:
        return rows_of_shard(number, self._shard(number))

    def _key(self, sample: str) -> int:
        key = key_of(sample)
        number, row = divmod(key, MAX_ROWS)
        if not self._shard_path(number).is_file() or row >= len(self._shard(number)):
            raise InvalidRequestError(
                f"id must be that of a sample in the store, got {sample!r}; take it from append.", field="id"
            )
        return key

    # Writing

    def _annotate(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            with self._writing():
                self._notes.add(self._notes.next_number(), rows)

    def _next_number(self) -> int:
        # Another writer may have been here since.
        return self._last + 1 if not self._shard_path(self._last + 1).exists() else max(self._numbers()) + 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Waits for the other writers; the system lets go of a killed one's lock."""
        if self.read_only:
            raise RolloutFileError(f"path must be open for writing, got {self.path} read only; open it without read_only.")
        try:
            lock = open(self.path / "lock", "w")  # noqa: SIM115
        except OSError as error:
            raise RolloutFileError(
                f"path must be writable, got {self.path} ({error.strerror}); choose another folder."
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _prepare(self) -> None:
        """Makes the folder, and mends what a kill or a lost index left: rows without a file, files without an end."""
        try:
            for folder in ("shards", "index", "notes"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RolloutFileError(
                f"path must be a folder or free, got {self.path} ({error.strerror}); choose another one."
            ) from error
        with self._writing():
            if not is_store(self.path):
                write_whole(self.path / MARKER, [json.dumps({"schema_version": STORE_VERSION}).encode()])
            self._check_version()
            for folder in ("shards", "index", "notes"):
                for unfinished in (self.path / folder).glob(f".*{PART}"):
                    unfinished.unlink(missing_ok=True)
            numbers = self._numbers()
            self._last = max(numbers, default=-1)
            for number in sorted(numbers - self._index.numbers()):
                self._index.add(number, self._rows_again(number))

    def _check_version(self) -> None:
        marker = self.path / MARKER
        if not marker.is_file():
            raise RolloutFileError(f"path must be a store, got {self.path} without {MARKER}; check the path.")
        try:
            version = json.loads(marker.read_text(encoding="utf-8"))["schema_version"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RolloutFileError(f"path must be a store, got {self.path} with a damaged {MARKER}; copy it again.") from error
        if not (isinstance(version, int) and 1 <= version <= STORE_VERSION):
            raise RolloutFileError(
                f"schema_version must be at most {STORE_VERSION}, got {version} in {marker}; read it with a later flowroll."
            )


def _heads(rollouts: Sequence[Rollout], rewards: Rewards | None, notes: Sequence[str | None] | None) -> list[SampleHead]:
    count = len(rollouts)
    if not 0 < count <= MAX_ROWS:
        raise InvalidRequestError(
            f"rollouts must hold 1 to {MAX_ROWS} rollouts, got {count}; append them in several calls.", field="rollouts"
        )
    by_name = dict(rewards) if isinstance(rewards, Mapping) else {} if rewards is None else {REWARD: rewards}
    for name, values in {**by_name, **({} if notes is None else {"notes": notes})}.items():
        if len(values) != count:
            raise InvalidRequestError(
                f"{name} must have a value for each of the {count} rollouts, got {len(values)}; give None where there is none.",
                field="notes" if values is notes else "rewards",
            )
    now = time.time()
    return [
        SampleHead(
            written_at=now,
            num_bytes=sum(tensor.nbytes for tensor in tensors_of(rollout)),
            rewards={name: _reward(values[row]) for name, values in by_name.items() if values[row] is not None},
            note=None if notes is None else notes[row],
        )
        for row, rollout in enumerate(rollouts)
    ]


def _reward(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise InvalidRequestError(f"rewards must be finite, got {number}; leave out samples that have none.", field="rewards")
    return number


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, as the files already are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
