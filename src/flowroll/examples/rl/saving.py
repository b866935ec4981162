"""What a run has learned, in a folder: a checkpoint that can be served, and all that the run needs to go on bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from flowroll.examples.rl.options import Options

_STATE = "training_state.pt"
# What a run that goes on must have in common with the one that was saved; how long it goes on is its own business.
_KEPT = ("family", "seed", "prompts", "group_size", "num_steps", "learning_rate", "lora_rank", "reward", "mistake")


def save(folder: Path, checkpoint: Path, policy: nn.Module, state: dict[str, Any], options: Options) -> None:
    """Writes a checkpoint folder with the policy's transformer, or its adapter beside the checkpoint's, and the state.

    An earlier folder is replaced only when the new one is complete.
    """
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(checkpoint, new)
    if isinstance(policy, peft.PeftModel):
        policy.save_pretrained(str(new / "adapter"))
    else:
        shutil.rmtree(new / "transformer")
        policy.save_pretrained(new / "transformer")  # type: ignore[operator]
    kept = {name: value for name, value in asdict(options).items() if name in _KEPT}
    torch.save({**state, "options": kept, "policy": policy.state_dict()}, new / _STATE)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def load(folder: Path, policy: nn.Module, options: Options) -> dict[str, Any]:
    """Puts a saved policy's weights into this one, and returns the state.

    Raises:
        SystemExit: There is no saved run, or it is of other options.
    """
    path = folder / _STATE
    if not path.is_file():
        raise SystemExit(f"--resume must be a folder that --save has written, got {folder} without {_STATE}.")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    for name, value in state.pop("options").items():
        if getattr(options, name) != value:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"{flag} must be {value} to go on with {folder}, got {getattr(options, name)}.")
    # Into the tensors that are there, whose addresses are right.
    policy.load_state_dict(state.pop("policy"))
    return state
