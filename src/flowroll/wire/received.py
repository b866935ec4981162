"""Tensors that a request carries: from their form on the wire to a tensor, with nothing taken on trust."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowroll.wire.messages import WireTensor
from flowroll.wire.safetensors import BlobError, tensor_from_blob

HOW_TO_SEND = 'send base64 (JSON) or bytes (msgpack) of a safetensors blob with the key "t"'


def received_tensor(sent: WireTensor[Any]) -> Tensor:
    """Returns the tensor that a request carries.

    Raises:
        BlobError: The bytes are no tensor, or not the one that the object says.
    """
    tensor = tensor_from_blob(sent.data)
    if tuple(tensor.shape) != sent.shape or str(tensor.dtype) != sent.dtype:
        said = f"{list(sent.shape)[:8]} of {sent.dtype[:80]}"
        raise BlobError(f"{list(tensor.shape)[:8]} of {tensor.dtype} in the blob of a tensor that says {said}")
    return tensor
