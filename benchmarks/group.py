"""What exactness costs a group of 16, beside the ordinary batches of the diffusers pipeline and of a trainer.

`python -m benchmarks.group`: the shipped checkpoints at their own size, guided. Each figure is the median of paired ratios
of one round: a group against the pipeline called with `num_images_per_prompt=16`; the same with log-probs; both of an engine in
the fast mode; 16 requests whose prompts differ in length against the group; replay of the group against a trainer's own
batches; and, if it is asked for, samples decoded together by a VAE of the published width against an ordinary batch. Neither
the pipeline's batches nor the trainer's give a sample the bits that it has alone; ours do, but for "fast".
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import inspect
import itertools
import math
import os
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import build
from benchmarks.measure import Ratio, clock_of, hardware, paired_times, ratio
from flowroll import Rollout, replay
from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import LoadedModel, load_model
from flowroll.exact.decoding import SharedDecoding
from flowroll.families.recipe import Recipe
from flowroll.types import SamplingParams

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("qwen_image", "z_image")
SAMPLES = 16
STEPS = 8
SCALE = 4.0
DECODED_SAMPLES, DECODED_SIZE = 4, 128
PROMPT = "a {color} {shape} at the top left"
# Every round has prompts of its own, since those of the last requests are not encoded again.
_DRAWN = tuple(itertools.product(("red", "green", "blue", "yellow", "pink", "white"), ("circle", "square", "triangle")))
# The prompts of separate requests: of as many lengths as there are requests.
PROMPTS = tuple(" ".join(["the", *(3 * PROMPT.split())[1:number]]) for number in range(3, 3 + SAMPLES))

HEAD = (
    "| family | dtype | threads | generate / pipeline | log-probs / pipeline | fast generate / pipeline | "
    "fast log-probs / pipeline | 16 requests / group | load |",
    "|---|---|---|---|---|---|---|---|---|",
)
REPLAYED = (
    "| family | dtype | threads | plain, ms | exact / plain | fast / plain | load |",
    "|---|---|---|---|---|---|---|",
)

DECODED = (
    "| family | dtype | threads | batch, ms | exact / batch | one by one / batch | load |",
    "|---|---|---|---|---|---|---|",
)


def main() -> None:
    """Measures what the flags choose and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--family", nargs="+", choices=SHAPES_FAMILIES, default=list(FAMILIES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=64, help="height and width of the pictures of the first table")
    parser.add_argument("--tables", nargs="+", choices=["rollout", "replay", "decode"], default=["rollout", "replay"])
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"group_cpu_{today:%Y%m}.md"
    sections = [
        f"# What exactness costs a group of {SAMPLES}, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.group {' '.join(sys.argv[1:])}`. {hardware()}; load of the machine in each row. "
        f"Shipped checkpoints, {options.size} x {options.size}, {STEPS} steps, guidance {SCALE}. "
        f"Medians of {options.rounds} paired ratios (CPU time with one thread, wall time with more) with their 95 % "
        "intervals. Every arm of the first table encodes new prompts, "
        f"denoises and decodes; the pipeline is called with `num_images_per_prompt={SAMPLES}`, the requests have prompts of "
        f"{SAMPLES} lengths. Replay is of {SAMPLES} samples x {STEPS} steps in micro-batches of {SAMPLES} pairs, forward and "
        "backward; plain is a batch of all samples at each step, with ready arguments. The last table is of VAEs with the "
        f"published configuration and random weights, {DECODED_SAMPLES} samples of {DECODED_SIZE} x {DECODED_SIZE}.",
        "Not claimed: absolute times (the machine is shared), any figure for a GPU, for real weights or for real sizes.",
    ]
    tables = {"rollout": [*HEAD], "replay": [*REPLAYED], "decode": [*DECODED]}
    rows: dict[str, Callable[[str, str, int, int], str]] = {
        "rollout": functools.partial(rollout_row, size=options.size),
        "replay": replay_row,
        "decode": decode_row,
    }
    for name in options.tables:
        for family in options.family:
            for dtype in options.dtype:
                for threads in options.threads:
                    line = rows[name](family, dtype, threads, options.rounds)
                    print(line, flush=True)
                    tables[name].append(line)
                    # A long run that is cut off leaves what it has.
                    shown = ["\n".join(tables[one]) for one in options.tables]
                    out.write_text("\n\n".join([*sections, *shown]) + "\n", encoding="utf-8")


def rollout_row(family: str, dtype: str, threads: int, rounds: int, *, size: int) -> str:
    """Returns one line of the first table."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    pipeline = loaded(family, dtype)[1]
    pipeline.set_progress_bar_config(disable=True)
    has_true_cfg = "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters
    scale = {"true_cfg_scale": SCALE, "negative_prompt": " "} if has_true_cfg else {"guidance_scale": SCALE}
    sizes = {"height": size, "width": size, "num_inference_steps": STEPS}

    fresh: defaultdict[str, Iterator[tuple[str, str]]] = defaultdict(lambda: itertools.cycle(_DRAWN))

    def filled(arm: str, prompts: Sequence[str]) -> list[str]:
        color, shape = next(fresh[arm])
        return [prompt.format(color=color, shape=shape) for prompt in prompts]

    def batch() -> object:
        (prompt,) = filled("pipeline", [PROMPT])
        seeds = [torch.Generator().manual_seed(seed) for seed in range(SAMPLES)]
        options = {"num_images_per_prompt": SAMPLES, "generator": seeds, "output_type": "pt", **scale, **sizes}
        return pipeline(prompt=prompt, **options)

    opened = functools.partial(Engine, shapes_checkpoint(family), dtype=dtype, device="cpu")
    with opened() as engine, opened(exactness="fast") as fast:
        asked: dict[str, Any] = {"guidance_scale": SCALE, "seed": 0, **sizes}
        group = {"num_outputs_per_prompt": SAMPLES, **asked}
        # The same drawn thing at another place is another prompt.
        recorded = PROMPT.replace("left", "right")

        def requests() -> None:
            separate = [SamplingParams(prompt=one, rollout=False, **asked) for one in filled("requests", PROMPTS)]
            for accepted in [engine.submit(engine.plan(one), "generate") for one in separate]:
                accepted.result()

        def plain(name: str, one: Engine) -> Callable[[], object]:
            return lambda: one.generate(prompt=filled(name, [PROMPT])[0], **group)

        def rolled(name: str, one: Engine) -> Callable[[], object]:
            return lambda: one.rollout(prompt=filled(name, [recorded])[0], debug_mode=False, **group)

        arms: dict[str, Callable[[], object]] = {
            "pipeline": batch,
            "generate": plain("generate", engine),
            "log-probs": rolled("log-probs", engine),
            "fast generate": plain("fast generate", fast),
            "fast log-probs": rolled("fast log-probs", fast),
            "requests": requests,
        }
        times = measured(arms, rounds, threads)
    beside = ("generate", "log-probs", "fast generate", "fast log-probs")
    found = (*(ratio(times[arm], times["pipeline"]) for arm in beside), ratio(times["requests"], times["generate"]))
    return f"| {family} | {dtype} | {threads} | {' | '.join(map(shown, found))} | {load:.1f} |"


def replay_row(family: str, dtype: str, threads: int, rounds: int) -> str:
    """Returns one line of the second table."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    model, _ = loaded(family, dtype)
    transformer = model.transformer
    with Engine(shapes_checkpoint(family), dtype=dtype, device="cpu") as engine:
        rollouts = engine.rollout(
            PROMPT.format(color="red", shape="circle"),
            num_outputs_per_prompt=SAMPLES,
            seed=0,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            debug_mode=False,
            return_denoising_env=True,
            return_dit_trajectory=True,
        )
    errors: dict[str, float] = {}

    def ours(merge: str) -> Callable[[], None]:
        def replayed() -> None:
            transformer.zero_grad()
            for one in replay.micro_batches(transformer, rollouts, micro_batch=SAMPLES, merge=merge):
                one.log_probs.sum().backward()
                errors[merge] = max(errors.get(merge, 0.0), one.ratio_error)

        return replayed

    trainer = plain_trainer(model, rollouts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merge=")
        arms = {"exact": ours("exact"), "fast": ours("fast"), "plain": trainer}
        times = measured(arms, rounds, threads)
    assert errors["exact"] == 0
    found = [ratio(times[name], times["plain"]) for name in ("exact", "fast")]
    each = 1000 * statistics.median(times["plain"])
    return f"| {family} | {dtype} | {threads} | {each:.0f} | {' | '.join(map(shown, found))} | {load:.1f} |"


def decode_row(family: str, dtype: str, threads: int, rounds: int) -> str:
    """Returns one line of the third table."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    vae = build(family, "vae", torch.device("cpu"), is_tiny=False).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    side = DECODED_SIZE // 8
    frames = (1,) if family == "qwen_image" else ()
    cells = [torch.randn(1, 16, *frames, side, side, generator=generator).to(vae.dtype) for _ in range(DECODED_SAMPLES)]
    batch = torch.cat(cells)
    shared = SharedDecoding(vae.decode, vae.parameters)

    def one_by_one() -> list[Tensor]:
        return [vae.decode(one, return_dict=False)[0] for one in cells]

    with torch.no_grad():
        arms: dict[str, Callable[[], object]] = {
            "batch": lambda: vae.decode(batch, return_dict=False),
            "exact": lambda: shared.decode(cells),
            "one by one": one_by_one,
        }
        times = measured(arms, rounds, threads)
        assert all(map(torch.equal, shared.decode(cells), one_by_one()))
    found = [ratio(times[name], times["batch"]) for name in ("exact", "one by one")]
    each = 1000 * statistics.median(times["batch"])
    return f"| {family} | {dtype} | {threads} | {each:.0f} | {' | '.join(map(shown, found))} | {load:.1f} |"


def plain_trainer(model: LoadedModel, rollouts: Sequence[Rollout]) -> Callable[[], None]:
    """Runs forward and backward of every step as a trainer does: a batch of all samples, with arguments made before."""
    family, transformer, record = model.family, model.transformer, rollouts[0].sampling
    recipe = Recipe.of(record, family, sde_step_indices=rollouts[0].sde_step_indices, device="cpu")
    states = torch.stack([one.dit_trajectory.latents for one in rollouts], dim=1)  # type: ignore[union-attr]
    calls = []
    for step in range(STEPS):
        own = [
            family.forward_inputs(recipe.step_input(latents, step, one.denoising_env), recipe.dtype)  # type: ignore[arg-type]
            for latents, one in zip(states[step], rollouts, strict=True)
        ]
        calls.append([family.collate(column) for column in zip(*own, strict=True)])

    def velocity(step: int) -> Tensor:
        outputs = [family.run(transformer, call) for call in calls[step]]
        if len(outputs) == 2:
            return family.guide(outputs[0], outputs[1], SCALE)  # type: ignore[attr-defined, no-any-return]
        # A pair of branches for each sample.
        branches = torch.stack(list(outputs[0])).float().unflatten(0, (SAMPLES, 2)).unbind(1)
        return -family.guide(list(branches), SCALE).squeeze(2)  # type: ignore[attr-defined, no-any-return]

    def train() -> None:
        transformer.zero_grad()
        for step, this in enumerate(recipe.transitions):
            mean = states[step].float() * this.on_latents + velocity(step).float() * this.on_velocity
            squares = (states[step + 1].float() - mean).square().flatten(1).mean(1)
            log_probs = -squares / (2 * this.std**2) - math.log(this.std) - 0.5 * math.log(2 * math.pi)
            log_probs.sum().backward()
            off = torch.stack([one.log_probs[step] for one in rollouts]) - log_probs.detach()  # type: ignore[index]
            assert off.abs().max() < 0.1, "the plain trainer must compute the same"

    return train


def loaded(family: str, dtype: str) -> tuple[LoadedModel, Any]:
    """A model as a trainer holds it, and its diffusers pipeline."""
    found = examine_checkpoint(shapes_checkpoint(family), variant=None)
    return load_model(found, device=torch.device("cpu"), dtype=getattr(torch, dtype), mesh=None)


def measured(arms: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Measures the seconds of every arm in every round, after two rounds in which forwards are analyzed."""
    gc.collect()
    gc.disable()
    try:
        return paired_times(arms, rounds=rounds, warmup=2, clock=clock_of(threads))
    finally:
        gc.enable()


def shown(found: Ratio) -> str:
    """A ratio in few digits."""
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
