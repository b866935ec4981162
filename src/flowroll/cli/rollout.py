"""`flowroll rollout` sends many prompts to a running server and writes one file per sample."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flowroll.cli.options import ApiKey
from flowroll.cli.output import progress_bar
from flowroll.cli.prompts import read_requests
from flowroll.cli.sampling_flags import with_sampling_flags
from flowroll.errors import FlowrollError, RolloutFileError, ServerConnectionError, UnauthorizedError

# The next prompt would fare no better.
_HOPELESS = (ServerConnectionError, UnauthorizedError, RolloutFileError)


# A prompt comes from the file; every request has its own id.
@partial(with_sampling_flags, without={"prompt", "request_id", "min_weight_version", "lora_name"})
def rollout(
    given: dict[str, Any],
    url: Annotated[str, typer.Option(help="URL of the server, e.g. http://127.0.0.1:30000.")],
    prompts: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='File with one prompt a line; or .jsonl with objects of "prompt" and other fields, which override the flags.',
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the rollouts.")],
    api_key: ApiKey = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for one prompt.")] = 600.0,
) -> None:
    """Roll out every prompt of a file on a server.

    Writes one safetensors file per sample, with its record. A prompt that fails is reported at the end and the others go on,
    unless the server cannot be reached, refuses the key, or a file cannot be written: then no other prompt is tried.
    """
    from flowroll.client import Client
    from flowroll.wire.files import save_rollout

    # Every request is checked before the first one is sent.
    requests = read_requests(prompts, given)
    out.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    num_samples = num_rolled_out = 0
    with Client(url, api_key=api_key, timeout_s=timeout_s) as client, progress_bar(Console()) as progress:
        for number, params in enumerate(progress.track(requests, description="rollouts"), start=1):
            try:
                for index, sample in enumerate(client.rollout(params)):
                    save_rollout(out / f"prompt-{number:05d}-sample-{index:02d}-seed-{sample.seed}.safetensors", sample)
                    num_samples += 1
            except FlowrollError as error:
                failures.append(f"prompt {number}: {error.message}")
                if isinstance(error, _HOPELESS):
                    break
                continue
            num_rolled_out += 1
    typer.echo(f"{num_samples} rollouts of {num_rolled_out} prompts in {out}")
    if failures:
        untried = len(requests) - num_rolled_out - len(failures)
        summary = f"{len(failures)} of {len(requests)} prompts failed" + (f", {untried} were not tried:" if untried else ":")
        typer.echo("\n  ".join([summary, *failures]), err=True)
        raise typer.Exit(1)
