"""The stages that ask whether it is right: the machine, its kernels, the promises."""

from __future__ import annotations

import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.gpu.models import Run, build, component_class
from benchmarks.gpu.report import Report
from benchmarks.gpu.speed import seconds_of
from flowroll import replay
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.exact import FINDINGS, certify, check_shards, choose_strategy, use_exact_kernels
from flowroll.families import FAMILIES
from flowroll.testing import make_checkpoint
from flowroll.types import Layout

MODELS = ("qwen_image", "z_image", "sd3")
PROMPT, OTHER = "a photo of two wine glasses on a table", "a cat"


def machine(report: Report, device: torch.device, is_tiny: bool) -> None:
    """What runs here, and which settings torch has."""
    report.add(
        "host", python=platform.python_version(), cpus=os.cpu_count(), torch=torch.__version__, diffusers=diffusers.__version__
    )
    report.add("kernels", **asdict(kernels := use_exact_kernels(device)), name=kernels.name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report.add("device", name=properties.name, gib=properties.total_memory / 2**30, sms=properties.multi_processor_count)
        free, total = torch.cuda.mem_get_info(device)
        report.add("memory", free_gib=free / 2**30, total_gib=total / 2**30)
    size = 256 if is_tiny else 8192
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = min(seconds_of(lambda: matrix @ matrix, device) for _ in range(10))
    report.add("bfloat16 products", size=size, tflops=2 * size**3 / seconds / 1e12)
    seconds = min(seconds_of(matrix.clone, device) for _ in range(10))
    report.add("copies on the device", size=size, gb_per_s=2 * matrix.nbytes / seconds / 1e9)


def certification(report: Report, device: torch.device, is_tiny: bool) -> None:
    """What the kernels do with the shapes of the real models: samples in one forward, gradients, rows and columns of ranks."""
    kernels = use_exact_kernels(device)
    # Only the shapes are asked for.
    place = device if is_tiny else torch.device("meta")
    for name in MODELS:
        with report.trying(name):
            model = build(name, "transformer", place, is_tiny=is_tiny)
            report.add(name, **asdict(certify(model, kernels, device=device, dtype=torch.bfloat16)))
            columns = FAMILIES[name].parallel_plan.columns
            for layout in (Layout(sp=2), Layout(sp=4), Layout(tp=2)):
                try:
                    check_shards(model, layout, columns, device=device, dtype=torch.bfloat16)
                    report.add(f"{name}, {layout.name}", is_certified=True)
                except InvalidRequestError as error:
                    report.add(f"{name}, {layout.name}", is_certified=False, why=error.message)
    FINDINGS.save(report.path.parent, kernels, device)


def promises(report: Report, device: torch.device, is_tiny: bool) -> None:
    """Alone == in a group == in a mixture, replay with and without gradients, the pipeline; and forwards of real width."""
    for name in MODELS:
        with report.trying(f"{name}, real width"):
            _of_forwards(report, name, device, is_tiny)
        with report.trying(name), tempfile.TemporaryDirectory() as folder:
            _of_engine(report, name, make_checkpoint(name, folder, size="tiny" if is_tiny else "mid"), device)


def _of_forwards(report: Report, name: str, device: torch.device, is_tiny: bool) -> None:
    """Forwards of several samples, and in gradient mode, against those of each sample alone."""
    model = build(name, "transformer", device, is_tiny=is_tiny, layers=None if is_tiny else 2)
    family, dtype = FAMILIES[name], torch.bfloat16
    run = Run(family, model, 64 if is_tiny else 512, 3, 4, device)
    ways = {way: choose_strategy(family, device=device, dtype=dtype, name=way) for way in ("alone", "merged")}  # type: ignore[arg-type]
    with torch.no_grad():
        alone = ways["alone"].velocities(model, run.inputs(1))
        again = ways["alone"].velocities(model, run.inputs(1))
        merged = ways["merged"].velocities(model, run.inputs(1))
    with torch.enable_grad():
        graded = ways["alone"].velocities(model, run.inputs(1)[:1])
    differences = {
        "twice": _largest(again, alone),
        "merged": _largest(merged, alone),
        "with gradients": _largest([one.detach() for one in graded], alone[:1]),
    }
    report.add(f"{name}, real width", is_exact=not any(differences.values()), largest_difference=differences)


def _of_engine(report: Report, name: str, folder: Path, device: torch.device) -> None:
    """The promises of an engine on a checkpoint, through its own doors."""
    size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
    recorded: dict[str, Any] = {"return_dit_trajectory": True, "return_denoising_env": True}
    with Engine(folder, device=str(device), dtype="bfloat16") as engine:
        strategy = engine._model.strategy.name
        (alone,) = engine.rollout(PROMPT, seed=7, **size, **recorded)
        group = engine.rollout(PROMPT, seed=5, num_outputs_per_prompt=4, **size, **recorded)
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(engine.rollout, OTHER, seed=seed, **size) for seed in (1, 2)]
            (mixed,) = pool.submit(engine.rollout, PROMPT, seed=7, **size, **recorded).result()
            for other in others:
                other.result()
        for what, one in (("group", group[2]), ("mixture", mixed)):
            pairs = ((one.dit_trajectory.latents, alone.dit_trajectory.latents), (one.log_probs, alone.log_probs))
            difference = max(_largest([first], [second]) for first, second in pairs)
            report.add(f"{name}, alone == {what}", is_exact=difference == 0, largest_difference=difference, strategy=strategy)
        plain = engine.generate(PROMPT, seed=7, **size)[0].latents
    transformer = component_class(name, "transformer").from_pretrained(folder / "transformer", dtype=torch.bfloat16)  # type: ignore[attr-defined]
    replay.align_weights(transformer.to(device))
    for what, mode in (("without gradients", torch.no_grad), ("with gradients", torch.enable_grad)):
        with mode():
            found = replay.log_prob(transformer, group).detach().cpu()
        error = float((torch.exp(found - torch.stack([one.log_probs for one in group])) - 1).abs().max())
        report.add(f"{name}, replay {what}", is_exact=error == 0, largest_ratio_error=error)
    pipeline = getattr(diffusers, FAMILIES[name].pipeline_classes[0]).from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    guided = {"true_cfg_scale": size["guidance_scale"], "negative_prompt": " "} if name == "qwen_image" else {}
    arguments = {**size, **guided, "generator": torch.Generator(device).manual_seed(7), "output_type": "latent"}
    if guided:
        del arguments["guidance_scale"]
    last: dict[str, Any] = {}
    pipeline.to(device)(PROMPT, **arguments, callback_on_step_end=lambda _, __, ___, tensors: last.update(tensors) or {})
    difference = _largest([plain], [last["latents"][0].cpu()])
    report.add(f"{name}, plain generation == pipeline", is_exact=difference == 0, largest_difference=difference)


def _largest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference; 0 where all bits agree."""
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(found, expected, strict=True))
