"""Gradient checkpointing in a shared forward: what the backward computes again, it computes in the same way.

A function mode is active in the forward alone. A block that is computed again in the backward would be computed as an ordinary
batch, with other bits and other saved tensors. So the blocks that a diffusers model checkpoints remember the way in which they
were computed. Of a model that checkpoints by other means the samples run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

# Called as a block begins; returns what makes the context in which the backward computes it again.
Begin: TypeAlias = Callable[[], Callable[[], AbstractContextManager[Any]]]

# The attributes by which a diffusers model checkpoints its blocks.
_IS_ON, _CHECKPOINT = "gradient_checkpointing", "_gradient_checkpointing_func"


@contextmanager
def remembered_blocks(transformer: object, begin: Begin) -> Iterator[None]:
    """Has every block that the model checkpoints in here computed again in the context that `begin` named for it."""
    modules = transformer.modules() if isinstance(transformer, nn.Module) and torch.is_grad_enabled() else ()
    found = {module: getattr(module, _CHECKPOINT) for module in modules if getattr(module, _IS_ON, False)}
    for module, checkpoint in found.items():
        setattr(module, _CHECKPOINT, partial(_checkpointed, checkpoint, begin))
    try:
        yield
    finally:
        for module, checkpoint in found.items():
            setattr(module, _CHECKPOINT, checkpoint)


def keeping_nothing() -> saved_tensors_hooks:
    """Returns a context in which a forward keeps no tensors for a backward, which must not be run."""
    return saved_tensors_hooks(_nothing, _nothing)  # type: ignore[arg-type]  # a hook may return anything


def saved_hooks() -> object:
    """Returns what decides now which tensors are kept for the backward; checkpointing and offloading set it. None: nothing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Block:
    """A block of a model. Its first call is that of the forward, every later one is a backward's."""

    def __init__(self, block: Callable[..., Any], begin: Begin) -> None:
        self._block, self._begin = block, begin
        self._again: Callable[[], AbstractContextManager[Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._again is None:
            self._again = self._begin()
            return self._block(*args, **kwargs)
        with self._again():
            return self._block(*args, **kwargs)


def _checkpointed(checkpoint: Callable[..., Any], begin: Begin, block: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(_Block(block, begin), *args, **kwargs)


def _nothing(_: object) -> None:
    return None
