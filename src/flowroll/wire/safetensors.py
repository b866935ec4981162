"""The safetensors format, written and read without a copy: as a tensor of an answer, and as a body that arrives in pieces.

Format: 8 bytes of little-endian header length, a JSON header padded with spaces, then the data of every tensor, without gaps.
The safetensors library copies what it writes, and what it reads from anything but a file; here data is taken from
`types.tensors.tensor_bytes`, and put there. Files are read by `engine.weights.tensorfile`, with the same header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from flowroll.errors import WeightsRejectedError
from flowroll.types.tensors import tensor_bytes

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U16": 2, "U32": 4, "U64": 8}
LENGTH_BYTES = 8
# As many as torch has; the product of a million numbers would take minutes, in which Python does nothing else.
_MAX_DIMS, _MAX_NUMBER = 64, 2**63 - 1
# Several times what the names and shapes of the largest models take.
_MAX_STREAM_HEADER = 16 * 2**20
_MOST_SHOWN = 200
# Smaller views into a shared body are copied, so that a kept log-prob does not keep the whole answer in memory.
_MIN_SHARED_BYTES = 1 << 20


class BlobError(ValueError):
    """Bytes that are not the safetensors data they should be; the text tells why, or is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHead:
    """A tensor without its data.

    Attributes:
        name: Its key.
        dtype: The dtype as safetensors names it, e.g. "BF16".
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(TensorHead):
    """A tensor of a file.

    Attributes:
        start: Where its bytes begin in the file.
        stop: Where they end.
    """

    start: int
    stop: int


def safetensors_prefix(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, multiple: int = LENGTH_BYTES
) -> bytes:
    """Returns all that comes before the data of these tensors, which follow in this order without gaps.

    Args:
        tensors: The tensors by name.
        metadata: Free text for the header.
        multiple: The prefix is padded to a multiple of so many bytes, itself a multiple of 8.

    Raises:
        KeyError: A dtype that cannot be written.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = msgspec.json.encode(header)
    text += b" " * (-(LENGTH_BYTES + len(text)) % multiple)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(raw: bytes | bytearray | memoryview) -> list[StoredTensor]:
    """Returns the tensors that a header names, in the order of their data, which has no gap. The time is linear in its length.

    Args:
        raw: The header, without the eight bytes before it that tell its length.

    Raises:
        BlobError: It is no such header, or one of its tensors does not have as many bytes as its shape says.
    """
    end = LENGTH_BYTES + len(raw)
    try:
        entries = json.loads(str(raw, "utf-8"), object_pairs_hook=_without_doubles)
        entries.pop("__metadata__", None)
        stored = [_stored_tensor(name, entry, end) for name, entry in entries.items()]
    except BlobError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BlobError from error
    stored.sort(key=lambda tensor: (tensor.start, tensor.stop))
    for tensor in stored:
        if tensor.start != end:
            raise BlobError(f"a gap or an overlap at {tensor.name[:_MOST_SHOWN]}")
        end = tensor.stop
    return stored


def header_metadata(raw: bytes | bytearray | memoryview) -> dict[str, str]:
    """Returns the free text in a header that `read_header` has accepted.

    Raises:
        BlobError: It is not text by name.
    """
    metadata = json.loads(str(raw, "utf-8")).get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BlobError("the metadata is not text by name")
    return metadata


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; of two entries with the same name the JSON parser would drop one in silence."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BlobError(f"{name[:_MOST_SHOWN]} is there twice")
        found[name] = value
    return found


def _stored_tensor(name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    item_bytes = _ITEM_BYTES.get(entry["dtype"])
    # The product of numbers of thousands of digits would take seconds, in which Python does nothing else.
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in (start, stop, *shape)) or start > stop:
        raise ValueError("numbers must be natural, and below 2^63")
    if len(shape) > _MAX_DIMS or (item_bytes is not None and stop - start != item_bytes * math.prod(shape)):
        raise BlobError(f"{entry['dtype']} data of {name[:_MOST_SHOWN]} does not fill shape {list(shape)[:8]}")
    return StoredTensor(name=name, dtype=entry["dtype"], shape=shape, start=begin + start, stop=begin + stop)


def tensor_from_blob(blob: memoryview | bytearray) -> Tensor:
    """Returns the tensor "t" of a safetensors blob, which holds no other; writable.

    The data is not copied if it is writable, aligned, and either its own buffer or large.

    Args:
        blob: A `bytearray` is taken over; a `memoryview` is part of a larger body, which the tensor then keeps alive.

    Raises:
        BlobError: It is no such blob.
    """
    view = memoryview(blob)
    data_start = LENGTH_BYTES + int.from_bytes(view[:LENGTH_BYTES], "little")
    stored = read_header(view[LENGTH_BYTES:data_start]) if data_start <= view.nbytes else []
    if [tensor.name for tensor in stored] != ["t"] or stored[0].dtype not in DTYPES or stored[0].stop > view.nbytes:
        raise BlobError('a safetensors blob must hold a tensor "t" of a known dtype, and all of its data')
    (tensor,) = stored
    dtype = DTYPES[tensor.dtype]
    try:
        if tensor.start == tensor.stop:
            return torch.empty(tensor.shape, dtype=dtype)
        return _as_tensor(view[tensor.start : tensor.stop], isinstance(blob, memoryview), dtype).view(tensor.shape)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise BlobError(f"a tensor of an impossible shape: {error}") from error


def _as_tensor(data: memoryview, is_shared: bool, dtype: torch.dtype) -> Tensor:
    """Returns the bytes as a flat tensor, in place where that is safe."""
    if data.readonly or (is_shared and data.nbytes < _MIN_SHARED_BYTES):
        return torch.frombuffer(bytearray(data), dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype)


class TensorStream:
    """A body that arrives in pieces: the bytes of each tensor go straight to the memory that will hold it.

    Args:
        begin: Looks at the tensors as soon as the header is here, before any data is, and gives what has to be filled.

    Attributes:
        header: The header, without its length; empty before it is here.
    """

    def __init__(self, begin: Callable[[list[StoredTensor]], Sequence[Tensor]]) -> None:
        self.header = bytearray()
        self._places = self._in_order(begin)
        # What the next byte belongs to; None: the body has ended.
        self._place = next(self._places, None)
        self._num_tensors, self._num_missing = 0, 0

    def feed(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes.

        Raises:
            WeightsRejectedError: The header is none, or there are bytes behind the end; or whatever `begin` raises.
        """
        view = memoryview(piece)
        while view:
            if self._place is None:
                raise WeightsRejectedError("the body must end with its last tensor, got more bytes; send it again.")
            count = min(len(self._place), len(view))
            self._place[:count] = view[:count]
            self._num_missing -= count
            view, self._place = view[count:], self._place[count:] or next(self._places, None)

    def finish(self) -> int:
        """Ends the body.

        Returns:
            How many tensors it held.

        Raises:
            WeightsRejectedError: It is not whole.
        """
        if self._place is not None:
            missing = f"{self._num_missing} bytes too few" if self._num_tensors else "no whole header"
            raise WeightsRejectedError(f"the body must be a whole safetensors file, got {missing}; send it again.")
        return self._num_tensors

    def _in_order(self, begin: Callable[[list[StoredTensor]], Sequence[Tensor]]) -> Iterator[memoryview]:
        """Returns the memory of everything in the body, to be filled one after the other; none of it is empty."""
        length = bytearray(LENGTH_BYTES)
        yield memoryview(length)
        try:
            if (size := int.from_bytes(length, "little")) > _MAX_STREAM_HEADER:
                raise BlobError
            self.header = bytearray(size)
            if size:
                yield memoryview(self.header)
            stored = read_header(self.header)
        except BlobError as error:
            raise WeightsRejectedError(broken_header("the body", error, "send it again")) from error
        views = [tensor_bytes(target) for target in begin(stored)]
        self._num_tensors, self._num_missing = len(views), sum(map(len, views))
        yield from filter(len, views)


def broken_header(subject: str, error: BlobError, remedy: str) -> str:
    """Returns what is said of something whose header cannot be read."""
    reason = f" ({error})" if str(error) else ""
    return f"{subject} must be a safetensors file, got a broken header{reason}; {remedy}."
