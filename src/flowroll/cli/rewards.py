"""Finds the reward function that a command was given, and asks it about rollouts."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.types import Rollout

# Of a picture, float32 [colors, 1, height, width] in [0, 1], and its prompt.
Reward: TypeAlias = Callable[[Tensor, str], float]


def reward_named(path: str) -> Reward:
    """Returns the function at "module:function" or "file.py:function"; modules of the working folder are found too.

    Raises:
        InvalidRequestError: There is no such function.
    """
    module, _, name = path.rpartition(":")
    try:
        found = getattr(_module(module), name)
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise InvalidRequestError(
            f"reward must be module:function, got {path} ({error}); name a function that can be imported.", field="reward"
        ) from error
    if not callable(found):
        raise InvalidRequestError(
            f"reward must name a function, got {path}, a {type(found).__name__}; name another.", field="reward"
        )
    reward: Reward = found
    return reward


def rewards_of(reward: Reward, rollouts: Sequence[Rollout]) -> list[float]:
    """Asks for the reward of each rollout.

    Raises:
        InvalidRequestError: A rollout has no picture, or the function raises or returns something that is no number.
    """
    found = []
    for rollout in rollouts:
        picture = _picture(rollout)
        try:
            found.append(float(reward(picture, rollout.prompt or "")))
        except Exception as error:
            raise InvalidRequestError(
                f"reward must return a number, got {type(error).__name__}: {error}; correct the function.", field="reward"
            ) from error
    return found


def _picture(rollout: Rollout) -> Tensor:
    """Returns the picture in [0, 1], whichever form it has."""
    image = rollout.image
    if image is None:
        raise InvalidRequestError("reward must have a picture, got latents alone; leave out --image-format.", field="reward")
    if isinstance(image, bytes):
        pixels = rollout.pil()
        flat = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
        image = flat.view(pixels.height, pixels.width, -1).permute(2, 0, 1)[:, None]
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module in {name}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    # As `python -m` does, which the flowroll command does not.
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove("")
