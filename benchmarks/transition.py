"""One SDE transition with its noise and log-prob, beside a direct evaluation of the published formula."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from benchmarks.measure import paired_times, ratio
from flowroll.sampling import noise, transition
from flowroll.sampling.dynamics import transitions

SHAPE = (4096, 64)
REPEATS = 10
SIGMAS = torch.tensor([0.9, 0.8, 0.0])


def run(rounds: int) -> str:
    """A Markdown section: milliseconds for 1, 4 and 8 samples."""
    lines = [
        f"## One SDE transition, [B, {SHAPE[0]}, {SHAPE[1]}], with noise and log-prob (1 thread, {rounds} rounds of {REPEATS})",
        "",
        "The peer evaluates the published formula as it is written, on the same noise, element by element.",
        "",
        "| B | flowroll, ms (median) | per sample, against B = 1 | formula as written, ms | flowroll / formula |",
        "|---|---|---|---|---|",
    ]
    inputs = {size: (torch.randn(size, *SHAPE), torch.randn(size, *SHAPE)) for size in (1, 4, 8)}
    arms = {}
    for size, (latents, velocity) in inputs.items():
        arms[f"ours {size}"] = lambda latents=latents, velocity=velocity: _repeat(_ours, latents, velocity)
        arms[f"formula {size}"] = lambda latents=latents, velocity=velocity: _repeat(_formula, latents, velocity)
    times = paired_times(arms, rounds=rounds)
    single = statistics.median(times["ours 1"])
    for size in inputs:
        ours, formula = times[f"ours {size}"], times[f"formula {size}"]
        milliseconds = statistics.median(ours) * 1e3 / REPEATS
        linearity = statistics.median(ours) / size / single
        lines.append(
            f"| {size} | {milliseconds:.2f} | {linearity:.2f} | {statistics.median(formula) * 1e3 / REPEATS:.2f} "
            f"| {ratio(ours, formula)} |"
        )
    lines += ["", "Aim: 2 / 8 / 16 ms, linear in B."]
    return "\n".join(lines)


def _repeat(step: object, latents: Tensor, velocity: Tensor) -> None:
    assert callable(step)
    with torch.no_grad():
        for _ in range(REPEATS):
            step(latents, velocity)


def _ours(latents: Tensor, velocity: Tensor) -> None:
    """What the engine does: sample by sample."""
    (this, _) = transitions(SIGMAS, sde_type="sde", noise_level=0.7)
    for row in range(latents.shape[0]):
        mean = transition.mean(this, latents[row], velocity[row])
        drawn = noise.step_noise(row, 0, SHAPE)
        next_latents = transition.sample(this, mean, drawn)
        transition.log_prob(this, next_latents[None], mean[None])


def _formula(latents: Tensor, velocity: Tensor) -> None:
    sigma, sigma_next = SIGMAS[0], SIGMAS[1]
    drawn = torch.stack([noise.step_noise(row, 0, SHAPE) for row in range(latents.shape[0])])
    dt = sigma_next - sigma
    g = torch.sqrt(sigma / (1 - sigma)) * 0.7
    mean = latents * (1 + g**2 / (2 * sigma) * dt) + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    std = g * torch.sqrt(-dt)
    next_latents = mean + std * drawn
    log_prob = -((next_latents - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    log_prob.mean(dim=(1, 2))
