"""How fast compiled blocks are beside eager ones: a plain generation and a replay, by the engine and by `replay`.

`python -m benchmarks.compiled`: a random checkpoint of 512 channels and few layers. Each figure is the median of paired
ratios of one round, compiled against eager; the time that compiling takes is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import hardware, paired_times, ratio
from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_model
from flowroll.testing import make_checkpoint


def main() -> None:
    """Prints one line of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="qwen_image_21")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=256, help="of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(options.family, folder, size="mid", num_layers=options.layers)
        eager, eager_replay = arms_of(folder, options.dtype, options.side, compile=False)
        started = time.process_time()
        compiled, compiled_replay = arms_of(folder, options.dtype, options.side, compile=True)
        compiled_replay()
        print(f"compiled in {time.process_time() - started:.0f} s of CPU time, without that of the C++ compiler")
        arms = {"eager": eager, "compiled": compiled, "eager replay": eager_replay, "compiled replay": compiled_replay}
        times = paired_times(arms, rounds=options.rounds)
    print(hardware())
    print("| family | dtype | side | generate, compiled / eager | replay, compiled / eager |")
    found = ratio(times["compiled"], times["eager"]), ratio(times["compiled replay"], times["eager replay"])
    print(f"| {options.family} | {options.dtype} | {options.side} | {found[0]} | {found[1]} |")


def arms_of(folder: str, dtype: str, side: int, *, compile: bool) -> tuple[Callable[[], list[Rollout]], Callable[[], None]]:
    """Returns a rollout of four steps, and its replay with a backward, by an engine and a transformer of the same kernels."""
    engine = Engine(folder, device="cpu", dtype=dtype, compile=compile)

    def roll() -> list[Rollout]:
        return engine.rollout(
            prompt="a red apple",
            height=side,
            width=side,
            num_inference_steps=4,
            seed=5,
            return_denoising_env=True,
            return_dit_trajectory=True,
        )

    rollouts = roll()
    model, _ = load_model(
        examine_checkpoint(Path(folder), variant=None), device=torch.device("cpu"), dtype=getattr(torch, dtype)
    )
    transformer: nn.Module = model.transformer.requires_grad_(True)
    if compile:
        replay.compile_blocks(transformer)

    def replayed() -> None:
        transformer.zero_grad()
        replay.log_prob(transformer, rollouts).sum().backward()

    return roll, replayed


if __name__ == "__main__":
    main()
