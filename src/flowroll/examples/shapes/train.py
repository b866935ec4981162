"""Makes the small policies that flowroll ships: they draw the world's prompts.

    python -m flowroll.examples.shapes.train --family z_image --out shapes-z-image

Same seed, same library versions, same kind of CPU: the same weights. About 10 minutes on one core, which is all it uses.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import Progress

from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import silence_model_libraries
from flowroll.examples.shapes import autoencoder, denoiser
from flowroll.examples.shapes.reward import reward
from flowroll.examples.shapes.world import SCENES
from flowroll.families import family_of_pipeline
from flowroll.testing import make_checkpoint
from flowroll.testing.weights import align_file

_SMOOTHING = 0.98
# Optimizer steps of the autoencoder and of the transformer.
STEPS = {"qwen_image": (700, 5000), "z_image": (500, 2500), "sd3": (500, 2500)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one family's policy and saves it as a checkpoint folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=list(STEPS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    silence_model_libraries()
    # A fixed number: weights depend on it.
    torch.set_num_threads(1)
    console = Console()
    started = time.perf_counter()
    make_checkpoint(options.family, options.out, seed=options.seed, size="shapes")
    checkpoint = examine_checkpoint(options.out, variant=None)
    pipeline = DiffusionPipeline.from_pretrained(options.out, **dict.fromkeys(checkpoint.absent), local_files_only=True)
    for name in checkpoint.text_encoders:
        _keep_bfloat16(getattr(pipeline, name))
    with Progress(console=console) as progress:
        train(pipeline, options.seed, lambda name, total: _bar(progress, name, total))
    save(pipeline, options.out)
    console.print(
        f"{options.family} in {time.perf_counter() - started:.0f} s, {_size(options.out) / 2**20:.2f} MiB", markup=False
    )
    for scale in (0.0, 4.0):
        console.print(f"guidance {scale:g}: mean reward {evaluate(options.out, scale):.3f} over {len(SCENES)} prompts")


def train(pipeline: Any, seed: int, bar: Callable[[str, int], Callable[[int, float], None]]) -> None:
    """Trains the autoencoder and the transformer of a pipeline in place.

    Args:
        pipeline: A pipeline with any weights; its text encoders stay as they are.
        seed: The seed of everything that is drawn.
        bar: Makes the report of a stage from its name and number of steps.
    """
    family = family_of_pipeline(type(pipeline).__name__)
    vae_steps, steps = STEPS[family.name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.vae = type(pipeline.vae).from_config(pipeline.vae.config)
        generator = torch.Generator().manual_seed(seed)
        report = bar("autoencoder", vae_steps)
        autoencoder.train(pipeline.vae, steps=vae_steps, batch=16, generator=generator, report=report)
    generator = torch.Generator().manual_seed(seed)
    denoiser.train(pipeline, family, steps=steps, batch=64, generator=generator, report=bar("transformer", steps))


def save(pipeline: Any, folder: Path) -> None:
    """Saves the pipeline in bfloat16, half the bytes, as a checkpoint of its family's variant "shapes"."""
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        align_file(file)
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        _forget_the_folder(file)
    (folder / "flowroll.json").write_text(json.dumps({"variant": "shapes"}) + "\n")


def _forget_the_folder(file: Path) -> None:
    """Removes from a configuration where its pipeline was loaded from, which is this machine's alone to know."""
    config = json.loads(file.read_text())
    if config.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2) + "\n")


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
