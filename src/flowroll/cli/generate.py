"""`flowroll generate` runs one request in this process, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flowroll.cli.options import Device, Dtype, Model, Variant, quiet_model_libraries
from flowroll.cli.output import print_whole, samples_table, save_png
from flowroll.cli.sampling_flags import with_sampling_flags
from flowroll.types import ALIASES, ROLLOUT_FIELDS, GeneratedImage, Rollout, SamplingParams


# The weights of this command are those that it loads.
@partial(with_sampling_flags, without={"min_weight_version", "lora_name", "policy"}, defaults={"rollout": False})
def generate(
    model: Model,
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path("flowroll-out"),
    variant: Variant = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Make pictures, or with --rollout whole rollouts, of one prompt.

    Writes one PNG per sample, and with --rollout one safetensors file per sample beside it; with --image-format none no PNG.
    """
    if not given.keys() & {"prompt", "prompt_token_ids"}:
        raise typer.BadParameter("--prompt must be given, got nothing; give one prompt, or --prompt-token-ids.")
    is_rollout = given.get("rollout", False)
    misplaced = sorted(name for name in set(given) - {"rollout"} if ALIASES.get(name, name) in ROLLOUT_FIELDS)
    if not is_rollout and misplaced:
        flag = "--" + misplaced[0].replace("_", "-")
        raise typer.BadParameter(f"{flag} must come with --rollout, got plain generation; add --rollout.")
    params = SamplingParams(**{**given, "rollout": is_rollout})
    quiet_model_libraries()
    from flowroll.engine import Engine

    with Engine(model, variant=variant, dtype=dtype, device=device) as engine:
        samples: Sequence[Rollout | GeneratedImage]
        samples = engine.rollout(params) if is_rollout else engine.generate(params)
    files = _write(samples, out)
    print_whole(samples_table(samples, files))


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
