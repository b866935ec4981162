"""The training loop of both networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_LEARNING_RATE = 2e-3


def minimise(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    weight_decay: float,
    report: Callable[[int, float], None],
) -> None:
    """Trains a module in place, with one cycle of the learning rate.

    Args:
        module: Its parameters are changed.
        loss: The loss of a batch that it draws itself.
        steps: Optimizer steps.
        weight_decay: The weight decay of AdamW.
        report: Called with the step and the loss.
    """
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, float(value.detach()))
    module.eval()
