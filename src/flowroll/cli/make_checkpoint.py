"""`flowroll make-checkpoint` makes a checkpoint to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flowroll.cli.options import quiet_model_libraries
from flowroll.errors import CheckpointError, InvalidRequestError


def make_checkpoint(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A model family, e.g. z_image; an unknown one lists all.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to save.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    size: Annotated[Literal["tiny", "mid"], typer.Option(help="tiny, or mid with about 100 million parameters.")] = "tiny",
) -> None:
    """Make a checkpoint folder with random weights, offline.

    DIR must be new or empty: files of an earlier checkpoint would mix with those of this one.
    """
    check_new(directory)
    from flowroll.families import FAMILIES

    # Found before the model libraries are loaded.
    if family not in FAMILIES:
        raise InvalidRequestError(f"family must be one of {', '.join(FAMILIES)}, got {family}; choose one.", field="family")
    quiet_model_libraries()
    from flowroll.testing import make_checkpoint as make

    folder = make(family, directory, seed=seed, size=size)
    typer.echo(f"{family} checkpoint in {folder}")


def check_new(directory: Path) -> None:
    """Refuses a path that is taken by a file, or by a folder that is not empty.

    Raises:
        CheckpointError: It is.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"directory must be a folder or free, got the file {directory}; choose another path.")
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(
            f"directory must be new or empty, got {directory} with files in it; choose another, or remove it first."
        )
