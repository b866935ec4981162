"""Shards: several rollouts in one safetensors file, and what was known of each when it was written.

A sample's tensors have its row in front of their names (`3.dit_trajectory.latents`); its text stands under
`flowroll.rollout.3` in the metadata, and its rewards and the time under `flowroll.sample.3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from safetensors import safe_open
from torch import Tensor

from flowroll.errors import RolloutFileError
from flowroll.types import SCHEMA_VERSION, Rollout
from flowroll.wire.files import (
    DAMAGE,
    VERSION_KEY,
    check_version,
    flatten,
    outline,
    own_tensor,
    picture_of,
    unflatten,
    write_tensors,
)
from flowroll.wire.messages import WireSample

_ROWS_KEY, _CONTENT_KEY, _SAMPLE_KEY = "flowroll.rows", "flowroll.rollout.{}", "flowroll.sample.{}"


class SampleHead(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a shard says of a sample beside the rollout itself.

    Attributes:
        written_at: When it was written, in seconds since 1970.
        num_bytes: The bytes of its tensors.
        rewards: Its rewards by name, as they were known then.
        note: Free text.
    """

    written_at: float
    num_bytes: int
    rewards: dict[str, float] = {}
    note: str | None = None


_HEAD = msgspec.json.Decoder(SampleHead)


def write_shard(path: Path, rollouts: Sequence[Rollout], heads: Sequence[SampleHead]) -> None:
    """Writes rollouts to one file, whole or not at all.

    Raises:
        RolloutFileError: The file cannot be written there.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {VERSION_KEY: str(SCHEMA_VERSION), _ROWS_KEY: str(len(rollouts))}
    for row, (rollout, head) in enumerate(zip(rollouts, heads, strict=True)):
        content, found = flatten(rollout, str(row), bytes_apart=True)
        tensors |= found
        metadata[_CONTENT_KEY.format(row)] = content
        metadata[_SAMPLE_KEY.format(row)] = msgspec.json.encode(head).decode()
    write_tensors(path, tensors, metadata)


class Shard:
    """An open shard. It is mapped into memory, and reads what is asked for alone.

    Args:
        path: The file.

    Raises:
        RolloutFileError: The file is missing, damaged, or of a later schema version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._metadata: Mapping[str, str] = self._file.metadata() or {}  # type: ignore[no-untyped-call]
            check_version(path, self._metadata.get(VERSION_KEY))
            self._num_rows = int(self._metadata[_ROWS_KEY])
        except OSError as error:
            raise RolloutFileError(f"path must be a readable shard, got {path} ({error}); copy the store again.") from error
        except DAMAGE as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return self._num_rows

    def rollout(self, row: int) -> Rollout:
        """Reads one rollout, with every tensor bit for bit.

        Raises:
            RolloutFileError: The shard is damaged.
        """
        try:
            return unflatten(self._metadata[_CONTENT_KEY.format(row)], lambda name: own_tensor(self._file, name))
        except DAMAGE as error:
            raise self._damaged(error) from error

    def picture(self, row: int) -> Tensor | bytes | None:
        """Reads the picture alone of one sample; None: nothing was decoded."""
        try:
            return picture_of(outline(self._metadata[_CONTENT_KEY.format(row)]), lambda name: own_tensor(self._file, name))
        except DAMAGE as error:
            raise self._damaged(error) from error

    def head(self, row: int) -> SampleHead:
        """Reads what is known of one sample beside its rollout."""
        try:
            return _HEAD.decode(self._metadata[_SAMPLE_KEY.format(row)])
        except DAMAGE as error:
            raise self._damaged(error) from error

    def outline(self, row: int) -> tuple[WireSample[Any], Tensor | None]:
        """Reads the text of one sample and its log-probs, but none of the large tensors."""
        try:
            sample = outline(self._metadata[_CONTENT_KEY.format(row)])
            log_probs = sample.rollout_log_probs
            return sample, None if log_probs is None else own_tensor(self._file, log_probs.name)
        except DAMAGE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> RolloutFileError:
        return RolloutFileError(
            f"path must be a whole shard, got {self._path} ({error}); it is damaged, copy it again or remove it."
        )
