"""What goes through a channel comes out the same, and large tensors lie in memory that both ends map."""

import contextlib
import gc
import os
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flowroll import errors
from flowroll.engine.service.channel import Channel, ChannelClosedError, TensorsLostError
from flowroll.parallel.shared_memory import SharedMemory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool)


@dataclass(frozen=True)
class Message:
    value: Any


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    yield left, right
    left.close()
    right.close()


def through(ends: tuple[Channel, Channel], value: Any) -> Any:
    # On a thread: a socket holds no more than some hundred kilobytes.
    sender = threading.Thread(target=ends[0].send, args=(Message(value),))
    sender.start()
    received = ends[1].receive()
    sender.join()
    return received.value


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("size", [0, 1, 7, 100_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_keep_dtype_shape_and_bits(ends: tuple[Channel, Channel], dtype: torch.dtype, size: int) -> None:
    tensor = torch.randint(0, 2, (2, size), dtype=torch.uint8).to(dtype)
    first, second, text = through(ends, [tensor, {"t": tensor[:, ::2].t()}, "x" * 300_000])
    assert same(first, tensor) and same(second["t"], tensor[:, ::2].t()) and text == "x" * 300_000
    assert all(part.data_ptr() % 64 == 0 for part in (first, second["t"]))


def test_nan_and_scalars_keep_their_bits(ends: tuple[Channel, Channel]) -> None:
    tensor = torch.tensor([float("nan"), -0.0, float("inf")])
    received, scalar = through(ends, (tensor, torch.tensor(1.5)))
    assert received.view(torch.int32).tolist() == tensor.view(torch.int32).tolist() and scalar.item() == 1.5


def test_a_tensor_that_is_sent_twice_in_a_message_arrives_twice(ends: tuple[Channel, Channel]) -> None:
    tensor = torch.arange(40_000)
    first, second = through(ends, [tensor, tensor])
    assert same(first, tensor) and same(second, tensor)


def test_shared_memory_is_the_same_memory_at_both_ends(ends: tuple[Channel, Channel]) -> None:
    memory = SharedMemory.create(1000)
    other = through(ends, [memory, torch.ones(100_000)])[0]
    memory.bytes[3] = 7
    assert other.bytes[3] == 7
    other.bytes[4] = 9
    assert memory.bytes[4] == 9


def test_no_descriptor_and_no_memory_stays_behind(ends: tuple[Channel, Channel]) -> None:
    through(ends, torch.ones(1))
    before, mapped = len(os.listdir("/proc/self/fd")), _mapped()
    for _ in range(50):
        received = through(ends, [torch.ones(100_000), SharedMemory.create(10)])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the last one's
    assert _mapped() <= mapped + 2
    del received
    assert (len(os.listdir("/proc/self/fd")), _mapped()) == (before, mapped)


def test_a_message_whose_tensors_find_no_descriptor_is_lost_alone(ends: tuple[Channel, Channel]) -> None:
    values = [{"text": "a", "tensor": torch.ones(100_000)}, SharedMemory.create(10), torch.arange(50_000)]
    for value in values:
        ends[0].send(Message(value))
    with _no_free_descriptor() as held:
        with pytest.raises(TensorsLostError) as lost:
            ends[1].receive()
        # One is free, but the mapping needs another for a moment.
        os.close(held.pop())
        with pytest.raises(TensorsLostError):
            ends[1].receive()
    before = len(os.listdir("/proc/self/fd"))
    assert lost.value.message.value == {"text": "a", "tensor": None}
    assert same(ends[1].receive().value, values[2])
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_cannot_be_mapped_is_an_os_error_and_closes_its_own_descriptor_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[int] = []
    close = os.close
    with _no_free_descriptor() as held, monkeypatch.context() as patched:
        os.close(held.pop())
        patched.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor)))
        with pytest.raises(OSError, match="Too many open files"):
            SharedMemory.create(10)
        gc.collect()
    assert len(closed) == 1


def test_many_threads_may_send(ends: tuple[Channel, Channel]) -> None:
    def send(start: int) -> None:
        for index in range(20):
            ends[0].send(Message((start + index, torch.full((20_000,), start + index))))

    senders = [threading.Thread(target=send, args=(100 * number,)) for number in range(4)]
    for sender in senders:
        sender.start()
    received = [ends[1].receive().value for _ in range(80)]
    for sender in senders:
        sender.join()
    assert all(bool((tensor == number).all()) for number, tensor in received)
    assert sorted(number for number, _ in received) == sorted(100 * a + b for a in range(4) for b in range(20))


def test_an_end_that_is_closed_is_found_out_by_both(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()
    with pytest.raises(ChannelClosedError):
        ends[1].receive()
    with pytest.raises(ChannelClosedError):
        for _ in range(2):
            ends[1].send(Message("x" * 10**6))


def _kinds(of: type[errors.FlowrollError] = errors.FlowrollError) -> list[type[errors.FlowrollError]]:
    return [of, *(kind for sub in of.__subclasses__() for kind in _kinds(sub))]


@pytest.mark.parametrize("kind", _kinds())
def test_every_error_arrives_as_it_was(ends: tuple[Channel, Channel], kind: type[errors.FlowrollError]) -> None:
    more = {"retry_after_s": 7.5} if issubclass(kind, errors.QueueFullError) else {}
    error = kind("a must b, got c; d.", field="a", **more)
    received = through(ends, error)
    assert type(received) is kind and vars(received) == vars(error) and str(received) == str(error)


@contextlib.contextmanager
def _no_free_descriptor() -> Iterator[list[int]]:
    """Holds every descriptor that this process may have meanwhile; those in the list may be closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
    held: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(2))
        yield held
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:flowroll" in line for line in maps)
