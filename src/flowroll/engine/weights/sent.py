"""Copies tensors that another process of this machine shares into an update or an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from flowroll.engine.weights.receiver import WeightReceiver
from flowroll.engine.weights.staged import tensor_head
from flowroll.errors import MalformedRequestError, WeightsRejectedError
from flowroll.wire.pickled import FIELD, SentTensors


def fill_from_sent(incoming: WeightReceiver, sent: SentTensors) -> None:
    """Copies a bucket into an update, and releases the sender's memory in any case.

    Raises:
        WeightsRejectedError: The update refuses the tensors.
        MalformedRequestError: The shared memory cannot be read to its end.
    """
    tensors = sent.pairs
    try:
        if tensors:
            heads = [tensor_head(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
            with incoming.bucket(heads, device=tensors[0][1].device) as targets:
                for target, (_, tensor) in zip(targets, tensors, strict=True):
                    tensor.copy_to(target)
    except ValueError as error:
        raise _unreadable(error) from error
    finally:
        # Released here, and not after the exchange of the weights, which may have to wait.
        sent.release()


def copies_of_sent(sent: SentTensors, max_bytes: int) -> dict[str, Tensor]:
    """Copies tensors to the CPU, and releases the sender's memory in any case; returns the copies by name.

    Raises:
        WeightsRejectedError: The tensors have more than `max_bytes` bytes.
        MalformedRequestError: The shared memory cannot be read to its end.
    """
    try:
        total = sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for _, tensor in sent.pairs)
        if total > max_bytes:
            raise WeightsRejectedError(
                f"{FIELD} must have at most {max_bytes} bytes of an adapter, got {total}; lower the rank, or start the server "
                "with a higher --max-adapter-bytes.",
                field=FIELD,
            )
        copies = {}
        for name, tensor in sent.pairs:
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            tensor.copy_to(target)
            copies[name] = target.cpu()
        return copies
    except ValueError as error:
        raise _unreadable(error) from error
    finally:
        sent.release()


def _unreadable(error: ValueError) -> MalformedRequestError:
    return MalformedRequestError(f"{FIELD} must be readable to its end, got {error}; send it again.", field=FIELD)
