"""What a rehearsal found, as plain numbers: measured anew, or kept in figures.json, which is the budget that tests hold to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rehearsal.flops import STEP_FLOPS
from benchmarks.rehearsal.models import MODELS, Model, make_folder
from benchmarks.rehearsal.run import Rehearsal, rehearsal
from flowroll.types import Layout

RECORDED = Path(__file__).with_name("figures.json")
LAYOUTS = {"1": Layout(), "sp2": Layout(sp=2), "tp2": Layout(tp=2), "cfg2": Layout(cfg_parallel=True)}
# One prompt and one negative prompt of different lengths.
PROMPT, NEGATIVE = "a red fox in fresh snow, morning light, " * 3, "blurry"
STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the rehearsal: a model, its size and its layout.

    Attributes:
        model: The name of the model.
        layers: The most layers of transformer and text encoders; None: all.
        size: Height and width in pixels.
        batch: The number of samples of the group. With all layers, the first one alone takes steps, and the others wait in
            memory: each takes the same forward, by itself.
        layout: The name of the layout.
    """

    model: str
    layers: int | None
    size: int
    batch: int
    layout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a case takes. Bytes are those of rank 0 on its device; a step is that of one image, with guidance.

    Attributes:
        text_tokens: The number of text tokens of each branch.
        kernels: Kernels of a recorded step.
        plain_kernels: Kernels of a step of plain generation.
        views: Operations of a recorded step that run no kernel.
        moved: Bytes that the kernels of a recorded step read and write.
        gathered: Bytes that a recorded step gets from other ranks.
        flops: Floating-point operations of a recorded step.
        expected_flops: What the architecture says of them, on one rank.
        parameters: Parameters of the transformer, on all ranks together.
        transformer: Bytes of the transformer's weights.
        others: Bytes of the other weights.
        rolling: The peak while steps are taken.
        decode: What decoding adds to what lives then.
        updating: The peak while new weights arrive.
        asleep: What stays on the device in sleep.
        pinned: Bytes of the host's pinned memory that sleep takes.
        recorded: Bytes of the host's memory that a group takes at the most, from its start until the answers of the samples
            that take steps are there.
        waits: How often the host waited, by stage.
    """

    text_tokens: tuple[int, ...]
    kernels: int
    plain_kernels: int
    views: int
    moved: int
    gathered: int
    flops: int
    expected_flops: int
    parameters: int
    transformer: int
    others: int
    rolling: int
    decode: int
    updating: int
    asleep: int
    pinned: int
    recorded: int
    waits: dict[str, int]


def measure(case: Case, folder: Path) -> Figures:
    """Rehearses a case.

    Args:
        case: The case.
        folder: A new folder for the checkpoint.
    """
    model = next(one for one in MODELS if one.name == case.model)
    make_folder(model, folder, layers=case.layers)
    stepping = case.batch if case.layers else 1
    with rehearsal(folder, variant=model.variant, layout=LAYOUTS[case.layout], stepping=stepping) as found:
        return take_figures(found, model, case, stepping)


def take_figures(found: Rehearsal, model: Model, case: Case, stepping: int) -> Figures:
    """Takes an engine through its life, and returns what was counted."""
    request = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": 4.0,
        "height": case.size,
        "width": case.size,
        "num_inference_steps": STEPS,
    }
    counts = found.counts
    host = found.meter.host
    rollouts = found.rollouts(case.batch, **request)
    recorded = max(count.host for stage, count in counts.items() if stage != "load") - host
    step, base = counts["step"], found.weights
    taken = stepping * (STEPS - 1)
    per_step = {name: getattr(step, name) // taken for name in ("kernels", "views", "moved", "gathered", "flops")}
    before = step.kernels
    found.generate(**{**request, "num_inference_steps": 1})
    plain = step.kernels - before
    found.replay(rollouts[:1])
    found.update()
    pinned = found.meter.pinned
    asleep = found.sleep()
    pinned = found.meter.pinned - pinned
    found.wake()
    env = rollouts[0].denoising_env
    assert env is not None
    texts = tuple(_num_tokens(branch, model) for branch in (env.pos_cond_kwargs, env.neg_cond_kwargs or {}))
    tokens = (case.size // 16) ** 2
    transformer = sum(parameter.nbytes for parameter in found.transformer.parameters())
    return Figures(
        text_tokens=texts,
        plain_kernels=plain,
        expected_flops=STEP_FLOPS[model.family](found.transformer.config, tokens, texts),
        parameters=found.engine.info.parameters,
        transformer=transformer,
        others=base - transformer,
        rolling=max(counts["first step"].peak, step.peak),
        decode=counts["decode"].peak - base,
        updating=counts["update"].peak,
        asleep=asleep,
        pinned=pinned,
        recorded=recorded,
        waits={stage: sum(count.waits.values()) for stage, count in counts.items() if count.waits},
        **per_step,
    )


def _num_tokens(branch: Any, model: Model) -> int:
    embeds = [value for value in branch.values() if isinstance(value, torch.Tensor) and value.ndim == 2]
    return len(embeds[0])


def read_recorded() -> dict[Case, Figures]:
    """Returns the recorded figures."""
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))
    return {
        Case(**row["case"]): Figures(**{**row["figures"], "text_tokens": tuple(row["figures"]["text_tokens"])}) for row in rows
    }


def write_recorded(figures: Mapping[Case, Figures], path: Path) -> None:
    """Writes figures to a file, a line for each case."""
    rows = [{"case": asdict(case), "figures": asdict(found)} for case, found in figures.items()]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
