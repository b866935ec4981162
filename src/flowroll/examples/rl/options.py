"""The options that all training examples share."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowroll.checkpoints import SHAPES_FAMILIES
from flowroll.examples.rl.spoiling import MISTAKES

# The reward of a picture, float32 [3, 1, height, width] in [0, 1], and its prompt.
Reward = Callable[[Tensor, str], float]
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One training run.

    Attributes:
        out: Folder for everything that the run writes.
        family: Whose shapes checkpoint is trained.
        seed: Of prompts, noise and updates.
        rounds: Rollouts, update, push.
        prompts: Per round.
        group_size: Samples of one prompt.
        num_steps: Denoising steps.
        learning_rate: Of AdamW.
        lora_rank: Of the adapter that is trained; None: all weights are.
        evaluate_every: Rounds between evaluations.
        reward: What is rewarded, as "module:function".
        save: Folder for what was learned, written after every round; None: it is not kept.
        resume: Folder that an earlier run saved; this one goes on where that ended. None: from the checkpoint.
        track: Where rewards go besides the CSV file: "tensorboard", "wandb".
        mistake: One of `MISTAKES`, to see that nothing is learned; None: none.
    """

    out: Path
    family: str = "qwen_image"
    seed: int = 0
    rounds: int = 20
    prompts: int = 8
    group_size: int = 8
    num_steps: int = 6
    learning_rate: float = 1e-3
    lora_rank: int | None = None
    evaluate_every: int = 5
    reward: str = "flowroll.examples.shapes.reward:reward"
    save: Path | None = None
    resume: Path | None = None
    track: tuple[str, ...] = ()
    mistake: str | None = None


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The flags of `Options`; `defaults` replace its own."""
    of = {**{name: field.default for name, field in Options.__dataclass_fields__.items()}, **defaults}
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the run writes")
    parser.add_argument("--family", choices=SHAPES_FAMILIES, default=of["family"])
    for name in ("seed", "rounds", "prompts", "group_size", "num_steps", "evaluate_every"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=of[name])
    parser.add_argument("--learning-rate", type=float, default=of["learning_rate"])
    parser.add_argument("--lora-rank", type=int, default=None, help="train a LoRA adapter of this rank; default: all weights")
    parser.add_argument("--reward", default=of["reward"], help="module:function of a picture [3, 1, H, W] and its prompt")
    parser.add_argument("--save", type=Path, default=None, help="folder for what was learned, written after every round")
    parser.add_argument("--resume", type=Path, default=None, help="folder that --save wrote: go on there, bit for bit")
    parser.add_argument("--track", nargs="+", choices=TRACKERS, default=(), help="write the rewards there too")
    parser.add_argument("--mistake", choices=MISTAKES, default=None, help="spoil the run on purpose: it must not learn")


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that the flags of `add_arguments` say."""
    values = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    return Options(**{**values, "track": tuple(values["track"])})


def reward_named(path: str) -> Reward:
    """The function at "module:function".

    Raises:
        SystemExit: There is no such function.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--reward must be module:function, got {path}: {error}.") from error
    if not callable(found):
        raise SystemExit(f"--reward must name a function, got {path}, a {type(found).__name__}.")
    reward: Reward = found
    return reward
