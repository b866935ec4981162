"""The index: a row for each sample, in parquet files that say in their names which shards they cover.

    index/00000000-00000015.parquet

An append writes a file for its own shard. Sixteen files of one size are joined to one, so that a store of a million samples has
some dozens. A file whose shards another one covers is not read: a kill between writing the joined file and removing its parts
changes nothing. `Ranges` is used for the notes as well, whose files are numbered by themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from flowroll.errors import RolloutFileError
from flowroll.store.shards import SampleHead, Shard
from flowroll.types import Rollout
from flowroll.wire.files import write_whole
from flowroll.wire.messages import WireSample

# Files of one size are joined when there are so many.
_FAN_IN = 16
# A key is the shard's number times this, plus the row.
MAX_ROWS = 4096
_NAME = re.compile(r"(\d{8})-(\d{8})\.parquet")
# How often a reader looks again whose files a writer has joined meanwhile.
_ATTEMPTS = 5
_TEXT = pa.dictionary(pa.int32(), pa.string())
# So many hexadecimal digits of a digest tell a million samples apart.
_DIGITS = 16

SAMPLES = pa.schema(
    [
        ("key", pa.int64()),
        ("request_id", pa.string()),
        ("prompt", _TEXT),
        ("seed", pa.int64()),
        ("weight_version", _TEXT),
        ("family", _TEXT),
        ("variant", _TEXT),
        ("sde_type", _TEXT),
        ("noise_level", pa.float64()),
        ("guidance_scale", pa.float64()),
        ("num_inference_steps", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image_format", _TEXT),
        ("lora", _TEXT),
        ("policy", _TEXT),
        ("mean_log_prob", pa.float64()),
        ("num_bytes", pa.int64()),
        ("written_at", pa.float64()),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("note", pa.string()),
        ("sigmas", _TEXT),
        ("start", pa.string()),
        ("noise", pa.string()),
    ]
)
NOTES = pa.schema([("key", pa.int64()), ("name", _TEXT), ("value", pa.float64()), ("text", pa.string())])


def row_of(key: int, sample: Rollout | WireSample[Any], log_probs: Tensor | None, head: SampleHead) -> dict[str, Any]:
    """Returns the index's row of a sample."""
    record, stochastic = sample.sampling, list(sample.sde_step_indices or ())
    proof = sample.provenance
    noises = [] if proof is None else [one for one in proof.noise_sha256 or () if one is not None]
    has_density = log_probs is not None and stochastic
    return {
        "key": key,
        "request_id": sample.request_id,
        "prompt": sample.prompt,
        "seed": sample.seed,
        "weight_version": sample.weight_version,
        "family": record.family,
        "variant": record.variant,
        "sde_type": record.sde_type,
        "noise_level": record.noise_level,
        "guidance_scale": record.guidance_scale,
        "num_inference_steps": record.num_inference_steps,
        "height": record.height,
        "width": record.width,
        "image_format": record.image_format,
        "lora": None if record.lora is None else record.lora.name,
        "policy": None if record.policy is None else record.policy.name,
        "mean_log_prob": log_probs[stochastic].double().mean().item() if has_density and log_probs is not None else None,
        "num_bytes": head.num_bytes,
        "written_at": head.written_at,
        "rewards": list(head.rewards.items()),
        "note": head.note,
        "sigmas": _short(repr(record.sigmas)),
        "start": None if proof is None or proof.start_sha256 is None else proof.start_sha256[:_DIGITS],
        "noise": _short("".join(noises)) if noises else None,
    }


def _short(text: str) -> str:
    """Returns the first digits of a text's digest."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def rows_of_shard(number: int, shard: Shard) -> list[dict[str, Any]]:
    """Makes the index's rows of a shard from the shard itself, without its large tensors."""
    found = []
    for row in range(len(shard)):
        sample, log_probs = shard.outline(row)
        found.append(row_of(number * MAX_ROWS + row, sample, log_probs, shard.head(row)))
    return found


class Ranges:
    """Parquet files of a folder that cover ranges of numbers. Writers hold the store's lock; readers need none.

    Args:
        folder: The folder.
        schema: The columns of its files.
        missing: Makes the rows of a number that no file covers; None: there are no such numbers.
    """

    def __init__(self, folder: Path, schema: pa.Schema, missing: Callable[[int], list[dict[str, Any]]] | None = None) -> None:
        self._folder, self._schema, self._missing = folder, schema, missing

    def numbers(self) -> set[int]:
        """Returns the numbers that files cover."""
        return {number for first, last, _ in self._whole() for number in range(first, last + 1)}

    def next_number(self) -> int:
        """Returns the number after the last one that a file covers."""
        return max((last for _, last, _ in self._files()), default=-1) + 1

    def add(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the rows of a number, and joins files where it is their turn.

        Raises:
            RolloutFileError: The file cannot be written.
        """
        self._write(number, number, pa.Table.from_pylist(list(rows), schema=self._schema))
        span = _FAN_IN
        while (number + 1) % span == 0:
            self._join(number + 1 - span, number)
            span *= _FAN_IN

    def read(self, numbers: Iterable[int] = (), columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the rows of all numbers in ascending order.

        Args:
            numbers: The numbers that there have to be; the rows of those that no file covers are made again.
            columns: The columns; None: all.

        Raises:
            RolloutFileError: A file is damaged.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return self._read(set(numbers), list(columns or self._schema.names))
            except FileNotFoundError:
                # A writer has joined it to another one since it was listed.
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _read(self, numbers: set[int], columns: list[str]) -> pa.Table:
        parts: list[tuple[int, pa.Table]] = []
        for first, last, path in self._whole():
            numbers -= set(range(first, last + 1))
            parts.append((first, self._table(path, columns)))
        for number in numbers:
            assert self._missing is not None
            table = pa.Table.from_pylist(self._missing(number), schema=self._schema)
            parts.append((number, table.select(columns)))
        parts.sort(key=lambda part: part[0])
        empty = self._schema.empty_table().select(columns)
        return pa.concat_tables([table for _, table in parts] or [empty]).unify_dictionaries()

    def _table(self, path: Path, columns: list[str]) -> pa.Table:
        try:
            file = pq.ParquetFile(path)
            table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        except pa.ArrowInvalid as error:
            raise RolloutFileError(
                f"path must be a whole index file, got {path} ({error}); remove it, the index is then made again."
            ) from error
        # Columns that came after this file was written have no values in it.
        for name in columns:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), self._schema.field(name).type))
        return table.select(columns).cast(pa.schema([self._schema.field(name) for name in columns]))

    def _join(self, first: int, last: int) -> None:
        parts = [part for part in self._whole() if first <= part[0] and part[1] <= last]
        if sum(part[1] - part[0] + 1 for part in parts) < last - first + 1:
            # One is missing; whoever opens the store for writing makes it again.
            return
        self._write(first, last, pa.concat_tables([self._table(path, self._schema.names) for _, _, path in parts]))
        for start, stop, path in list(self._files()):
            if first <= start and stop <= last and (start, stop) != (first, last):
                path.unlink(missing_ok=True)

    def _write(self, first: int, last: int, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table.unify_dictionaries(), sink, compression="zstd")
        write_whole(self._folder / f"{first:08d}-{last:08d}.parquet", [memoryview(sink.getvalue())])

    def _whole(self) -> list[tuple[int, int, Path]]:
        """Returns the files that no other one covers, in ascending order."""
        found: list[tuple[int, int, Path]] = []
        # Of two that begin together the longer one comes first.
        for first, last, path in sorted(self._files(), key=lambda file: (file[0], -file[1])):
            if not found or last > found[-1][1]:
                found.append((first, last, path))
        return found

    def _files(self) -> Iterable[tuple[int, int, Path]]:
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), int(match[2]), path
