"""Ranks with a fault that all of them share, another one for each layout; one rank is healthy.

`broken_ranks.py LAYOUT` is the process of a rank above 0.
"""

import builtins
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowroll.parallel.processes
import flowroll.parallel.regions
import flowroll.sampling.noise
import flowroll.sampling.transition
from flowroll.engine import Engine

SetAttribute = Callable[[Any, str, Any], None]


def permute_keys(setattr: SetAttribute) -> None:
    """Keys and values in another order, the same one: the same attention, but for the order of its sums."""
    gather = flowroll.parallel.regions.gather_keys

    def permuted(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(gathered.flip(1) for gathered in gather(*arguments, **options))

    setattr(flowroll.parallel.regions, "gather_keys", permuted)


def draw_noise_per_shard(setattr: SetAttribute) -> None:
    """Each rank's half of the latents from a generator of its own."""
    draw = flowroll.sampling.noise.step_noise

    def per_shard(seed: int, step: int, shape: torch.Size, **options: Any) -> Tensor:
        half = shape[0] // 2
        parts = (half, shape[0] - half)
        return torch.cat([draw(seed + rank, step, (rows, *shape[1:]), **options) for rank, rows in enumerate(parts)])

    setattr(flowroll.sampling.noise, "step_noise", per_shard)


def round_std(setattr: SetAttribute) -> None:
    """The std rounded to bfloat16 where it meets the noise."""
    sample = flowroll.sampling.transition.sample

    def rounded(transition: Any, *arguments: Any) -> Tensor:
        return sample(replace(transition, std=torch.tensor(transition.std).bfloat16().item()), *arguments)

    setattr(flowroll.sampling.transition, "sample", rounded)


FAULTS = {"sp2": permute_keys, "tp2": draw_noise_per_shard, "cfg2": round_std}


class BrokenEngine(Engine):
    """An engine whose ranks have the fault of their layout."""

    def __init__(self, *arguments: Any, layout: Any, **options: Any) -> None:
        self._faults = pytest.MonkeyPatch()
        if layout.name in FAULTS:
            FAULTS[layout.name](self._faults.setattr)
            command = (sys.executable, __file__, layout.name)
            self._faults.setattr(flowroll.parallel.processes, "worker_command", lambda: command)
        super().__init__(*arguments, layout=layout, **options)

    def close(self) -> None:
        super().close()
        self._faults.undo()


if __name__ == "__main__":
    from flowroll.engine.runner.__main__ import main

    FAULTS[sys.argv[1]](builtins.setattr)
    main()
