"""`flowroll generate` runs one request in this process, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flowroll.cli.options import Compile, Device, Dtype, Model, Variant, quiet_model_libraries
from flowroll.cli.output import print_whole, samples_table, save_png
from flowroll.cli.sampling_flags import with_sampling_flags
from flowroll.types import ALIASES, ROLLOUT_FIELDS, GeneratedImage, Rollout, SamplingParams
from flowroll.types.prompts import ALL_PROMPT_TENSORS, EMBEDS


# The weights of this command are those that it loads.
@partial(
    with_sampling_flags, without={"min_weight_version", "max_staleness", "lora_name", "policy"}, defaults={"rollout": False}
)
def generate(
    model: Model,
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path("flowroll-out"),
    embeds: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="safetensors file with prompt_embeds, and what goes with it, in place of a prompt.",
        ),
    ] = None,
    variant: Variant = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    compile: Compile = False,
) -> None:
    """Make pictures, or with --rollout whole rollouts, of one prompt.

    Writes one PNG per sample, and with --rollout one safetensors file per sample beside it; with --image-format none no PNG.
    """
    given |= {} if embeds is None else _read_embeds(embeds)
    if not given.keys() & {"prompt", "prompt_token_ids", EMBEDS}:
        raise typer.BadParameter("--prompt must be given, got nothing; give one prompt, --prompt-token-ids or --embeds.")
    is_rollout = given.get("rollout", False)
    misplaced = sorted(name for name in set(given) - {"rollout"} if ALIASES.get(name, name) in ROLLOUT_FIELDS)
    if not is_rollout and misplaced:
        flag = "--" + misplaced[0].replace("_", "-")
        raise typer.BadParameter(f"{flag} must come with --rollout, got plain generation; add --rollout.")
    params = SamplingParams(**{**given, "rollout": is_rollout})
    quiet_model_libraries()
    from flowroll.engine import Engine

    with Engine(model, variant=variant, dtype=dtype, device=device, compile=compile) as engine:
        samples: Sequence[Rollout | GeneratedImage]
        samples = engine.rollout(params) if is_rollout else engine.generate(params)
    files = _write(samples, out)
    print_whole(samples_table(samples, files))


def _read_embeds(path: Path) -> dict[str, Any]:
    """Reads the prompts in a file of tensors, which have the names of the fields."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(path)
    except SafetensorError as error:
        raise typer.BadParameter(
            f"--embeds must be a safetensors file, got {path} ({error}); save the tensors again."
        ) from error
    for name in found:
        if name not in ALL_PROMPT_TENSORS:
            known = ", ".join(ALL_PROMPT_TENSORS)
            raise typer.BadParameter(f"--embeds must hold some of {known} alone, got {name[:80]}; rename or remove it.")
    return found


def _write(samples: Sequence[Rollout | GeneratedImage], out: Path) -> list[Path]:
    """Writes every sample, and returns the main file of each."""
    from flowroll.wire.files import save_rollout

    out.mkdir(parents=True, exist_ok=True)
    files = []
    for index, sample in enumerate(samples):
        file = out / f"sample-{index:03d}-seed-{sample.seed}.png"
        if sample.image is not None:
            save_png(sample.image, file)
        if isinstance(sample, Rollout):
            file = file.with_suffix(".safetensors")
            save_rollout(file, sample)
        files.append(file)
    return files
