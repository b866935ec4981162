"""Holds the arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from flowroll.checkpoints import SHAPES, find_checkpoint
from flowroll.extras import extra_for

Model: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help=f"A diffusers checkpoint folder, or one that flowroll ships: {' or '.join(SHAPES)}.",
        callback=find_checkpoint,
    ),
]
Variant: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Variant of the model family, e.g. turbo.", show_default="the folder's flowroll.json, else the family's first"
    ),
]
Dtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Dtype of the weights; auto is bfloat16 on CUDA, float32 on the CPU."),
]
Device: TypeAlias = Annotated[str, typer.Option(help="Device to run on: cpu, cuda, cuda:N, or auto.")]
Compile: TypeAlias = Annotated[
    bool,
    typer.Option("--compile", help="Compile the transformer's blocks: other kernels, exact among themselves; needs one rank."),
]
ExactnessMode: TypeAlias = Annotated[
    Literal["exact", "fast"],
    typer.Option(help="exact, or fast: ordinary batches and faster kernels, whose bits are not those of a sample alone."),
]
FastParts: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="PARTS",
        help="What makes it fast, with commas: batch, attention, compile, fp8.",
        show_default="what the device has of the first three; on a CPU, batch",
    ),
]
DEFAULT_URL = "http://127.0.0.1:30000"
Url: TypeAlias = Annotated[str, typer.Option(help="URL of the server.")]
ApiKey: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Bearer token of the server.", envvar="FLOWROLL_API_KEY", show_envvar=True, show_default=False),
]


def quiet_model_libraries() -> None:
    """Turns the progress bars of diffusers and transformers off, and loads both."""
    with extra_for("A checkpoint", "engine"):
        from flowroll.engine.loading import silence_model_libraries

        silence_model_libraries()
