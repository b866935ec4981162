"""`flowroll parity`: parallel layouts against one rank, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flowroll.cli.options import Device, Dtype, Model, Variant, quiet_model_libraries
from flowroll.cli.output import format_bytes, plain_table, print_whole
from flowroll.sampling.dynamics import DYNAMICS

if TYPE_CHECKING:
    from flowroll.parity.results import LayoutParity, ParityReport

_DEFAULT = "the family's"


def parity(
    model: Model,
    layouts: Annotated[
        str, typer.Option(help="Products of spN, cfg2 and tpN; single: one rank again.")
    ] = "sp2,cfg2,tp2,sp2xcfg2",
    modes: Annotated[str, typer.Option(help=f"Dynamics: {', '.join(DYNAMICS)}.")] = ",".join(DYNAMICS),
    prompt: Annotated[str, typer.Option(help="The text.")] = "a photo of two wine glasses",
    seed: Annotated[int, typer.Option(help="Of the first sample.")] = 0,
    num_outputs: Annotated[int, typer.Option(help="Samples.")] = 1,
    noise_level: Annotated[float, typer.Option(help="Of the stochastic modes.")] = 0.7,
    size: Annotated[str | None, typer.Option(metavar="WxH|N", help="Pixels.", show_default=_DEFAULT)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default=_DEFAULT)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale.", show_default=_DEFAULT)] = None,
    variant: Variant = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each rank.", show_default="the cores, shared by the most ranks")
    ] = None,
    rank_timeout_s: Annotated[float, typer.Option(help="How long ranks wait for each other, in seconds.")] = 60.0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for parity.md and parity.json.")] = Path("flowroll-parity"),
) -> None:
    """Check that parallel layouts give the bits of one rank.

    Runs one rank and then every layout, each in processes of its own, with the same prompt and seeds, and compares every tensor
    that a rollout returns. Exit status 1 if one is not equal, or if a layout fails.
    """
    quiet_model_libraries()
    from flowroll.parity.plan import ParityOptions, plan_parity
    from flowroll.parity.report import write_report
    from flowroll.parity.run import run_parity

    options = ParityOptions(
        model=model,
        layouts=layouts,
        modes=modes,
        prompt=prompt,
        seed=seed,
        noise_level=noise_level,
        size=size,
        steps=steps,
        guidance_scale=guidance_scale,
        num_outputs=num_outputs,
        variant=variant,
        dtype=dtype,
        device=device,
        threads=threads,
        rank_timeout_s=rank_timeout_s,
    )
    plan = plan_parity(options)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with _progress(console) as progress:
        task = progress.add_task("layouts", total=len(plan.layouts))
        report = run_parity(plan, out, on_layout=lambda _: progress.advance(task))
    files = write_report(report, out)
    print_whole(summary_table(report))
    _print_errors(report)
    console.print(f"report: {files[0]} and {files[1]}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if report.is_exact else 1)


def summary_table(report: ParityReport) -> Table:
    """One row per layout: what was equal, mode by mode."""
    from flowroll.parity.report import mode_cell

    modes = list(dict.fromkeys(mode.mode for layout in report.layouts for mode in layout.modes))
    right = ("ranks", "weights per rank", "received per step")
    columns = ("layout", "ranks", *modes, "weights per rank", "received per step", "result")
    table = plain_table(f"Parity of {report.model} with one rank", *columns, right=right)
    for layout in report.layouts:
        cells = [mode_cell(layout, mode).strip("*") for mode in modes]
        table.add_row(
            layout.layout,
            str(layout.num_ranks),
            *(Text(cell, style="" if cell.startswith("all") else "red") for cell in cells),
            format_bytes(layout.transformer_bytes),
            _received(layout),
            _result(layout),
        )
    return table


def _received(layout: LayoutParity) -> str:
    """Of the first mode; the others receive as much."""
    received = layout.modes[0].received_bytes_per_step if layout.modes else {}
    return ", ".join(f"{axis} {format_bytes(round(count))}" for axis, count in received.items() if count) or "-"


def _result(layout: LayoutParity) -> Text:
    if layout.error is not None:
        return Text("failed", style="bold red")
    idle = f" ({', '.join(layout.idle_axes)} idle)" if layout.idle_axes else ""
    return Text(f"exact{idle}", style="bold green") if layout.is_exact else Text("not exact", style="bold red")


def _print_errors(report: ParityReport) -> None:
    errors = Console(stderr=True)
    for layout in report.layouts:
        if layout.error is not None:
            errors.print(f"{layout.layout} failed: {layout.error}", markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
