"""`flowroll inspect` shows what a rollout file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowroll.cli.output import log_probs_table, print_whole, record_table, tensors_table
from flowroll.plots import plot_log_probs


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A rollout saved as safetensors.")],
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a plot of the log-probs to this PNG file.", show_default=False)
    ] = None,
) -> None:
    """Print the tensors, the log-probs and the record of a saved rollout."""
    from flowroll.wire.files import load_rollout

    rollout = load_rollout(file)
    console = Console()
    print_whole(tensors_table(rollout))
    if rollout.log_probs is not None:
        console.print(log_probs_table(rollout))
    console.print(record_table(rollout))
    if plot is not None:
        plot_log_probs([(f"seed {rollout.seed}", rollout)], plot, title=file.name)
        typer.echo(f"plot: {plot}")
