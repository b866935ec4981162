"""A group of 16 and 16 requests with texts of their own, beside the diffusers pipeline called for a batch of 16.

`python -m benchmarks.groups`: the shapes checkpoints, which come with flowroll. The pipeline's batch is not exact: its samples
are not those of single calls. Ours are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flowroll.checkpoints
from benchmarks.measure import clock_of, hardware, paired_times, ratio
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_model
from flowroll.types import SamplingParams

RESULTS = Path(__file__).parent / "results"
COUNT = 16
PROMPT = "a green triangle at the top right"
# Of many lengths.
PROMPTS = tuple(
    " ".join(words)
    for words in (
        *(["a", color, shape] for color, shape in (("red", "circle"), ("blue", "square"), ("pink", "circle"))),
        *(["a", "white", "square", *["at the bottom", "left and more"][:count]] for count in range(3)),
        *(PROMPT.split()[:count] for count in range(2, 8)),
        *([PROMPT, *["beside a blue circle"] * count] for count in range(1, 5)),
    )
)
assert len(PROMPTS) == COUNT


def main() -> None:
    """Measures what the flags choose, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--families", nargs="+", choices=["qwen_image", "z_image", "sd3"], default=["qwen_image", "z_image"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"groups_cpu_{today:%Y%m}.md"
    lines = [
        f"# Groups and requests of 16, {today:%Y-%m-%d}",
        "",
        f"Command: `python -m benchmarks.groups {' '.join(sys.argv[1:])}`. {hardware()}; load of the machine at the start: "
        f"{os.getloadavg()[0]:.1f}. Shapes checkpoints, 64x64, 8 steps, guided, {options.rounds} rounds. Medians of paired "
        "ratios of time (CPU time with one thread, wall time with two) with their 95 % intervals. All arms encode, denoise and "
        "decode.",
        "",
        f"Pipeline: diffusers' pipeline with `num_images_per_prompt={COUNT}`, which is not exact. Requests: {COUNT} at once, "
        "of one text and of texts of many lengths.",
        "",
        "Not claimed: absolute times (the machine is shared), any figure for a GPU or for models of real size.",
        "",
        "| family | dtype | threads | pipeline, ms | generate / pipeline | log-probs / pipeline | requests, one text / group "
        "| requests, many lengths / group |",
        "|" + "---|" * 8,
    ]
    for family in options.families:
        for dtype in options.dtypes:
            for threads in options.threads:
                lines.append(row(family, dtype, threads, options.rounds))
                # A long run that is cut off leaves what it has.
                out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def row(family: str, dtype: str, threads: int, rounds: int) -> str:
    """One line of the table."""
    torch.set_num_threads(threads)
    folder = Path(flowroll.checkpoints.__file__).parent / f"shapes-{family}"
    checkpoint = examine_checkpoint(folder, variant=None)
    # As flowroll loads it, which needs no torchvision.
    _, pipeline = load_model(checkpoint, device=torch.device("cpu"), dtype=getattr(torch, dtype), mesh=None)
    pipeline.set_progress_bar_config(disable=True)
    scale = {"true_cfg_scale" if family == "qwen_image" else "guidance_scale": 4.0}
    with Engine(folder, dtype=dtype, device="cpu") as engine:
        group = {"prompt": PROMPT, "seed": 1, "num_outputs_per_prompt": COUNT}

        def batch() -> Any:
            generators = [torch.Generator().manual_seed(seed) for seed in range(1, COUNT + 1)]
            options: dict[str, Any] = {"negative_prompt": " " if family == "qwen_image" else "", **scale}
            return pipeline(
                PROMPT,
                num_images_per_prompt=COUNT,
                generator=generators,
                output_type="pt",
                height=64,
                width=64,
                num_inference_steps=8,
                **options,
            )

        def requests(prompts: tuple[str, ...]) -> Callable[[], object]:
            def ask() -> object:
                plans = [
                    engine.plan(SamplingParams(prompt=prompt, seed=seed, rollout=False))
                    for seed, prompt in enumerate(prompts, 1)
                ]
                return [one.result() for one in [engine.submit(plan, "generate") for plan in plans]]

            return ask

        arms: dict[str, Callable[[], object]] = {
            "pipeline": batch,
            "generate": lambda: engine.generate(**group),
            "log-probs": lambda: engine.rollout(**group),
            "one text": requests((PROMPT,) * COUNT),
            "many lengths": requests(PROMPTS),
        }
        times = paired_times(arms, rounds=rounds, warmup=3, clock=clock_of(threads))
    over = [("generate", "pipeline"), ("log-probs", "pipeline"), ("one text", "generate"), ("many lengths", "generate")]
    figures = [str(ratio(times[one], times[other])) for one, other in over]
    line = f"| {family} | {dtype} | {threads} | {1000 * statistics.median(times['pipeline']):.0f} | {' | '.join(figures)} |"
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
