"""Sends messages between two processes of one server, over a socket that no other process can reach.

A message is a pickled dataclass. Pickle is safe here, because both ends are this program, and the socket pair was made before
the second process was started. Tensors are not part of the pickle. Small ones follow it. Large ones are put into shared
memory, whose descriptor is sent with the message, and the receiver uses them there without a copy.
"""

from __future__ import annotations

import array
import contextlib
import io
import pickle
import socket
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from flowroll.parallel.shared_memory import SharedMemory, placed, tensor_at

# The number of bytes of the pickle, that of the tensors that follow it, and the number of descriptors.
_HEAD = struct.Struct("<QQQ")
# From this number of bytes on, the tensors of a message are sent in shared memory.
_SHARED_BYTES = 64 * 1024
_MAX_DESCRIPTORS = 64


class ChannelClosedError(Exception):
    """The other process has ended, or has closed its end of the channel."""


class TensorsLostError(Exception):
    """A message arrived without its tensors: there was no free descriptor, or no memory, for them.

    Attributes:
        message: The message, with None in the place of each tensor.
    """

    def __init__(self, message: Any) -> None:
        super().__init__("no free descriptor, or no memory; allow more open files (ulimit -n)")
        self.message = message


class Channel:
    """One end of the socket. Only one thread may receive; any thread may send.

    Args:
        connection: A stream socket of the AF_UNIX family.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Sends a message, whose tensors must be on the CPU.

        Raises:
            ChannelClosedError: The other end is closed.
        """
        pickler = _Pickler()
        body, memories = pickler.pickle(message), pickler.memories
        inline = pickler.packed_inline() if pickler.num_bytes < _SHARED_BYTES else b""
        if pickler.num_bytes >= _SHARED_BYTES:
            memories = [*memories, pickler.packed_in_shared_memory()]
        descriptors = array.array("i", [memory.descriptor for memory in memories])
        assert len(descriptors) <= _MAX_DESCRIPTORS
        head = _HEAD.pack(len(body), len(inline), len(descriptors))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        with self._sending:
            try:
                self._socket.sendmsg([head], rights)
                self._socket.sendall(body)
                self._socket.sendall(inline)
            except OSError as error:
                raise ChannelClosedError(str(error)) from error

    def receive(self) -> Any:
        """Waits for the next message.

        Raises:
            ChannelClosedError: The other end is closed.
            TensorsLostError: There is no place for its tensors. The messages after it may be received.
        """
        try:
            head, descriptors = self._receive_head()
            body_bytes, inline_bytes, count = _HEAD.unpack(head)
            memories = _mapped(descriptors)
            body, inline = self._receive_exactly(body_bytes), self._receive_exactly(inline_bytes)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error
        # The kernel leaves out descriptors that find no place.
        if len(memories) != count:
            raise TensorsLostError(_Unpickler(body, None, inline).load())
        return _Unpickler(body, memories, inline).load()

    def close(self) -> None:
        """Closes this end; the other end notices immediately."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive_head(self) -> tuple[bytes, list[int]]:
        size = array.array("i").itemsize
        head, rights, _, _ = self._socket.recvmsg(
            _HEAD.size, socket.CMSG_SPACE(_MAX_DESCRIPTORS * size), socket.MSG_CMSG_CLOEXEC
        )
        descriptors = array.array("i")
        for level, kind, data in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % size])
        if not head:
            raise ChannelClosedError("the other end is closed")
        return head + self._receive_exactly(_HEAD.size - len(head)), descriptors.tolist()

    def _receive_exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            done = self._socket.recv_into(view)
            if not done:
                raise ChannelClosedError("the other end is closed")
            view = view[done:]
        return data


def _mapped(descriptors: list[int]) -> list[SharedMemory]:
    """Maps the memory of these descriptors, and leaves out what cannot be mapped."""
    memories = []
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            memories.append(SharedMemory(descriptor))
    return memories


class _Pickler(pickle.Pickler):
    """A pickler that leaves tensors and shared memory out of the pickle, and collects them."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=5)
        self.memories: list[SharedMemory] = []
        self.num_bytes = 0
        self._tensors: dict[int, tuple[int, Tensor]] = {}

    def pickle(self, message: Any) -> bytes:
        """Returns the pickle of a message."""
        self.dump(message)
        return self._buffer.getvalue()

    def packed_in_shared_memory(self) -> SharedMemory:
        """Copies the tensors one after the other into new shared memory, and returns it."""
        memory = SharedMemory.create(self.num_bytes)
        self._pack(memory.bytes)
        return memory

    def packed_inline(self) -> bytes:
        """Returns the bytes of the tensors, one after the other."""
        packed = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._pack(packed)
        return packed.numpy().tobytes()

    def _pack(self, target: Tensor) -> None:
        for start, tensor in self._tensors.values():
            tensor_at(target, start, tensor.shape, tensor.dtype).copy_(tensor.detach())

    def persistent_id(self, value: Any) -> Any:
        """Returns what replaces a tensor or shared memory in the pickle; None for anything else, which is pickled."""
        if isinstance(value, SharedMemory):
            self.memories.append(value)
            return "memory", len(self.memories) - 1
        if not isinstance(value, Tensor):
            return None
        assert value.device.type == "cpu" and value.layout == torch.strided, "only plain tensors of the CPU are sent"
        # A message may hold the same tensor in several places; it is sent once.
        if id(value) not in self._tensors:
            self._tensors[id(value)] = self.num_bytes, value
            self.num_bytes += placed([value.nbytes])[1]
        return "tensor", self._tensors[id(value)][0], tuple(value.shape), value.dtype


class _Unpickler(pickle.Unpickler):
    """An unpickler that puts the tensors and the shared memory of a message back in their places.

    Args:
        body: The pickle of the message.
        memories: The shared memory that came with it; None: it was lost.
        inline: The bytes of the tensors that followed it; if it is empty, the tensors are in the last of the memories.
    """

    def __init__(self, body: bytearray, memories: list[SharedMemory] | None, inline: bytearray) -> None:
        super().__init__(io.BytesIO(body))
        self._memories, self._inline = memories, inline

    def persistent_load(self, reference: Any) -> Any:
        """Returns the tensor or shared memory that a reference in the pickle stands for."""
        if self._memories is None:
            return None
        kind, place, *rest = reference
        if kind == "memory":
            return self._memories[place]
        shape, dtype = rest
        if self._inline or not self._memories:
            # Copied, so that the tensor is aligned as torch's allocator aligns it.
            packed = torch.frombuffer(self._inline, dtype=torch.uint8) if self._inline else torch.empty(0, dtype=torch.uint8)
            return tensor_at(packed, place, shape, dtype).clone()
        return tensor_at(self._memories[-1].bytes, place, shape, dtype)
