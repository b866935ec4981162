"""Values with tensors on their way through Ray's object store.

Ray pickles what actors are given and return, and torch's own pickles copy every tensor into the stream. Here tensors leave the
pickle as buffers (pickle protocol 5), which Ray writes into its shared memory once and which every process of a machine reads
from there. Like every use of Ray this trusts the processes of the cluster; nothing here reads a pickle of a client.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Sequence
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from flowroll.parallel.shared_memory import SharedMemory


class Parcel:
    """A value that is pickled with its tensors out of band, and unpickled as the value itself.

    Args:
        value: Any value that can be pickled; its tensors must be plain ones on the CPU.
        is_shared: Whether the receiver's tensors lie in Ray's memory, where nobody may write; otherwise they are copies.
    """

    def __init__(self, value: Any, *, is_shared: bool = False) -> None:
        self.value, self.is_shared = value, is_shared

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        pickler = _Pickler()
        pickler.dump(self.value)
        body = pickler.buffer.getvalue()
        buffers = [pickle.PickleBuffer(cast(Any, _bytes(tensor).numpy())) for tensor in pickler.tensors]
        return _open, (body, buffers, self.is_shared)


def pack(value: Any) -> Parcel:
    """Wraps a value, e.g. a trainer's state dict, so that its tensors are stored once for all actors that are given it.

        weights = ray.put(cluster.pack(model.state_dict()))
        ray.get([engine.update_weights.remote(weights) for engine in engines])

    Args:
        value: A value with tensors on the CPU. The receivers' tensors lie in the object store, and must not be written to.
    """
    return Parcel(value, is_shared=True)


def _bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor as a tensor [bytes] of uint8; a view, if the tensor is contiguous."""
    assert tensor.device.type == "cpu" and tensor.layout == torch.strided, "only plain tensors of the CPU are sent"
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """A pickler that leaves tensors and shared memory out of the pickle, and collects them."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer, protocol=5)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Returns what replaces a tensor or shared memory in the pickle; None for anything else, which is pickled."""
        if isinstance(value, SharedMemory):
            return "memory", self._place(value.bytes)
        if isinstance(value, Tensor):
            return "tensor", self._place(value), tuple(value.shape), value.dtype
        return None

    def _place(self, tensor: Tensor) -> int:
        # A value may hold the same tensor in several places; it is sent once.
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._places[id(tensor)]


class _Unpickler(pickle.Unpickler):
    """An unpickler that puts tensors and shared memory back in their places."""

    def __init__(self, body: bytes, buffers: Sequence[Any], is_shared: bool) -> None:
        super().__init__(io.BytesIO(body))
        self._buffers, self._is_shared = buffers, is_shared
        self._opened: dict[int, Tensor] = {}

    def persistent_load(self, reference: Any) -> Any:
        """Returns the tensor or the memory that a reference in the pickle stands for."""
        kind, place, *rest = reference
        if kind == "memory":
            found = _tensor(self._buffers[place])
            memory = SharedMemory.create(found.numel())
            memory.bytes[: found.numel()].copy_(found)
            return memory
        if place not in self._opened:
            shape, dtype = rest
            found = _tensor(self._buffers[place])
            # A copy is aligned as torch's allocator aligns it, and may be written to.
            self._opened[place] = (found if self._is_shared else found.clone()).view(dtype).view(shape)
        return self._opened[place]


def _tensor(buffer: Any) -> Tensor:
    """Returns a buffer as a tensor [bytes] of uint8, without a copy; the tensor keeps the buffer."""
    view = memoryview(buffer).cast("B")
    if not view.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    if not view.readonly:
        return torch.frombuffer(view, dtype=torch.uint8)
    # torch warns of memory that it must not write to, which is what a shared parcel is.
    array = (ctypes.c_char * view.nbytes).from_address(numpy.frombuffer(view, dtype=numpy.uint8).ctypes.data)
    array._owner = view  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=torch.uint8)


def _open(body: bytes, buffers: Sequence[Any], is_shared: bool) -> Any:
    return _Unpickler(body, buffers, is_shared).load()
