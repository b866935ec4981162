"""Makes what the commands print and write: rich tables and PNG pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from flowroll.parity.compare import values_of
from flowroll.types import GeneratedImage, Rollout
from flowroll.types.pictures import encode_png
from flowroll.types.shown import format_bytes

# Wider than any path.
_ANY_WIDTH = 10_000


def save_png(image: Tensor | bytes, path: Path) -> None:
    """Writes a picture as an 8-bit PNG, whichever form it has in a rollout."""
    path.write_bytes(encode_png(image))


def tensors_of(rollout: Rollout) -> list[tuple[str, Tensor]]:
    """Returns every tensor of a rollout with its dotted name."""
    return [(name, value) for name, value in values_of(rollout) if isinstance(value, Tensor)]


def num_bytes(rollout: Rollout) -> int:
    """Counts the bytes of all tensors of a rollout."""
    return sum(tensor.nbytes for _, tensor in tensors_of(rollout))


def shape_of(tensor: Tensor) -> str:
    """Writes a shape, e.g. `11 x 256 x 64`."""
    return " x ".join(map(str, tensor.shape)) or "scalar"


def plain_table(title: str, *columns: str, right: Sequence[str] = (), unbroken: Sequence[str] = ()) -> Table:
    """Makes an empty table; columns in `right` are flushed right, those in `unbroken` never fold."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column in unbroken)
    return table


def print_whole(table: Table) -> None:
    """Prints a table as wide as it is: its names and paths can be copied, and found line by line in redirected output."""
    Console(width=_ANY_WIDTH).print(table)


def progress_bar(console: Console, *, is_shown: bool = True) -> Progress:
    """Makes a bar that shows how many are done, of how many, and how long the rest will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not is_shown,
    )


def add_row(table: Table, *cells: str, end_section: bool = False) -> None:
    """Adds a row of plain text, in which brackets (as in a prompt) are not read as markup."""
    table.add_row(*map(Text, cells), end_section=end_section)


def samples_table(samples: Sequence[Rollout | GeneratedImage], files: Sequence[Path]) -> Table:
    """Makes a table with one row per sample: what it is and where it was written."""
    right = ("sample", "seed", "steps", "log-prob", "seconds")
    table = plain_table("Samples", "sample", "seed", "size", "steps", "log-prob", "seconds", "file", right=right)
    for index, (sample, file) in enumerate(zip(samples, files, strict=True)):
        log_probs = sample.log_probs if isinstance(sample, Rollout) else None
        add_row(
            table,
            str(index),
            str(sample.seed),
            f"{sample.sampling.width} x {sample.sampling.height}",
            str(sample.sampling.num_inference_steps),
            "-" if log_probs is None else f"{log_probs.sum().item():.4f}",
            f"{sample.inference_time_s:.2f}",
            str(file),
        )
    return table


def tensors_table(rollout: Rollout) -> Table:
    """Makes a table of the name, shape, dtype and size of every tensor."""
    table = plain_table("Tensors", "tensor", "shape", "dtype", "size", right=("shape", "size"))
    for name, tensor in tensors_of(rollout):
        add_row(table, name, shape_of(tensor), str(tensor.dtype).removeprefix("torch."), format_bytes(tensor.nbytes))
    return table


def log_probs_table(rollout: Rollout) -> Table:
    """Makes a table with one row per step: its sigmas, the dynamics that it followed and its log-prob."""
    assert rollout.log_probs is not None
    record, stochastic = rollout.sampling, set(rollout.sde_step_indices or ())
    right = ("step", "sigma", "next sigma", "log-prob")
    table = plain_table("Log-probs", "step", "sigma", "next sigma", "dynamics", "log-prob", right=right)
    for step, log_prob in enumerate(rollout.log_probs.tolist()):
        dynamics = record.sde_type if step in stochastic else "deterministic"
        table.add_row(str(step), f"{record.sigmas[step]:.4f}", f"{record.sigmas[step + 1]:.4f}", dynamics, f"{log_prob:+.6f}")
    return table


def record_table(rollout: Rollout) -> Table:
    """Makes a table of what the sample is and how it was made."""
    table = plain_table("Record", "field", "value", unbroken=("field",))
    for name in ("prompt", "seed", "request_id", "weight_version", "inference_time_s", "peak_memory_mb", "sde_step_indices"):
        add_row(table, name, _shown(getattr(rollout, name)))
    for field in fields(rollout.sampling):
        add_row(table, f"sampling.{field.name}", _shown(getattr(rollout.sampling, field.name)))
    return table


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "(empty)"
