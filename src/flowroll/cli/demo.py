"""`flowroll demo` rolls out the small checkpoints that flowroll ships through the real server, and shows what comes back.

For each family: start `flowroll serve` on its checkpoint, post prompts in groups with three kinds of dynamics, write pictures,
a store of rollouts, a contact sheet and a plot of the log-probs, and stop the server with SIGTERM.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.cli.output import add_row, num_bytes, plain_table, save_png
from flowroll.cli.prompts import read_prompts
from flowroll.examples import server
from flowroll.plots import ContactRow, contact_sheet, plot_log_probs
from flowroll.types import Rollout
from flowroll.types.shown import format_bytes

_STEPS = 8
_PROMPTS = Path(server.__file__).with_name("prompts.txt")
# Label and fields of each request: every step stochastic under either dynamics, and a window of stochastic steps.
_DYNAMICS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sde", {"sde_type": "sde", "noise_level": 0.7}),
    ("cps", {"sde_type": "cps", "noise_level": 0.8}),
    ("sde, steps 1-3", {"sde_type": "sde", "noise_level": 0.7, "sde_step_indices": (1, 2, 3)}),
)
# No pixel of a picture is brighter, or no two differ by more: then there is nothing on it.
_DARK, _FLAT = 0.05, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout of the demo.

    Attributes:
        name: The name of its picture, e.g. "2-sde-seed-43".
        dynamics: The name in the table and the plots.
        rollout: What the server sent.
    """

    name: str
    dynamics: str
    rollout: Rollout


def demo(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for everything that the demo writes.")] = Path("demo-out"),
) -> None:
    """Roll out the checkpoints that flowroll ships through a real server; pictures, plots and rollouts are kept."""
    server.exit_on_sigterm()
    started = time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    prompts = read_prompts(_PROMPTS)
    for index, family in enumerate(SHAPES_FAMILIES):
        own = prompts[index * len(_DYNAMICS) : (index + 1) * len(_DYNAMICS)]
        run_family(family, own, out / family, console)
    say = _plain(console)
    say(f"done in {time.perf_counter() - started:.0f} s; everything is in {out}/. Next:")
    family = SHAPES_FAMILIES[0]
    say(f"  flowroll view {out}/{family}/rollouts                        every sample through its steps, in a browser")
    say(f"  flowroll verify {out}/{family}/rollouts --model shapes-{family}   is each ratio exactly 1?")
    say("  python -m flowroll.examples.flow_grpo --out runs/sde        train on such rollouts, minutes on two cores")


def run_family(family: str, prompts: Sequence[str], out: Path, console: Console) -> None:
    """Serves and rolls out one family's checkpoint; all files go to `out`."""
    say = _plain(console)
    console.rule(f"[bold]{family}")
    checkpoint = shapes_checkpoint(family)
    out.mkdir(parents=True, exist_ok=True)
    say(f"flowroll serve {checkpoint.name} ...")
    with server.running_server(checkpoint, out / "server.log") as running:
        say(f"server {running.url} ready after {running.startup_s:.1f} s; {len(prompts)} groups of 2, {_STEPS} steps ...")
        started = time.perf_counter()
        samples = roll_out(running.url, prompts)
        seconds = time.perf_counter() - started
    say(f"{len(samples)} rollouts in {seconds:.1f} s; SIGTERM, and the server exited 0 after {running.stop_s:.1f} s")
    console.print(table(samples))
    for sample in samples:
        if remark := remark_on(sample.rollout.image):
            say(f"{sample.name}: {remark}")
    write(samples, out, family)
    say(f"{out}/contact_sheet.png, log_probs.png, images/*.png, rollouts/ (a store)\n")


def roll_out(url: str, prompts: Sequence[str]) -> list[Sample]:
    """One request of two samples per prompt, with all that a trainer needs and a picture of what each step predicted."""
    from flowroll.client import Client

    samples = []
    with Client(url) as client:
        for number, (prompt, (dynamics, fields)) in enumerate(zip(prompts, _DYNAMICS, strict=True)):
            for rollout in client.rollout(
                prompt=prompt,
                seed=42,
                num_outputs_per_prompt=2,
                num_inference_steps=_STEPS,
                return_denoising_env=True,
                return_dit_trajectory=True,
                decode_step_indices=tuple(range(_STEPS)),
                **fields,
            ):
                name = f"{number}-{dynamics.replace(',', '').replace(' ', '-')}-seed-{rollout.seed}"
                samples.append(Sample(name=name, dynamics=dynamics, rollout=rollout))
    return samples


def table(samples: Sequence[Sample]) -> Table:
    """One row per sample; "-" where a step has no density."""
    columns = ("prompt", "dynamics", "seed", "log-prob per step", "bytes", "time")
    result = plain_table("Rollouts", *columns, right=("seed", "bytes", "time"))
    for index, sample in enumerate(samples):
        rollout = sample.rollout
        assert rollout.log_probs is not None
        stochastic = rollout.sde_step_indices or ()
        log_probs = [f"{value:+.2f}" if step in stochastic else "-" for step, value in enumerate(rollout.log_probs.tolist())]
        following = samples[index + 1].rollout.prompt if index + 1 < len(samples) else None
        add_row(
            result,
            rollout.prompt or "",
            sample.dynamics,
            str(rollout.seed),
            " ".join(f"{text:>5}" for text in log_probs),
            format_bytes(num_bytes(rollout)),
            f"{rollout.inference_time_s:.2f} s",
            end_section=following != rollout.prompt,
        )
    return result


def remark_on(image: Tensor | bytes | None) -> str | None:
    """Returns what is to be said of a picture on which there is nothing; None: there is something.

    Args:
        image: The picture, float32 in [0, 1].
    """
    if not isinstance(image, Tensor):
        return "there is no picture"
    if image.max() < _DARK:
        return "the picture is black: the steps, or the guidance, took the latents out of their range; try another seed"
    return "the picture has one colour alone; try another seed" if image.max() - image.min() < _FLAT else None


def write(samples: Sequence[Sample], out: Path, family: str) -> None:
    """Writes the pictures, the store, the contact sheet and the plot."""
    from flowroll.store import save_rollouts
    from flowroll.store.rollout_store import is_store

    if is_store(out / "rollouts"):
        # Of an earlier demo, which this one replaces.
        shutil.rmtree(out / "rollouts")
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in samples:
        rollout = sample.rollout
        assert isinstance(rollout.image, Tensor) and rollout.step_images is not None
        save_png(rollout.image, out / "images" / f"{sample.name}.png")
        prompt = textwrap.fill(rollout.prompt or "", width=20)
        pictures = [picture for picture in rollout.step_images.images if isinstance(picture, Tensor)]
        rows.append(ContactRow(label=f"{prompt}\n{sample.dynamics}, seed {rollout.seed}", images=[*pictures, rollout.image]))
    for start in range(0, len(samples), 2):
        save_rollouts(out / "rollouts", [sample.rollout for sample in samples[start : start + 2]])
    series = [(f"{sample.dynamics}, seed {sample.rollout.seed}", sample.rollout) for sample in samples]
    plot_log_probs(series, out / "log_probs.png", title=f"{family}: log-prob per step")
    sigmas = samples[0].rollout.sampling.sigmas[:-1]
    captions = [f"step {step}, sigma {sigma:.2f}" for step, sigma in enumerate(sigmas)] + ["image"]
    contact_sheet(rows, captions, out / "contact_sheet.png", title=f"{family}: what each step predicts, x0 = x - sigma v")


def _plain(console: Console) -> Any:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
