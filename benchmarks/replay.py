"""What replay costs, on random models.

Replay of one step against the bare transformer forward (and backward) that it contains; and the three ways in which the pairs
of a micro-batch share forwards, side by side.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks.measure import hardware, paired_times, ratio
from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.images import blank_image
from flowroll.engine.loading import LoadedModel, load_model
from flowroll.families import FAMILIES, Guidance, StepInput
from flowroll.testing import Size, make_checkpoint

SIZE = 256
STEP = 1
# Of the second table: the sides of pictures, and how many pairs are run together.
SIDES = (64, 256)
PAIRS = 8
_TABLES = ("forwards", "shared")


def run(rounds: int, families: Sequence[str]) -> Iterator[str]:
    """The lines of a Markdown section: paired ratios for each family, with and without guidance."""
    yield from (
        "## Replay of one step against the forwards that it contains",
        "",
        f"{SIZE}x{SIZE}, float32, 1 thread, {rounds} rounds. Median paired ratio of CPU time with its 95 % interval. The bare",
        "arm calls the transformer with ready arguments; its backward starts from the sum of the output.",
        "",
        "| family | guidance | no_grad: replay / forward | replay and backward / forward and backward |",
        "|---|---|---|---|",
    )
    for family in families:
        for scale in (0.0, 4.0):
            yield _row(family, scale, rounds)
    yield from ("", "Aim: upper bounds of 1.02.", "")


def run_merged(rounds: int, families: Sequence[str], sides: Sequence[int], size: Size) -> Iterator[str]:
    """The lines of a Markdown section: the three ways of a micro-batch, for each family."""
    yield from (
        "## Pairs that share forwards",
        "",
        f"{PAIRS} pairs in one micro-batch (two steps of {PAIRS // 2} samples, guided), forward and backward, {size} models, 1",
        f'thread, {rounds} rounds. `merge="exact"` shares forwards as the engine does, with the recorded log-probs bit for',
        'bit; `merge="fast"` is an ordinary batch. Median CPU time of "alone", and paired ratios to it with their 95 %',
        "interval (below 1: faster). Gradient: norm of the difference from that of alone over its norm. Ratio: largest",
        "|ratio - 1| of the log-probs before any update.",
        "",
        "| family | dtype | side | alone, ms | exact / alone | fast / alone | gradient, exact | gradient, fast | ratio, fast |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for name in families:
        for dtype in ("float32", "bfloat16"):
            for side in sides:
                yield _merged_row(name, dtype, side, rounds, size)


def _rolled_out(
    name: str, folder: Path, side: int, dtype: str, scale: float, count: int = 1, size: Size = "mid"
) -> tuple[list[Rollout], LoadedModel]:
    """A group of a model of this size, and the model as a trainer holds it."""
    checkpoint = folder / name
    if not checkpoint.exists():
        make_checkpoint(name, checkpoint, size=size)
    sizes = {"height": side, "width": side, "num_inference_steps": 2}
    with Engine(checkpoint, dtype=dtype, device="cpu") as engine:
        kept = {"return_denoising_env": True, "return_dit_trajectory": True}
        # A family with one scale takes the second of these, one with two takes both and needs the negative prompt.
        guidance = {"guidance_scale": scale, "true_cfg_scale": scale, "negative_prompt": "blurry"}
        images = (blank_image(),) if engine.info.max_images else None
        request = {"prompt": "a photo of two wine glasses", "seed": 1, "images": images, **guidance, **sizes, **kept}
        rollouts = engine.rollout(**request, num_outputs_per_prompt=count)
    found = examine_checkpoint(checkpoint, variant=None)
    model, _ = load_model(found, device=torch.device("cpu"), dtype=getattr(torch, dtype), mesh=None)
    return rollouts, model


def _merged_row(name: str, dtype: str, side: int, rounds: int, size: Size) -> str:
    with tempfile.TemporaryDirectory() as folder:
        rollouts, model = _rolled_out(name, Path(folder), side, dtype, 4.0, PAIRS // 2, size)
    transformer = model.transformer
    gradients: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}

    def arm(merge: str) -> Callable[[], None]:
        def replayed() -> None:
            transformer.zero_grad()
            (batch,) = replay.micro_batches(transformer, rollouts, micro_batch=PAIRS, merge=merge)
            batch.log_probs.sum().backward()
            errors[merge] = batch.ratio_error

        return replayed

    with warnings.catch_warnings():
        # It is a column of the table.
        warnings.filterwarnings("ignore", message="merge=")
        gc.disable()
        arms = {merge: arm(merge) for merge in ("alone", "exact", "fast")}
        times = paired_times(arms, rounds=rounds)
        gc.enable()
        for merge, replayed in arms.items():
            replayed()
            parts = [weight.grad.double().flatten() for weight in transformer.parameters() if weight.grad is not None]
            gradients[merge] = torch.cat(parts)
    assert errors["alone"] == errors["exact"] == 0
    alone = gradients["alone"]
    off = {merge: float((gradients[merge] - alone).norm() / alone.norm()) for merge in ("exact", "fast")}
    ratios = [ratio(times[merge], times["alone"]) for merge in ("exact", "fast")]
    figures = [
        f"{1000 * statistics.median(times['alone']):.0f}",
        *map(str, ratios),
        f"{off['exact']:.1e}",
        f"{off['fast']:.1e}",
    ]
    return f"| {name} | {dtype} | {side} | {' | '.join(figures)} | {errors['fast']:.1e} |"


def _row(name: str, scale: float, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (rollout,), model = _rolled_out(name, Path(folder), SIZE, "float32", scale)
    transformer, family, one = model.transformer, model.family, _step_input(rollout)

    def bare() -> torch.Tensor:
        outputs = family.run_in_turn(transformer, family.forward_inputs(one, torch.float32))
        return torch.stack([part.sum() for output in outputs for part in output]).sum()

    def ours() -> torch.Tensor:
        return replay.log_prob(transformer, [rollout], steps=[STEP]).sum()

    def without_gradient(arm) -> None:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            arm()

    gc.disable()
    times = paired_times(
        {
            "bare": lambda: without_gradient(bare),
            "ours": lambda: without_gradient(ours),
            "bare backward": lambda: bare().backward(),
            "ours backward": lambda: ours().backward(),
        },
        rounds=rounds,
    )
    gc.enable()
    forward, backward = ratio(times["ours"], times["bare"]), ratio(times["ours backward"], times["bare backward"])
    return f"| {name} | {'on' if scale else 'off'} | {forward} | {backward} |"


def _step_input(rollout: Rollout) -> StepInput:
    """The input of the step's forwards."""
    record, trajectory, env = rollout.sampling, rollout.dit_trajectory, rollout.denoising_env
    family = FAMILIES[record.family]
    assert trajectory is not None and env is not None
    timesteps = family.model_timesteps(trajectory.timesteps, torch.float32)
    guidance = Guidance(rule=record.guidance_rule, scale=record.guidance_scale)
    return StepInput(
        latents=trajectory.latents[STEP], timestep=timesteps[STEP : STEP + 1], env=env, guidance=guidance, is_first=STEP == 0
    )


def main() -> None:
    """Prints the section with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES), help="of the pictures of the second table")
    parser.add_argument("--tables", nargs="+", choices=_TABLES, default=list(_TABLES), help="each takes minutes a row")
    parser.add_argument("--size", choices=get_args(Size), default="mid", help="of the models of the second table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"`python -m benchmarks.replay {' '.join(sys.argv[1:])}`"
    print(f"# The cost of replay\n\nCommand: {command}. {hardware()}; one thread.")
    print("Not claimed: absolute times (the machine is shared), any figure for a GPU, for real weights or for real sizes.\n")
    # Line by line, so that a run that is ended early has shown what it measured.
    if "forwards" in options.tables:
        for line in run(options.rounds, options.families):
            print(line, flush=True)
    if "shared" in options.tables:
        for line in run_merged(options.rounds, options.families, options.sides, options.size):
            print(line, flush=True)


if __name__ == "__main__":
    main()
