"""How many GPUs one address can keep busy, on paper and by simulation: `python -m benchmarks.cluster_model`.

The model has four numbers: image-steps a second of a GPU, steps of a sample, bytes of a sample's answer, and bytes a second
that the address can encode and send. The simulation runs the fleet's own router over replicas that work through what they are
given, in the order in which it came. How long a group takes is drawn from what groups of its size took here, on an engine with
one CPU thread; a GPU is faster by one factor for all of them.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from flowroll import Engine
from flowroll.checkpoints import shapes_checkpoint
from flowroll.cluster.routing import Router
from flowroll.engine import BatchLimits
from flowroll.engine.weights.versions import WeightVersions

# Of Qwen-Image at 1024 x 1024: latents of 4096 tokens and 64 channels, in float32.
_STATE_MIB = 1.0
_PICTURE_MIB = 12.0
STEPS = 28
SIZES = (8, 16, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated fleet has done.

    Attributes:
        busy: The share of the time for which a replica had work, over all replicas.
        image_steps_per_s: Image-steps a second of the fleet.
    """

    busy: float
    image_steps_per_s: float


def sample_mib(num_states: int, *, has_float_picture: bool) -> float:
    """Returns the MiB of a sample's answer: some of its latents, and the picture in float32 or in a byte a value."""
    return num_states * _STATE_MIB + (_PICTURE_MIB if has_float_picture else _PICTURE_MIB / 4)


def measured(rounds: int) -> dict[int, list[float]]:
    """Measures the seconds that groups take on this machine, by their number of samples."""
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    limits = BatchLimits(max_batch_samples=max(SIZES))
    with Engine(shapes_checkpoint("z_image"), device="cpu", batching=limits) as engine:
        for seed in range(rounds + 1):
            for size, seconds in found.items():
                start_s = time.perf_counter()
                engine.rollout("a red circle", seed=seed, num_outputs_per_prompt=size, num_inference_steps=STEPS)
                # Not of the first round, in which kernels are asked.
                if seed:
                    seconds.append(time.perf_counter() - start_s)
    return found


def image_steps_per_s(times: Mapping[int, Sequence[float]]) -> float:
    """Returns the image-steps a second of an engine that has as many groups of each size."""
    return STEPS * sum(times) / sum(fmean(seconds) for seconds in times.values())


def simulate(
    num_replicas: int, *, times: Mapping[int, Sequence[float]], groups_ahead: int, num_groups: int, seed: int = 0
) -> Simulated:
    """Runs groups through the router, so many of them at a time for each replica.

    Args:
        num_replicas: The number of replicas.
        times: The seconds that groups took, by their number of samples; what a group takes is one of them.
        groups_ahead: The groups that callers have under way, for each replica.
        num_groups: The number of groups in all.
        seed: Of sizes and times.
    """
    drawn = random.Random(seed)
    router = Router(WeightVersions(), max_batch_samples=max(times))
    free_at = [0.0] * num_replicas
    for index in range(num_replicas):
        router.join(str(index), version="0", number=0)
    ends: list[tuple[float, int]] = []
    parts, work_s, steps_done, now_s = {}, 0.0, 0, 0.0
    for number in range(num_groups):
        if number >= groups_ahead * num_replicas:
            now_s, ended = heapq.heappop(ends)
            router.release(parts.pop(ended))
        size = drawn.choice(list(times))
        (part,) = router.place(1, size * STEPS)
        index = int(part.replica)
        seconds = drawn.choice(times[size])
        free_at[index] = max(free_at[index], now_s) + seconds
        work_s, steps_done = work_s + seconds, steps_done + size * STEPS
        parts[number] = part
        heapq.heappush(ends, (free_at[index], number))
    end_s = max(free_at)
    return Simulated(busy=work_s / (num_replicas * end_s), image_steps_per_s=steps_done / end_s)


def main() -> None:
    """Prints the table of docs/cluster.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=10.0, help="image-steps a second of a GPU; an assumption")
    parser.add_argument("--rounds", type=int, default=20, help="how many groups of each size are measured")
    parser.add_argument("--address-mib-per-s", type=float, default=500.0, help="what one address encodes and sends")
    options = parser.parse_args()
    kinds = {"all latents, float32 picture": sample_mib(STEPS + 1, has_float_picture=True)}
    kinds["a window of 2 steps, uint8 picture"] = sample_mib(3, has_float_picture=False)
    torch.set_num_threads(1)
    here = measured(options.rounds)
    scale = image_steps_per_s(here) / options.rate
    times = {size: [scale * one for one in seconds] for size, seconds in here.items()}
    for size, seconds in here.items():
        print(f"groups of {size} here: {min(seconds):.2f} to {max(seconds):.2f} s, {fmean(seconds):.2f} s on average")
    for num_gpus in (8, 64, 512):
        found = simulate(num_gpus, times=times, groups_ahead=2, num_groups=max(2000, 40 * num_gpus))
        samples = found.image_steps_per_s / STEPS
        needed = ", ".join(f"{name}: {samples * mib:.0f} MiB/s" for name, mib in kinds.items())
        paper = num_gpus * options.rate
        print(
            f"{num_gpus} GPUs: paper {paper:.0f}, simulated {found.image_steps_per_s:.0f} image-steps/s, busy {found.busy:.3f}"
        )
        addresses = {name: samples * mib / options.address_mib_per_s for name, mib in kinds.items()}
        print(f"  {samples:.1f} samples/s; {needed}; addresses: {', '.join(f'{one:.2f}' for one in addresses.values())}")


if __name__ == "__main__":
    main()
