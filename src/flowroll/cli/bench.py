"""`flowroll bench serve`: load on a running server, and how it held up."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from flowroll.cli.options import ApiKey
from flowroll.cli.output import format_bytes, plain_table, print_whole
from flowroll.cli.rollout import read_prompts
from flowroll.errors import InvalidRequestError
from flowroll.types.params import SdeType

if TYPE_CHECKING:
    from rich.table import Table

    from flowroll.loadgen.report import LoadReport

bench = typer.Typer(help="Measure a running server.", no_args_is_help=True, rich_markup_mode=None)


@bench.callback()
def _group() -> None:
    """Measure a running server."""


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="Of the server, e.g. http://127.0.0.1:30000.")],
    prompts: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help='One prompt a line; or .jsonl, objects with a "prompt" key.')
    ],
    rate: Annotated[float | None, typer.Option(help="Open loop: arrivals per second (Poisson).")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests in flight.")] = None,
    num_requests: Annotated[int | None, typer.Option(help="How many to send.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="For how long to start requests, in seconds.")] = None,
    sizes: Annotated[str, typer.Option(metavar="WxH,...", help="Pixels.")] = "512x512",
    steps: Annotated[str, typer.Option(metavar="N,...", help="Denoising steps.")] = "10",
    group_sizes: Annotated[str, typer.Option(metavar="N,...", help="Samples per request.")] = "1",
    dynamics: Annotated[str, typer.Option(metavar="NAME,...", help="sde, cps, ode.")] = "sde",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same requests at the same times.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent first that are not measured.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="How often to send a request again that got 429.")] = 0,
    api_key: ApiKey = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Longest silence of the server, in seconds.")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="File for the figures.")] = None,
) -> None:
    """Send load to a server and measure it.

    Every request draws its prompt, size, steps, samples and dynamics from those given. In the open loop, latency counts from
    the moment a request was due. Exit status 1 if a request failed otherwise than by 429.
    """
    from flowroll.loadgen.plan import Load, Mix
    from flowroll.loadgen.run import run_load

    mix = Mix(
        prompts=tuple(read_prompts(prompts)),
        sizes=tuple(_size(item) for item in sizes.split(",")),
        steps=_integers("steps", steps),
        group_sizes=_integers("group_sizes", group_sizes),
        dynamics=tuple(_dynamics(item) for item in dynamics.split(",")),
        seed=seed,
    )
    load = Load(
        rate=rate,
        concurrency=concurrency,
        num_requests=num_requests,
        duration_s=duration_s,
        warmup=warmup,
        retries=retries,
    )
    report = asyncio.run(run_load(url, mix, load, api_key=api_key, timeout_s=timeout_s))
    if json_file is not None:
        written = {"mix": asdict(mix) | {"prompts": len(mix.prompts)}, "load": asdict(load), "report": asdict(report)}
        json_file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print_whole(report_table(report))
    raise typer.Exit(1 if report.failed else 0)


def report_table(report: LoadReport) -> Table:
    """One figure a row."""
    table = plain_table(f"{report.sent} requests in {report.seconds:.1f} s", "figure", "value", right=("value",))
    for name in ("completed", "rejected", "failed", "rejections"):
        table.add_row(name, str(getattr(report, name)))
    for code, number in report.errors.items():
        table.add_row(f"error {code}", str(number))
    for name, seconds in report.latency_s.items():
        table.add_row(f"latency {name}", f"{seconds:.3f} s")
    for name, value in report.per_second.items():
        table.add_row(f"{name} per second", format_bytes(round(value)) if name == "bytes" else f"{value:.2f}")
    return table


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d{1,6})x(\d{1,6})\s*", text)
    if match is None:
        raise InvalidRequestError(f"sizes must be WxH separated by commas, got {text!r}; write 512x512.", field="sizes")
    return int(match[1]), int(match[2])


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError as error:
        raise InvalidRequestError(
            f"{name} must be integers separated by commas, got {text!r}; write 1,4.", field=name
        ) from error


def _dynamics(text: str) -> Any:
    if text.strip() not in get_args(SdeType):
        raise InvalidRequestError(f"dynamics must be sde, cps or ode, got {text!r}; choose one.", field="dynamics")
    return text.strip()
