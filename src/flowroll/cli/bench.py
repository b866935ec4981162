"""`flowroll bench serve` puts load on a running server and measures it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from flowroll.cli.options import DEFAULT_URL, ApiKey, Url
from flowroll.cli.output import add_row, plain_table, print_whole, progress_bar
from flowroll.cli.prompts import read_prompts
from flowroll.cli.sampling_flags import with_sampling_flags
from flowroll.errors import InvalidRequestError
from flowroll.sampling.dynamics import DYNAMICS
from flowroll.types.shown import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from flowroll.loadgen import LoadReport, Outcome

# These fields are drawn for each request, belong to a single request, or change the number of steps that is reported.
_NO_FLAG = {
    *("prompt", "width", "height", "num_inference_steps", "num_outputs_per_prompt", "rollout_sde_type", "seed", "seeds"),
    *("request_id", "min_weight_version", "max_staleness", "stop_step", "fork"),
}


def serve(
    given: dict[str, Any],
    prompts: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help='One prompt a line; or .jsonl, objects with a "prompt" key.')
    ],
    url: Url = DEFAULT_URL,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests arrive at this rate per second, as a Poisson process.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: so many requests are in flight at a time.")] = None,
    num_requests: Annotated[int | None, typer.Option(help="Number of requests to send.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Seconds for which new requests are started.")] = None,
    sizes: Annotated[str, typer.Option(metavar="WxH,...", help="Sizes in pixels to draw from.")] = "512x512",
    steps: Annotated[str, typer.Option(metavar="N,...", help="Numbers of denoising steps to draw from.")] = "10",
    group_sizes: Annotated[str, typer.Option(metavar="N,...", help="Numbers of samples per request to draw from.")] = "1",
    dynamics: Annotated[str, typer.Option(metavar="NAME,...", help=f"Dynamics to draw from: {', '.join(DYNAMICS)}.")] = "sde",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same requests at the same times.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests that are sent first and not measured.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often a request that got 429 is sent again.")] = 0,
    max_in_flight: Annotated[
        int,
        typer.Option(
            min=1, help="Open loop: a request that is due while so many are unanswered is not sent and counts as failed."
        ),
    ] = 512,
    wire_format: Annotated[
        Literal["json", "msgpack"], typer.Option(help="Format of the answers. Every server with the API has json.")
    ] = "json",
    api_key: ApiKey = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Seconds for which the server may be silent.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the figures to this file.")] = None,
) -> None:
    """Send load to a server and measure it.

    Any server that has POST /rollout/generate will do; nothing of flowroll's own is needed. Every request draws its prompt,
    size, steps, samples and dynamics from those given, by --seed; all other fields are the same in all of them.

    Give --rate (open loop) or --concurrency (closed loop), and --num-requests or --duration-s. Latency counts from the moment
    a request was due to the last byte of its answer. Time by stage is shown where the answers carry x-flowroll-timing.

    Exit status 1 if a request failed otherwise than by 429.

    Example: flowroll bench serve --url http://127.0.0.1:30000 --prompts prompts.txt --rate 4 --duration-s 60
    --sizes 512x512,768x512 --steps 10,20 --dynamics sde,cps --return-dit-trajectory --json load.json
    """
    if json_file is not None and not json_file.parent.is_dir():
        # Checked before the run, whose figures would be lost.
        raise InvalidRequestError(f"--json must lie in a folder that exists, got {json_file}; make the folder.", field="json")
    from flowroll.loadgen import Load, Mix, run_load

    mix = Mix(
        prompts=tuple(read_prompts(prompts)),
        sizes=tuple(_size(item) for item in sizes.split(",")),
        steps=_integers("steps", steps),
        group_sizes=_integers("group_sizes", group_sizes),
        dynamics=tuple(item.strip() for item in dynamics.split(",")),
        fixed=given,
        seed=seed,
    )
    load = Load(
        rate=rate,
        concurrency=concurrency,
        num_requests=num_requests,
        duration_s=duration_s,
        warmup=warmup,
        retries=retries,
        max_in_flight=max_in_flight,
    )
    # On standard error, because the figures may be redirected.
    console = Console(stderr=True)
    with progress_bar(console, is_shown=console.is_terminal) as progress:
        task, not_ok = progress.add_task("requests", total=num_requests), 0

        def count(outcome: Outcome) -> None:
            nonlocal not_ok
            not_ok += outcome.code != "ok"
            progress.update(task, advance=1, description=f"requests, {not_ok} not ok")

        options: dict[str, Any] = {"api_key": api_key, "wire_format": wire_format, "timeout_s": timeout_s}
        report = asyncio.run(run_load(url, mix, load, on_outcome=count, **options))
    # Printed before the file is written, so that the figures are seen even where that fails.
    print_whole(report_table(report))
    if json_file is not None:
        written = {
            "url": url,
            "wire_format": wire_format,
            # Their number, because a file of prompts can be large.
            "mix": asdict(mix) | {"prompts": len(mix.prompts)},
            "load": asdict(load),
            "report": asdict(report),
        }
        json_file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(1 if report.failed else 0)


bench = typer.Typer(help="Measure a running server.", no_args_is_help=True, rich_markup_mode=None)
bench.command()(with_sampling_flags(serve, without=_NO_FLAG))


@bench.callback()
def _group() -> None:
    """Measure a running server."""


def report_table(report: LoadReport) -> Table:
    """Makes a table with one figure per row."""
    table = plain_table(f"{report.sent} requests in {report.seconds:.1f} s", "figure", "value", right=("value",))
    for name in ("completed", "rejected", "failed", "rejections"):
        add_row(table, name, str(getattr(report, name)))
    for error, number in report.errors.items():
        add_row(table, f"error {error}", str(number))
    for name, seconds in report.latency_s.items():
        add_row(table, f"latency {name}", f"{seconds:.3f} s")
    for stage, figures in report.stages_s.items():
        for name, seconds in figures.items():
            add_row(table, f"{stage} {name}", f"{seconds:.3f} s")
    for name, value in report.per_second.items():
        add_row(table, f"{name} per second", format_bytes(round(value)) if name == "bytes" else f"{value:.2f}")
    return table


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.split("x"))
    except ValueError:
        raise InvalidRequestError(
            f"sizes must be WxH separated by commas, got {text!r}; write 512x512.", field="sizes"
        ) from None
    return width, height


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise InvalidRequestError(
            f"{name} must be integers separated by commas, got {text!r}; write 1,4.", field=name
        ) from None
