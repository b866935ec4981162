"""`save_rollouts` and `load_rollouts`: a store, a folder of files or one file, whatever a path is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flowroll.errors import RolloutFileError
from flowroll.store.rollout_store import RolloutStore, is_store
from flowroll.types import Number, Rollout
from flowroll.wire.files import load_rollout

_SUFFIX = ".safetensors"
# A shard of so many is written at a time.
_AT_ONCE = 256


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


def named_rollouts(source: Path) -> Iterator[tuple[str, Rollout]]:
    """Yields what `load_rollouts` reads, each with the path of its file, or the store's path and its id."""
    if is_store(source):
        chosen = RolloutStore(source, read_only=True).select()
        yield from ((f"{source}:{name}", rollout) for name, rollout in zip(chosen.ids, chosen, strict=True))
    else:
        yield from ((str(file), load_rollout(file)) for file in rollout_files(source))


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
