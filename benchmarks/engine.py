"""Engine against the diffusers pipeline itself, on one core and a mid-size random model."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import paired_times, ratio
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.images import blank_image, open_images
from flowroll.engine.loading import load_model
from flowroll.families import FAMILIES
from flowroll.testing import make_checkpoint

CPU = torch.device("cpu")
SIZE, STEPS = 256, 3
PROMPT = "a photo of two wine glasses"


def run(rounds: int, families: Sequence[str] = tuple(FAMILIES)) -> str:
    """A Markdown section: paired ratios of these families."""
    lines = [
        "## Engine against the diffusers pipeline",
        "",
        f"{SIZE}x{SIZE}, {STEPS} steps, no guidance, float32, 1 thread, {rounds} rounds. Median paired ratio of CPU time",
        "with its 95 % interval. Every arm encodes, denoises and decodes.",
        "",
        "| family | parameters | image tokens | rollout=False / pipeline | log-probs only / rollout=False"
        " | everything recorded / rollout=False |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(family, rounds) for family in families]
    lines += ["", "Aims: upper bounds of 1.01, 1.02 and 1.05."]
    return "\n".join(lines)


def _row(family: str, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(family, Path(folder) / family, size="mid")
        # As flowroll loads it, which needs no torchvision.
        _, pipeline = load_model(
            examine_checkpoint(checkpoint, variant=None), device=torch.device("cpu"), dtype=torch.float32, mesh=None
        )
        pipeline.set_progress_bar_config(disable=True)
        engine = Engine(checkpoint, dtype="float32", device="cpu")
    has_true_cfg = "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters
    scale: dict[str, Any] = {"true_cfg_scale": 1.0} if has_true_cfg else {"guidance_scale": 0.0}
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS}
    request = {"prompt": PROMPT, "seed": 1, "guidance_scale": 0.0, **size}
    if engine.info.max_images:
        request["images"], scale["image"] = (blank_image(),), open_images([blank_image()])[0]
    everything = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
    times = paired_times(
        {
            "pipeline": lambda: pipeline(
                prompt=PROMPT, generator=torch.Generator().manual_seed(1), output_type="pt", **scale, **size
            ),
            "plain": lambda: engine.generate(**request),
            "log_probs": lambda: engine.rollout(**request, debug_mode=False),
            "everything": lambda: engine.rollout(**request, **everything),
        },
        rounds=rounds,
    )
    parameters, tokens = engine.info.parameters / 1e6, (SIZE // engine.info.pixel_unit) ** 2
    engine.close()
    plain = times["plain"]
    return (
        f"| {family} | {parameters:.0f} M | {tokens} | {ratio(plain, times['pipeline'])} "
        f"| {ratio(times['log_probs'], plain)} | {ratio(times['everything'], plain)} |"
    )
