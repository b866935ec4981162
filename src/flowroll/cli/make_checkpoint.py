"""`flowroll make-checkpoint` makes a checkpoint to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flowroll.cli.options import quiet_model_libraries


def make_checkpoint(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A model family, e.g. z_image; an unknown one lists all.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to save.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    size: Annotated[Literal["tiny", "mid"], typer.Option(help="tiny, or mid with about 100 million parameters.")] = "tiny",
) -> None:
    """Make a checkpoint folder with random weights, offline."""
    quiet_model_libraries()
    from flowroll.testing import make_checkpoint as make

    folder = make(family, directory, seed=seed, size=size)
    typer.echo(f"{family} checkpoint in {folder}")
