"""Tensors from a process group into an update. Rank 0 of the engine receives all; the others get their parts at the commit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.parallel.broadcasting import BroadcastGroup
from flowroll.wire.safetensors import TensorHead

UNRECEIVED = "a bucket that was refused"


def receive_from_group(
    incoming: WeightReceiver, group: BroadcastGroup, heads: Sequence[TensorHead], *, flattened: bool = False
) -> None:
    """Receives a bucket; requests may run meanwhile.

    Args:
        incoming: What it is part of.
        group: Whose rank 0 sends it.
        heads: Its tensors, in the order in which they are sent.
        flattened: Whether they are sent as one, all bytes in a row.

    Raises:
        WeightsRejectedError: They are not wanted, which is found before any is received; or the sender is gone. Nothing is
            left of the bucket, and the group is closed: what was sent and not received would be taken for the next bucket.
    """
    try:
        with group.turn(), incoming.bucket(heads, device=group.device) as targets:
            _receive(group, targets, flattened)
    except BaseException:
        group.close(UNRECEIVED)
        raise


def _receive(group: BroadcastGroup, targets: Sequence[Tensor], flattened: bool) -> None:
    if not flattened:
        for target in targets:
            group.broadcast(target)
        return
    flat = torch.empty(sum(target.nbytes for target in targets), dtype=torch.uint8, device=group.device)
    group.broadcast(flat)
    parts = torch.split(flat, [target.nbytes for target in targets])
    for target, part in zip(targets, parts, strict=True):
        target.reshape(-1).view(torch.uint8).copy_(part)
