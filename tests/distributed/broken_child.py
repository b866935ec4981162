"""A layout's process with a fault that all its ranks share, another one for each layout; one rank is healthy.

`broken_child.py` is the process of a layout, `broken_child.py LAYOUT` a follower in it.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flowroll.parallel.processes
import flowroll.parallel.regions
import flowroll.sampling.noise
import flowroll.sampling.transition
from flowroll.parallel.processes import read_configuration
from flowroll.parity.child import run_layout
from flowroll.parity.exchange import decode_spec


def permute_keys() -> None:
    """Keys and values in another order, the same one: the same attention, but for the order of its sums."""
    gather = flowroll.parallel.regions.gather_keys

    def permuted(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(gathered.flip(1) for gathered in gather(*arguments))

    flowroll.parallel.regions.gather_keys = permuted


def draw_noise_per_shard() -> None:
    """Each rank's half of the latents from a generator of its own."""
    draw = flowroll.sampling.noise.step_noise

    def per_shard(seed: int, step: int, shape: torch.Size, **options: Any) -> Tensor:
        half = shape[0] // 2
        parts = (half, shape[0] - half)
        return torch.cat([draw(seed + rank, step, (rows, *shape[1:]), **options) for rank, rows in enumerate(parts)])

    flowroll.sampling.noise.step_noise = per_shard


def round_std() -> None:
    """The std rounded to bfloat16 where it meets the noise."""
    sample = flowroll.sampling.transition.sample

    def rounded(transition: Any, *arguments: Any) -> Tensor:
        return sample(replace(transition, std=torch.tensor(transition.std).bfloat16().item()), *arguments)

    flowroll.sampling.transition.sample = rounded


FAULTS = {"sp2": permute_keys, "tp2": draw_noise_per_shard, "cfg2": round_std}


def main(*follower: str) -> None:
    if follower:
        from flowroll.engine.runner.__main__ import main as follow

        FAULTS[follower[0]]()
        follow()
        return
    spec = decode_spec(read_configuration())
    if (name := spec.layout.name) in FAULTS:
        FAULTS[name]()
        flowroll.parallel.processes.WORKER_COMMAND = (sys.executable, __file__, name)
    run_layout(spec)


if __name__ == "__main__":
    main(*sys.argv[1:])
