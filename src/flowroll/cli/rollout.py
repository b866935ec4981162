"""`flowroll rollout` sends many prompts to a running server and keeps what comes back in a store."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flowroll.cli.options import DEFAULT_URL, ApiKey, Url
from flowroll.cli.output import progress_bar
from flowroll.cli.prompts import read_requests
from flowroll.cli.sampling_flags import with_sampling_flags

_INTERRUPTED = 130


# A prompt comes from the file; every request has its own id.
@partial(with_sampling_flags, without={"prompt", "request_id", "min_weight_version", "max_staleness"})
def rollout(
    given: dict[str, Any],
    prompts: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='File with one prompt a line; or .jsonl with objects of "prompt" and other fields, which override the flags.',
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the store of rollouts, pictures and manifest.json.")],
    url: Url = DEFAULT_URL,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests in flight.", show_default="as many as fill the server's batch, and one that waits"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run into the same folder ended; make nothing twice.")
    ] = False,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Reward of a picture, float32 [3, 1, height, width] in [0, 1], and its prompt; MODULE may be a .py file.",
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Write a PNG of each sample.")] = True,
    api_key: ApiKey = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for one prompt.")] = 600.0,
) -> None:
    """Roll out every prompt of a file on a server.

    Writes the rollouts to a store, which `flowroll verify` and `flowroll.load_rollouts` read, pictures, and manifest.json,
    which says what became of each prompt. A prompt that fails is reported at the end and the others go on, unless the server
    cannot be reached, refuses the key, or a file cannot be written: then no other prompt is tried. Ctrl-C ends the run with a
    summary; what was made stays, and --resume goes on from there.
    """
    # Every request is checked before anything is imported that takes long, and before the first one is sent.
    requests = read_requests(prompts, given)
    from flowroll.cli.rewards import reward_named
    from flowroll.cli.run import Run, identified
    from flowroll.client import AsyncClient

    score = None if reward is None else reward_named(reward)
    with Run(identified(requests), out, score=score, pngs=png, is_resumed=resume) as run, progress_bar(Console()) as progress:
        task = progress.add_task("rollouts", total=len(requests), completed=run.num_done)
        client = partial(AsyncClient, url, api_key=api_key, timeout_s=timeout_s)
        try:
            asyncio.run(run.go(client, concurrency, lambda: progress.update(task, completed=run.num_done)))
        except KeyboardInterrupt:
            run.is_interrupted = True
    run.write_manifest({"url": url, "prompts": str(prompts), "fields": {name: str(value) for name, value in given.items()}})
    typer.echo(run.summary())
    if failures := run.failure_lines():
        typer.echo("\n  ".join(failures), err=True)
    if run.is_interrupted:
        raise typer.Exit(_INTERRUPTED)
    if failures:
        raise typer.Exit(1)
