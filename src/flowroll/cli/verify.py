"""`flowroll verify` tells whether a checkpoint's weights reproduce saved rollouts bit for bit."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from rich.console import Console
from rich.table import Table

from flowroll.checkpoints import SHAPES, find_checkpoint
from flowroll.cli.options import Device, Variant, quiet_model_libraries
from flowroll.cli.output import plain_table
from flowroll.cli.sampling_flags import read_file
from flowroll.errors import InvalidRequestError
from flowroll.types import DenoisingEnv, EnvValue, Rollout

if TYPE_CHECKING:
    from flowroll.engine.loading import LoadedModel
    from flowroll.replay import AuditReport

T = TypeVar("T")


def verify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE|STORE...", help="Rollouts: stores, folders of safetensors files, or files.")
    ],
    model: Annotated[
        Path,
        typer.Option(
            metavar="MODEL",
            help=f"The diffusers checkpoint folder that made them, or one that flowroll ships: {' or '.join(SHAPES)}.",
            callback=find_checkpoint,
        ),
    ],
    images: Annotated[
        list[str] | None,
        typer.Option(
            parser=read_file,
            metavar="FILE",
            help="A reference image of the rollouts, with which their prompts are encoded again; may be given several times.",
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="N|N%",
            help="Replay so many of the rollouts, or this share of them, drawn at random, always the same ones.",
            show_default="all",
        ),
    ] = None,
    variant: Variant = None,
    device: Device = "auto",
) -> None:
    """Replay saved rollouts with a checkpoint's weights, and say what differs.

    Ends with status 1 unless every log-prob and every recorded velocity comes out bit for bit. Weights, prompts, guidance,
    sigmas, latents and dtypes are told apart. What is odd about the groups of a store is said before, from its index alone.
    """
    from flowroll.store import open_rollouts
    from flowroll.store.files import named_rollouts
    from flowroll.store.findings import group_findings, store_findings

    selections = [open_rollouts(file).select() for file in files]
    for group in itertools.chain.from_iterable(selection.groups() for selection in selections):
        samples = list(group.samples())
        for finding in group_findings(samples):
            typer.echo(f"request {samples[0].request_id} ({len(samples)} samples): {finding}")
    for finding in store_findings(itertools.chain.from_iterable(selection.samples() for selection in selections)):
        typer.echo(finding)
    every = [pair for file in files for pair in named_rollouts(file)]
    named = every if sample is None else drawn(every, sample)
    rollouts = [load() for _, load in named]
    dtype = _only("dtype", [rollout.sampling.model_dtype for rollout in rollouts])
    family = _only("family", [rollout.sampling.family for rollout in rollouts])
    quiet_model_libraries()
    from flowroll.engine.checkpoint import examine_checkpoint
    from flowroll.engine.config import resolve_device, resolve_dtype
    from flowroll.engine.loading import load_model
    from flowroll.replay import audit

    place = resolve_device(device)
    checkpoint = examine_checkpoint(model, variant=variant)
    if checkpoint.family.name != family:
        raise InvalidRequestError(
            f"model must be of the rollouts' family {family}, got {checkpoint.family.name}; give its folder."
        )
    loaded, pipeline = load_model(checkpoint, device=place, dtype=resolve_dtype(dtype.removeprefix("torch."), place))
    files_of = {sha256(file).hexdigest(): file for file in cast("list[bytes]", images or [])}
    report = audit(loaded.transformer, rollouts, encode=lambda rollout: encoded_again(loaded, pipeline, rollout, files_of))
    Console().print(_steps_table(report))
    for index, (name, _) in enumerate(named):
        typer.echo(f"rollout {index}: {name}")
    typer.echo(report)
    if not report.is_exact:
        raise typer.Exit(1)


def drawn(items: Sequence[T], text: str) -> list[T]:
    """Draws some items at random, the same ones each time, in their order; one at least.

    Args:
        items: The items.
        text: How many: a number, or a share in percent, such as "1%".

    Raises:
        InvalidRequestError: The text is neither.
    """
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%")) if share else int(text)
    except ValueError:
        number = math.nan
    if not (0 < number <= 100 if share else number > 0):
        raise InvalidRequestError(f"sample must be a number or a share, got {text}; give 20 or 1%.", field="sample")
    count = math.ceil(len(items) * number / 100) if share else min(int(number), len(items))
    return [items[place] for place in sorted(random.Random(0).sample(range(len(items)), count))]


def encoded_again(model: LoadedModel, pipeline: Any, rollout: Rollout, files_of: Mapping[str, bytes]) -> DenoisingEnv | None:
    """Encodes a rollout's prompts with this model, and returns the resulting env; None if its images are not at hand.

    Args:
        model: The model in memory.
        pipeline: The diffusers pipeline that holds its modules.
        rollout: The rollout.
        files_of: The files of reference images by their SHA-256.
    """
    import torch

    from flowroll.engine.images import open_images
    from flowroll.engine.plan import plan_geometry
    from flowroll.engine.prompts import BranchText
    from flowroll.engine.runner.pipeline import encode_branch

    record = rollout.sampling
    images = record.images or ()
    if any(image.sha256 not in files_of for image in images):
        return None
    pictures = open_images([files_of[image.sha256] for image in images])

    def branch(text: str | None, ids: tuple[tuple[int, ...], ...] | None) -> Mapping[str, EnvValue]:
        with torch.no_grad():
            return encode_branch(model, pipeline, record.variant, BranchText(text=text, token_ids=ids), pictures)

    is_guided = record.negative_prompt is not None or record.negative_prompt_token_ids is not None
    negative = branch(record.negative_prompt, record.negative_prompt_token_ids) if is_guided else None
    geometry = plan_geometry(model, height=record.height, width=record.width, images=images)
    positive = branch(rollout.prompt, record.prompt_token_ids)
    with torch.no_grad():
        latents = model.family.encode_images(pipeline, pictures) if pictures else None
    return model.family.env(positive, negative, geometry, images=latents, embedded=record.embedded_guidance_scale)


def _only(what: str, values: Sequence[str]) -> str:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        raise InvalidRequestError(f"files must be of one {what}, got {', '.join(distinct)}; verify them separately.")
    return distinct[0]


def _steps_table(report: AuditReport) -> Table:
    """Makes a table with one row per step: the errors of the ratio and of the velocity (dv)."""
    right = ("step", "rollouts", "max |ratio-1|", "mean |ratio-1|", "max |dv|")
    table = plain_table("Replay", *right[:2], "exact", *right[2:], right=right)
    for step in report.steps:
        off = step.max_velocity_error
        table.add_row(
            str(step.step),
            str(step.num_samples),
            "yes" if step.is_exact else "no",
            f"{step.max_ratio_error:.3g}",
            f"{step.mean_ratio_error:.3g}",
            "-" if off is None else f"{off:.3g}",
        )
    return table
