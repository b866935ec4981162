"""Replay of one step against the bare transformer forward (and backward) that it contains, on a mid-size random model."""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import hardware, paired_times, ratio
from flowroll import Rollout, replay
from flowroll.engine import Engine
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.images import blank_image
from flowroll.engine.loading import load_model
from flowroll.families import FAMILIES, Guidance, StepInput
from flowroll.testing import make_checkpoint

CPU = torch.device("cpu")
SIZE = 256
STEP = 1


def run(rounds: int) -> str:
    """A Markdown section: paired ratios for both families, with and without guidance."""
    lines = [
        "## Replay of one step against the forwards that it contains",
        "",
        f"{SIZE}x{SIZE}, float32, 1 thread, {rounds} rounds. Median paired ratio of CPU time with its 95 % interval. The bare",
        "arm calls the transformer with ready arguments; its backward starts from the sum of the output.",
        "",
        "| family | guidance | no_grad: replay / forward | replay and backward / forward and backward |",
        "|---|---|---|---|",
    ]
    lines += [_row(family, scale, rounds) for family in FAMILIES for scale in (0.0, 4.0)]
    lines += ["", "Aim: upper bounds of 1.02."]
    return "\n".join(lines)


def _row(name: str, scale: float, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(name, Path(folder) / name, size="mid")
        size = {"height": SIZE, "width": SIZE, "num_inference_steps": 2}
        with Engine(checkpoint, dtype="float32", device="cpu") as engine:
            kept = {"return_denoising_env": True, "return_dit_trajectory": True}
            # A family with one scale takes the second of these, one with two takes both and needs the negative prompt.
            guidance = {"guidance_scale": scale, "true_cfg_scale": scale, "negative_prompt": "blurry"}
            images = (blank_image(),) if engine.info.max_images else None
            request = {"prompt": "a photo of two wine glasses", "seed": 1, "images": images, **guidance, **size, **kept}
            (rollout,) = engine.rollout(**request)
        model, _ = load_model(
            examine_checkpoint(checkpoint, variant=None), device=torch.device("cpu"), dtype=torch.float32, mesh=None
        )
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"`python -m benchmarks.replay --rounds {options.rounds}`"
    print(f"# The cost of replay\n\nCommand: {command}. {hardware()}; one thread.")
    print("Not claimed: absolute times (the machine is shared), any figure for a GPU, for real weights or for real sizes.\n")
    print(run(options.rounds))


if __name__ == "__main__":
    main()
