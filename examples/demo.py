"""Rolls out the small checkpoint of each family that flowroll ships through the real server, and shows what comes back.

For each family: start `flowroll serve` on its checkpoint, post prompts in groups with three kinds of dynamics, write pictures,
rollout files, a contact sheet and a plot of the log-probs, and stop the server with SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.server import exit_on_sigterm, running_server
from flowroll import Rollout, SamplingParams
from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.cli.options import quiet_model_libraries
from flowroll.cli.output import add_row, num_bytes, plain_table, save_png, shape_of
from flowroll.cli.prompts import read_prompts
from flowroll.client import Client
from flowroll.engine import Engine
from flowroll.plots import ContactRow, contact_sheet, plot_log_probs
from flowroll.types.shown import format_bytes
from flowroll.wire.files import save_rollout

_FAMILIES = SHAPES_FAMILIES
_STEPS = 8
# Label and fields of each request: every step stochastic under either dynamics, and a window of stochastic steps.
_DYNAMICS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sde", {"sde_type": "sde", "noise_level": 0.7}),
    ("cps", {"sde_type": "cps", "noise_level": 0.8}),
    ("sde, steps 1-3", {"sde_type": "sde", "noise_level": 0.7, "sde_step_indices": (1, 2, 3)}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout of the demo.

    Attributes:
        name: The name of its files, e.g. "2-sde-seed-43".
        dynamics: The name in the table and the plots.
        rollout: What the server sent.
    """

    name: str
    dynamics: str
    rollout: Rollout

    @property
    def label(self) -> str:
        """For plots."""
        return f"{self.dynamics}, seed {self.rollout.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo; exits with a status other than 0 if any part fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything that the demo writes")
    out = parser.parse_args(arguments).out
    exit_on_sigterm()
    started = time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    prompts = read_prompts(Path(__file__).with_name("prompts.txt"))
    quiet_model_libraries()
    torch.set_num_threads(1)
    for index, family in enumerate(_FAMILIES):
        own = prompts[index * len(_DYNAMICS) : (index + 1) * len(_DYNAMICS)]
        run_family(family, own, out / family, console)
    console.print(f"done in {time.perf_counter() - started:.0f} s; everything is in {out}/", highlight=False, markup=False)


def run_family(family: str, prompts: Sequence[str], out: Path, console: Console) -> None:
    """Serves and rolls out one family's checkpoint; all files go to `out`."""
    console.rule(f"[bold]{family}")
    checkpoint = shapes_checkpoint(family)
    out.mkdir(parents=True, exist_ok=True)
    with running_server(checkpoint, out / "server.log") as server:
        console.print(
            f"checkpoint {checkpoint.name}, server {server.url} ready after {server.startup_s:.1f} s",
            highlight=False,
            markup=False,
        )
        started = time.perf_counter()
        samples = roll_out(server.url, prompts)
        seconds = time.perf_counter() - started
    console.print(f"{len(samples)} rollouts in {seconds:.1f} s; SIGTERM, and the server exited 0 after {server.stop_s:.1f} s")
    console.print(table(samples))
    write(samples, checkpoint, out, family)
    console.print(
        f"{out}/contact_sheet.png, log_probs.png, images/*.png, rollouts/*.safetensors\n", highlight=False, markup=False
    )


def roll_out(url: str, prompts: Sequence[str]) -> list[Sample]:
    """One request of two samples per prompt, guided, with everything recorded."""
    samples = []
    with Client(url) as client:
        for number, (prompt, (dynamics, fields)) in enumerate(zip(prompts, _DYNAMICS, strict=True)):
            params = SamplingParams(
                prompt=prompt,
                seed=42,
                num_outputs_per_prompt=2,
                num_inference_steps=_STEPS,
                debug_mode=True,
                return_denoising_env=True,
                return_dit_trajectory=True,
                **fields,
            )
            for rollout in client.rollout(params):
                name = f"{number}-{dynamics.replace(',', '').replace(' ', '-')}-seed-{rollout.seed}"
                samples.append(Sample(name=name, dynamics=dynamics, rollout=rollout))
    return samples


def table(samples: Sequence[Sample]) -> Table:
    """One row per sample."""
    columns = ("prompt", "dynamics", "seed", "log-prob per step", "shapes", "bytes", "time")
    result = plain_table("Rollouts", *columns, right=("seed", "bytes", "time"))
    for column, width in zip(result.columns, (30, 8, 4, 31, 32, 9, 6), strict=True):
        column.max_width = width
    for sample in samples:
        rollout = sample.rollout
        assert rollout.log_probs is not None and rollout.dit_trajectory is not None and rollout.denoising_env is not None
        embeds = next(value for value in rollout.denoising_env.pos_cond_kwargs.values() if isinstance(value, Tensor))
        shapes = {"image": rollout.image, "latents": rollout.dit_trajectory.latents, "embeds": embeds}
        prompt = rollout.prompt if len(rollout.prompt) <= 80 else rollout.prompt[:77] + "..."
        add_row(
            result,
            prompt,
            sample.dynamics,
            str(rollout.seed),
            " ".join(f"{value:+7.3f}" for value in rollout.log_probs.tolist()),
            "\n".join(f"{name} {shape_of(tensor)}" for name, tensor in shapes.items()),
            format_bytes(num_bytes(rollout)),
            f"{rollout.inference_time_s:.2f} s",
            end_section=sample is samples[-1] or samples[samples.index(sample) + 1].rollout.prompt != rollout.prompt,
        )
    return result


def write(samples: Sequence[Sample], checkpoint: Path, out: Path, family: str) -> None:
    """Writes the pictures, the rollout files, the contact sheet and the plot."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "rollouts").mkdir(exist_ok=True)
    for sample in samples:
        save_png(sample.rollout.image, out / "images" / f"{sample.name}.png")
        save_rollout(out / "rollouts" / f"{sample.name}.safetensors", sample.rollout)
    plot_log_probs(
        [(sample.label, sample.rollout) for sample in samples], out / "log_probs.png", title=f"{family}: log-prob per step"
    )
    rows = []
    with Engine(checkpoint) as engine:
        for sample in samples:
            record = sample.rollout.sampling
            pictures = [
                engine.decode(latents, height=record.height, width=record.width)
                for latents in predicted_clean_latents(sample.rollout)
            ]
            rows.append(
                ContactRow(label=f"{sample.dynamics}\nseed {sample.rollout.seed}", images=[*pictures, sample.rollout.image])
            )
    sigmas = samples[0].rollout.sampling.sigmas[:-1]
    captions = [f"step {step}, sigma {sigma:.2f}" for step, sigma in enumerate(sigmas)] + ["image"]
    contact_sheet(rows, captions, out / "contact_sheet.png", title=f"{family}: predicted clean image x0 = x - sigma v")


def predicted_clean_latents(rollout: Rollout) -> Float[Tensor, " steps *latent"]:
    """The clean latents that the model sees at every step: x0_k = x_k - sigma_k v_k, float32.

    Args:
        rollout: A rollout with debug tensors and the whole trajectory.
    """
    assert rollout.debug_tensors is not None and rollout.dit_trajectory is not None
    velocity, trajectory = rollout.debug_tensors.model_output, rollout.dit_trajectory
    latents = trajectory.latents[:-1].to(torch.float32)
    sigmas = trajectory.sigmas[:-1].view(-1, *[1] * (latents.ndim - 1))
    return latents - sigmas * velocity


if __name__ == "__main__":
    main()
