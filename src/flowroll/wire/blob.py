"""Tensors as safetensors bytes, without a copy: the header is built here, the data is taken from `types.tensors.tensor_bytes`.

Format: 8 bytes of little-endian header length, a JSON header padded with spaces, then the data of every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from torch import Tensor

_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_LENGTH_BYTES = 8
# Smaller views into a shared body are copied, so that a kept log-prob does not keep the whole answer in memory.
_MIN_SHARED_BYTES = 1 << 20


class BlobError(ValueError):
    """Bytes that are not the safetensors data they should be."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    # Bounded, because the product of a million numbers takes minutes, in which Python does nothing else.
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[int, int]


class _Header(msgspec.Struct, frozen=True):
    t: _Entry


def safetensors_prefix(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, multiple: int = _LENGTH_BYTES
) -> bytes:
    """All that comes before the data of these tensors, which follow in this order without gaps.

    Args:
        tensors: By name.
        metadata: Free text for the header.
        multiple: The prefix is padded to a multiple of so many bytes, itself a multiple of 8.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = _Entry(dtype=_DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data_offsets=(start, end))
    text = msgspec.json.encode(header)
    text += b" " * (-(_LENGTH_BYTES + len(text)) % multiple)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def tensor_from_blob(blob: memoryview | bytearray) -> Tensor:
    """The tensor "t" of a safetensors blob; writable.

    The data is not copied if it is writable, aligned, and either its own buffer or large.

    Args:
        blob: A `bytearray` is taken over; a `memoryview` is part of a larger body, which the tensor then keeps alive.

    Raises:
        BlobError: It is no such blob.
    """
    view = memoryview(blob)
    data_start = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    try:
        entry = msgspec.json.decode(view[_LENGTH_BYTES:data_start], type=_Header).t
        dtype = _DTYPES[entry.dtype]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise BlobError(f"a safetensors blob with a bad header: {error}") from error
    start, end = (data_start + offset for offset in entry.data_offsets)
    if not (data_start <= start <= end <= view.nbytes) or end - start != math.prod(entry.shape) * dtype.itemsize:
        raise BlobError(f"a safetensors blob whose {entry.dtype} data does not fill shape {list(entry.shape)[:8]}")
    try:
        if start == end:
            return torch.empty(entry.shape, dtype=dtype)
        return _as_tensor(view[start:end], shared=isinstance(blob, memoryview), dtype=dtype).view(entry.shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise BlobError(f"a tensor of an impossible shape: {error}") from error


def _as_tensor(data: memoryview, *, shared: bool, dtype: torch.dtype) -> Tensor:
    """The bytes as a flat tensor, in place where that is safe."""
    if data.readonly or (shared and data.nbytes < _MIN_SHARED_BYTES):
        return torch.frombuffer(bytearray(data), dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype)
