"""`save_rollouts` and `load_rollouts`: a store, a folder of files or one file, whatever a path is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from flowroll.errors import InvalidRequestError, RolloutFileError
from flowroll.store.index import NOTES, SAMPLES, row_of
from flowroll.store.rollout_store import RolloutStore, is_store
from flowroll.store.selection import Selection, key_of, select
from flowroll.store.shards import SampleHead
from flowroll.types import Number, Rollout
from flowroll.wire.files import load_outline, load_picture, load_rollout

_SUFFIX = ".safetensors"
# A shard of so many is written at a time.
_AT_ONCE = 256


class RolloutFiles:
    """Rollouts in files of their own, which `Rollout.save` wrote, looked at as those of a store are.

    Their texts are read when it is made, and their tensors when they are asked for. The name of each file is its note.

    Args:
        paths: The files.

    Raises:
        RolloutFileError: A file is missing, damaged, or of a later schema version.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._rows = pa.Table.from_pylist([_row(key, path) for key, path in enumerate(self._paths)], schema=SAMPLES)

    def select(self, **wanted: object) -> Selection:
        """Selects the rollouts that match all that is given; see `RolloutStore.select`."""
        return select(self._rows, NOTES.empty_table(), lambda key: load_rollout(self._paths[key]), wanted)

    def load(self, sample: str) -> Rollout:
        """Reads one rollout, by the id that a `Selection` gives it."""
        return load_rollout(self._path(sample))

    def picture(self, sample: str) -> Tensor | bytes | None:
        """Reads the picture alone of one rollout."""
        return load_picture(self._path(sample))

    def _path(self, sample: str) -> Path:
        if (key := key_of(sample)) >= len(self._paths):
            raise InvalidRequestError(
                f"id must be that of one of the {len(self._paths)} files, got {sample!r}; take it from a Selection.", field="id"
            )
        return self._paths[key]


def open_rollouts(path: str | Path) -> RolloutStore | RolloutFiles:
    """Opens a store, a folder of files or one file to be looked at; nothing is changed.

    Raises:
        RolloutFileError: There are no rollouts, or a file is damaged or of a later schema version.
    """
    source = Path(path)
    return RolloutStore(source, read_only=True) if is_store(source) else RolloutFiles(rollout_files(source))


def _row(key: int, path: Path) -> dict[str, object]:
    sample, log_probs = load_outline(path)
    status = path.stat()
    return row_of(key, sample, log_probs, SampleHead(written_at=status.st_mtime, num_bytes=status.st_size, note=path.name))


def save_rollouts(
    path: str | Path, rollouts: Sequence[Rollout], *, rewards: Sequence[Number | None] | None = None
) -> list[str]:
    """Appends rollouts to the store in a folder, which is made if it is not there; 256 at a time, all of them or none.

    Args:
        path: The folder.
        rollouts: The rollouts.
        rewards: One number for each, where they are known.

    Returns:
        The id of each in the store.

    Raises:
        RolloutFileError: The folder cannot be written to.
    """
    ids = []
    with RolloutStore(path) as store:
        for first in range(0, len(rollouts), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            ids += store.append(list(rollouts[part]), rewards=None if rewards is None else rewards[part])
    return ids


def load_rollouts(path: str | Path) -> Sequence[Rollout]:
    """Reads rollouts: those of a store, of a folder of files, or of one file, which `Rollout.save` wrote.

    Returns:
        A list; of a store, a `Selection`, which reads each rollout when it is asked for.

    Raises:
        RolloutFileError: There are none, or one is damaged or of a later schema version.
    """
    source = Path(path)
    if is_store(source):
        return RolloutStore(source, read_only=True).select()
    return [load_rollout(file) for file in rollout_files(source)]


def named_rollouts(source: Path) -> list[tuple[str, Callable[[], Rollout]]]:
    """Returns what `load_rollouts` reads: the path of each file, or the store's path and an id, and what reads it."""
    if is_store(source):
        store = RolloutStore(source, read_only=True)
        return [(f"{source}:{name}", functools.partial(store.load, name)) for name in store.select().ids]
    return [(str(file), functools.partial(load_rollout, file)) for file in rollout_files(source)]


def rollout_files(source: Path) -> Iterable[Path]:
    """Returns the file that a path is, or the files in the folder that it is, by name.

    Raises:
        RolloutFileError: The folder has none.
    """
    if not source.is_dir():
        return [source]
    files = sorted(source.glob(f"*{_SUFFIX}"))
    if not files:
        raise RolloutFileError(f"path must be a store or hold rollout files, got the folder {source} without any; check it.")
    return files
