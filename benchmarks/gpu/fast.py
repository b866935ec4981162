"""The stage that measures the fast mode: each part beside the exact engine, and how far off it is."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.speed import seconds_of
from flowroll.engine import Engine
from flowroll.errors import InvalidRequestError
from flowroll.testing import make_checkpoint

FAMILIES = ("qwen_image", "z_image")
# What each way turns on; the exact engine first, without anything.
WAYS: Mapping[str, Sequence[str] | None] = {
    "exact": None,
    "batch": ("batch",),
    "attention": ("batch", "attention"),
    "compile": ("batch", "compile"),
    "attention and compile": ("batch", "attention", "compile"),
    "fp8": ("batch", "fp8"),
}
SIZE, SAMPLES, STEPS, ROUNDS = 512, 16, 8, 3
TINY = {"SIZE": 64, "SAMPLES": 3, "STEPS": 2, "ROUNDS": 1}


def fast(report: Report, device: torch.device, is_tiny: bool) -> None:
    """Times a group of samples with its log-probs, in every way that the device has."""
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make_checkpoint(family, folder, size="tiny" if is_tiny else "mid")
            for way, parts in WAYS.items():
                what = f"{family}, {way}"
                if device.type == "cpu" and "compile" in (parts or ()):
                    report.skip(what, "a C++ compiler takes minutes")
                    continue
                with report.trying(what):
                    try:
                        _measure(report, what, checkpoint, parts, device, is_tiny=is_tiny)
                    except InvalidRequestError as error:  # a part that is not to be had here
                        report.skip(what, error.message)


def _measure(
    report: Report, what: str, checkpoint: Path, parts: Sequence[str] | None, device: torch.device, *, is_tiny: bool
) -> None:
    size, samples, steps, rounds = TINY.values() if is_tiny else (SIZE, SAMPLES, STEPS, ROUNDS)
    started = time.monotonic()
    options: dict[str, Any] = {} if parts is None else {"exactness": "fast", "fast_parts": parts}
    with Engine(checkpoint, device=str(device), dtype="bfloat16", **options) as engine:
        start_s = time.monotonic() - started
        group = partial(
            engine.rollout,
            "a red circle",
            height=size,
            width=size,
            num_inference_steps=steps,
            num_outputs_per_prompt=samples,
            image_format="none",
        )
        first_s = seconds_of(group, device)
        ms = [1e3 * seconds_of(group, device) / (samples * steps) for _ in range(rounds)]
        mode = engine.info.fast
        report.add(
            what,
            parts=[] if mode is None else list(mode.parts),
            ms_per_image_step=statistics.median(ms),
            start_s=start_s,
            first_group_s=first_s,
            transformer_gib=engine.info.transformer_bytes / 2**30,
            max_log_prob_error=None if mode is None else mode.mismatch.max_log_prob,
            mean_log_prob_error=None if mode is None else mode.mismatch.mean_log_prob,
            max_ratio_error=None if mode is None else mode.mismatch.max_ratio,
        )
