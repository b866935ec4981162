"""The stages that measure speed and memory: steps, decoding, new weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.models import SEED, Run, build
from benchmarks.gpu.report import Report
from flowroll import replay
from flowroll.engine import Engine
from flowroll.exact import GraphedForwards, PlainBatch, choose_strategy, recorder_for, use_exact_kernels
from flowroll.families import FAMILIES
from flowroll.testing import make_checkpoint

# Pixels of a side, and samples.
CELLS = {
    "qwen_image": ((512, 1), (512, 4), (512, 16), (1024, 1)),
    "z_image": ((512, 1), (1024, 1)),
    "sd3": ((512, 1), (1024, 1)),
}
TINY_CELLS = ((64, 1), (64, 3))
# How many steps are timed, unless they take longer together than so many seconds.
STEPS, CELL_S = 5, 5.0
WARM = 2
# Of recordings; more than a cell takes.
GRAPH_BYTES = 8 * 2**30


def steps(report: Report, device: torch.device, is_tiny: bool, *, family: str) -> None:
    """Times the image-steps of the whole model: exact and plain, eager and compiled."""
    use_exact_kernels(device)
    model = build(family, "transformer", device, is_tiny=is_tiny)
    report.add("model", family=family, parameters=sum(weight.numel() for weight in model.parameters()))
    cells = TINY_CELLS if is_tiny else CELLS[family]
    for size, samples in cells:
        for way in ("exact", "merged", "plain") if samples > 1 else ("exact", "plain"):
            _time(report, model, family, size, samples, way, "eager", device)
    _graphed(report, model, family, cells, device)
    _compiled_exactly(report, model, family, cells, device)
    del model
    with report.trying(f"{family}, plain, compiled"):
        model = build(family, "transformer", device, is_tiny=is_tiny)
        # Stable Diffusion 3's class does not name its blocks.
        lists = (child for child in model.children() if isinstance(child, torch.nn.ModuleList))
        model._repeated_blocks = model._repeated_blocks or sorted({type(block).__name__ for one in lists for block in one})
        model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager" if is_tiny else "inductor")
        for size, samples in cells:
            _time(report, model, family, size, samples, "plain", "compiled", device)


def _graphed(report: Report, model: Any, family: str, cells: Any, device: torch.device) -> None:
    """Times the steps as the engine takes them of small samples: recorded, and replayed."""
    if (recorder := recorder_for(device)) is None:
        report.skip(f"{family}, exact, graphs", "forwards are recorded as graphs on CUDA alone")
        return
    graphs = GraphedForwards(recorder, max_bytes=GRAPH_BYTES)
    for size, samples in cells:
        before = graphs.counts.hits
        _time(report, model, family, size, samples, "exact", "graphs", device, graphs)
        counts = graphs.counts
        report.add(
            f"{family}, graphs, {size} x {size}, {samples} samples",
            recordings=counts.recordings,
            num_bytes=counts.num_bytes,
            replayed=counts.hits - before,
            dropped=dict(counts.dropped),
        )
    graphs.forget()


def _compiled_exactly(report: Report, model: Any, family: str, cells: Any, device: torch.device) -> None:
    with report.trying(f"{family}, exact, compiled"):
        replay.compile_blocks(model)
        for size, samples in cells:
            _time(report, model, family, size, samples, "exact", "compiled", device)


def _time(
    report: Report,
    model: Any,
    name: str,
    size: int,
    samples: int,
    way: str,
    kernels: str,
    device: torch.device,
    graphs: GraphedForwards | None = None,
) -> None:
    """Times the steps of one kind: `exact` as the engine does by default, `merged` in one forward, `plain` as a usual batch."""
    what = f"{name}, {way}, {kernels}, {size} x {size}, {samples} samples"
    family, dtype = FAMILIES[name], torch.bfloat16
    if report.seconds_left < 2 * CELL_S:
        report.skip(what, "no time is left in this stage")
        return
    if way == "plain":
        strategy: Any = PlainBatch(family, dtype)
    else:
        chosen = "merged" if way == "merged" else None
        strategy = choose_strategy(family, device=device, dtype=dtype, name=chosen, graphs=graphs)
    with report.trying(what), torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run = Run(family, model, size, samples, WARM + STEPS, device)
        started = time.monotonic()
        for _ in range(WARM):
            seconds_of(lambda: run.take_step(strategy), device)
        warm_s, seconds = time.monotonic() - started, [seconds_of(lambda: run.take_step(strategy), device)]
        while len(seconds) < STEPS and sum(seconds) < CELL_S:
            seconds.append(seconds_of(lambda: run.take_step(strategy), device))
        ms = [1e3 * one / samples for one in seconds]
        report.add(
            what,
            way=way,
            kernels=kernels,
            strategy=strategy.name,
            size=size,
            samples=samples,
            ms_per_image_step=statistics.median(ms),
            least_ms=min(ms),
            most_ms=max(ms),
            steps=len(ms),
            first_steps_s=warm_s,
            peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        )


def decode(report: Report, device: torch.device, is_tiny: bool) -> None:
    """Times a picture in the decoders of the pipelines."""
    use_exact_kernels(device)
    for name in CELLS:
        with report.trying(name), torch.no_grad():
            vae = build(name, "vae", device, is_tiny=is_tiny)
            # The VAE of the Qwen models is one of videos.
            channels, frames = (vae.config.z_dim, (1,)) if "z_dim" in vae.config else (vae.config.latent_channels, ())
            for size in (64,) if is_tiny else (512, 1024):
                for samples in (1, 4):
                    shape = (samples, channels, *frames, size // 8, size // 8)
                    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(device, torch.bfloat16)
                    found = [seconds_of(partial(vae.decode, latents, return_dict=False), device) for _ in range(4)]
                    ms = 1e3 * statistics.median(found[1:]) / samples
                    report.add(f"{name}, {size} x {size}, {samples} samples", ms_per_picture=ms)


def weights(report: Report, device: torch.device, is_tiny: bool) -> None:
    """GB/s of new weights: the copy in place that the device allows, and the engine's own updates."""
    with report.trying("copies in place"), torch.no_grad():
        model = build("qwen_image", "transformer", device, is_tiny=is_tiny, layers=None if is_tiny else 4)
        own = list(model.parameters())
        for memory in ("pageable", "pinned"):
            if memory == "pinned" and device.type != "cuda":
                report.skip("copies in place from pinned memory", "memory is pinned for CUDA alone")
                continue
            host = [weight.cpu() for weight in own]
            given = [one.pin_memory() for one in host] if memory == "pinned" else host
            num_bytes = sum(one.nbytes for one in own)
            _add_speed(report, f"copies in place from {memory} memory", num_bytes, partial(_copy, own, given), device)
    report.skip("the engine's update in place", "flowroll exchanges a complete second set of weights on the device")
    with report.trying("the engine's updates"), tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint("qwen_image", folder, size="tiny" if is_tiny else "mid")
        with Engine(checkpoint, device=str(device), dtype="bfloat16") as engine:
            state = {name: one.cpu() for name, one in engine._model.transformer.state_dict().items()}
            num_bytes = sum(one.nbytes for one in state.values())
            updates = {
                "from tensors": lambda: engine.update_weights_from_tensors(state),
                "from disk": lambda: engine.update_weights_from_disk(checkpoint),
            }
            for what, update in updates.items():
                _add_speed(report, f"the engine's update {what}", num_bytes, update, device)


def _copy(own: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> None:
    for weight, new in zip(own, given, strict=True):
        weight.copy_(new, non_blocking=True)


def _add_speed(report: Report, what: str, num_bytes: int, action: Callable[[], object], device: torch.device) -> None:
    seconds = statistics.median([seconds_of(action, device) for _ in range(4)][1:])
    report.add(what, num_bytes=num_bytes, gb_per_s=num_bytes / seconds / 1e9)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """The seconds of an action, the device's work included."""
    _synchronize(device)
    started = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
