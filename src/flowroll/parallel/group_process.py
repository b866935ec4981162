"""A membership in a trainer's process group of the backend gloo, in a process of its own that receives into shared memory.

gloo ends its process when a member sends more bytes than were announced, and torch waits without a limit at a port that accepts
connections and says nothing. Here neither can take the engine with it: the process of the membership ends, or is killed.

The processes are forked from multiprocessing's fork server, which has imported torch once, so that joining takes milliseconds
after the first time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from flowroll.errors import FlowrollError
from flowroll.parallel.bound import bind
from flowroll.parallel.broadcasting import BroadcastGroup, broken, unmet
from flowroll.parallel.shared_memory import SharedMemory, placed

# How long the fork server may take to start: it imports torch.
_START_S = 120.0
# How much longer than its own timeout an answer of the process may take, in seconds.
_PATIENCE_S = 5.0
# How long the process may take to ask rank 0's store for a key, in seconds.
_LOOK_S = 2.0
# Memory that was not received holds these bytes, which are NaN in every float dtype, so that no update accepts them.
UNWRITTEN = 0xFF


class GroupProcess:
    """A membership in a process group of the backend gloo.

    Args:
        name: The group's name, the same in all of its processes.
        rank: The rank of the membership; rank 0 sends.
        world_size: The number of members.
        address: The address on which rank 0's store listens.
        port: The port on which rank 0's store listens.
        timeout_s: How many seconds to wait for the other members, at the joining and in every broadcast.

    Attributes:
        id: No other membership has it, also none in a group of the same name.
        device: The device on which tensors arrive.
        is_joined: Whether `join` has succeeded.
    """

    def __init__(self, name: str, *, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
        self.name, self.id, self.device = name, secrets.token_hex(8), torch.device("cpu")
        self.is_joined = False
        self._place: dict[str, Any] = {"rank": rank, "world_size": world_size, "address": address, "port": port}
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._failing = threading.Lock()
        self._failure: str | None = None
        self._process: Any = None
        self._connection: Connection

    def join(self) -> None:
        """Starts the process and joins the group. It may be called once; `close` on another thread ends it.

        Raises:
            InvalidRequestError: The other members did not come in time.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with self._turn:
            self._connection, other = context.Pipe()
            options = {**self._place, "timeout_s": self._timeout_s}
            process = context.Process(target=_run, args=(other, self.name, options), daemon=True)
            with self._failing:
                if self._failure is None:
                    process.start()
                    self._process = process
            other.close()
            try:
                self._answer(_START_S)
                self._answer(self._timeout_s + _PATIENCE_S)
            except FlowrollError as error:
                self._fail(error.message)
                raise
            except (TimeoutError, RuntimeError) as error:
                self._fail(str(error))
                raise self._unmet() from None
            self.is_joined = True

    @property
    def has_failed(self) -> bool:
        """Whether the membership is closed, or has failed and can only be closed."""
        return self._failure is not None

    def has_lost_rank_0(self) -> bool:
        """Asks the store of rank 0, and tells whether it does not answer."""
        if not self._turn.acquire(blocking=False):
            return False  # it joins or receives just now, for no longer than its timeout
        try:
            self._connection.send(None)
            return not self._answer(_LOOK_S)
        except (TimeoutError, RuntimeError, FlowrollError, OSError):
            return True
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the membership for tensors that belong together; others wait."""
        with self._turn:
            yield

    def receive(self, sizes: Sequence[int]) -> SharedMemory:
        """Receives tensors of these sizes, each from one broadcast of rank 0. The caller holds the `turn`.

        Args:
            sizes: The numbers of bytes of the tensors.

        Returns:
            Memory that holds the tensors where `placed` says. Bytes that rank 0 did not send are `UNWRITTEN`.

        Raises:
            WeightsRejectedError: Rank 0 is gone, was silent for too long, or sent more bytes. The membership is then closed.
            OSError: There is not enough memory.
        """
        if self._failure is not None:
            raise broken(self.name, self._failure)
        memory = SharedMemory.create(placed(sizes)[1])
        memory.bytes.fill_(UNWRITTEN)
        try:
            self._connection.send(list(sizes))
            reduction.send_handle(self._connection, memory.descriptor, self._process.pid)
            for _ in sizes:
                self._answer(self._timeout_s + _PATIENCE_S)
        except FlowrollError as error:
            self._fail(error.message)
            raise
        except (TimeoutError, RuntimeError, OSError) as error:
            self._fail(str(error))
            raise broken(self.name, self._failure) from None
        return memory

    def close(self, reason: str = "its end") -> None:
        """Ends the membership; whoever waits for it gets an error at once. It may be called twice.

        Args:
            reason: The reason that later errors give.
        """
        with self._failing:
            self._failure = self._failure or reason
            process = self._process
        if process is not None:
            process.kill()
            process.join()
        if self._turn.acquire(blocking=False):  # else whoever waits for an answer finds the process ended
            self._hang_up()
            self._turn.release()

    def _fail(self, reason: str) -> None:
        """Ends the membership from within its turn."""
        self.close(reason)
        self._hang_up()

    def _hang_up(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()

    def _answer(self, timeout_s: float) -> Any:
        """Waits for the next answer of the process.

        Raises:
            FlowrollError: The process reports it.
            TimeoutError: The process does not answer.
            RuntimeError: The process has ended; the text says why.
        """
        try:
            if self._process is None or not self._connection.poll(timeout_s):
                raise TimeoutError(self._failure or f"silence for {timeout_s:g} s")
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(self._end()) from None
        if isinstance(answer, FlowrollError):
            raise answer
        return answer

    def _end(self) -> str:
        if self._failure is not None:
            return self._failure
        self._process.join(_PATIENCE_S)
        status = self._process.exitcode
        if status == -signal.SIGABRT:
            return "more bytes than were announced, or other ones than its transport sends"
        return f"the end of the process that receives, with status {status}"

    def _unmet(self) -> FlowrollError:
        place = self._place
        return unmet(
            self.name, place["world_size"], f"{place['address']}:{place['port']}", self._failure or "silence", self._timeout_s
        )


def _run(connection: Connection, name: str, options: dict[str, Any]) -> None:
    """Serves one membership, in its own process, until the engine closes the connection."""
    bind(os.getppid())
    connection.send(True)
    try:
        group = BroadcastGroup(name, backend="gloo", **options)
        connection.send(True)
        with contextlib.suppress(EOFError):
            while True:
                _serve(group, connection)
    except FlowrollError as error:
        connection.send(error)
    # At once: gloo's destructors may wait for a peer until the timeout.
    os._exit(0)


def _serve(group: BroadcastGroup, connection: Connection) -> None:
    """Handles one command: sizes of tensors to receive, or None for the question whether rank 0 is there."""
    sizes: list[int] | None = connection.recv()
    if sizes is None:
        connection.send(not group.has_lost_rank_0())
        return
    memory = SharedMemory(reduction.recv_handle(connection))
    for start, size in zip(placed(sizes)[0], sizes, strict=True):
        group.broadcast(memory.bytes[start : start + size])
        connection.send(True)
