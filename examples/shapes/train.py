"""Makes the small policies that flowroll ships: they draw the world's prompts.

    python -m examples.shapes.train --family z_image --out shapes-z-image

Same seed, same library versions and thread count: the same pictures. Minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import Progress

from examples.shapes import autoencoder, denoiser
from examples.shapes.reward import reward
from examples.shapes.world import SCENES
from flowroll.cli.options import quiet_model_libraries
from flowroll.engine import Engine
from flowroll.families import family_of_pipeline
from flowroll.testing import FamilyName, make_checkpoint
from flowroll.testing.weights import align_file

_SMOOTHING = 0.98


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one family's policy and saves it as a checkpoint folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=get_args(FamilyName), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3000, help="of the transformer")
    options = parser.parse_args(arguments)
    quiet_model_libraries()
    console = Console()
    started = time.perf_counter()
    make_checkpoint(options.family, options.out, seed=options.seed, size="shapes")
    pipeline = DiffusionPipeline.from_pretrained(options.out, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    _keep_bfloat16(pipeline.text_encoder)
    family = family_of_pipeline(type(pipeline).__name__)
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]), Progress(console=console) as progress:
        torch.manual_seed(options.seed)
        pipeline.vae = type(pipeline.vae).from_config(pipeline.vae.config)
        report = _bar(progress, "autoencoder", options.vae_steps)
        autoencoder.train(pipeline.vae, steps=options.vae_steps, batch=16, generator=generator, report=report)
        report = _bar(progress, "transformer", options.steps)
        denoiser.train(pipeline, family, steps=options.steps, batch=64, generator=generator, report=report)
    save(pipeline, options.out)
    console.print(
        f"{options.family} in {time.perf_counter() - started:.0f} s, {_size(options.out) / 2**20:.2f} MiB", markup=False
    )
    for scale in (1.0 if options.family == "qwen_image" else 0.0, 4.0):
        console.print(f"guidance {scale:g}: mean reward {evaluate(options.out, scale):.3f} over {len(SCENES)} prompts")


def save(pipeline: Any, folder: Path) -> None:
    """Saves the pipeline in bfloat16, half the bytes, as a checkpoint of its family's variant "shapes"."""
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        align_file(file)
    (folder / "flowroll.json").write_text(json.dumps({"variant": "shapes"}) + "\n")


def evaluate(folder: Path, guidance_scale: float) -> float:
    """Mean reward of one deterministic sample of every prompt."""
    with Engine(folder) as engine:
        return sum(
            reward(engine.generate(prompt=scene.prompt, seed=index, guidance_scale=guidance_scale)[0].image, scene.prompt)
            for index, scene in enumerate(SCENES)
        ) / len(SCENES)


def _keep_bfloat16(module: torch.nn.Module) -> None:
    """Rounds the weights to what the saved checkpoint will hold: the transformer learns the embeddings that it will get."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def _bar(progress: Progress, name: str, total: int) -> Callable[[int, float], None]:
    """Shows a stage's progress; where there is no terminal, a line per tenth of it."""
    task = progress.add_task(name, total=total)
    smoothed: list[float] = []

    def report(step: int, loss: float) -> None:
        smoothed[:] = [loss if not smoothed else _SMOOTHING * smoothed[0] + (1 - _SMOOTHING) * loss]
        progress.update(task, completed=step + 1, description=f"{name}, loss {smoothed[0]:.4f}")
        if not progress.console.is_terminal and (step + 1) % max(1, total // 10) == 0:
            progress.console.print(f"{name}: step {step + 1} of {total}, loss {smoothed[0]:.4f}")

    return report


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
