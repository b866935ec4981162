"""The other ranks of a replica as processes: rank 0 starts them, waits for them, notices when one is lost, ends them."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgspec
import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from flowroll.engine.commands import (
    Command,
    Stop,
    encode_command,
)
from flowroll.errors import (
    CheckpointError,
    RankLostError,
    ShuttingDownError,
    fresh,
)
from flowroll.parallel.channel import Channel, Pulse
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.processes import RankProcesses
from flowroll.parallel.rendezvous import (
    second_connection,
    serve_store,
    torchrun_store,
)
from flowroll.types import Layout

_log = logging.getLogger(__name__)
_POLL_S = 0.1
# After a failed collective, how long to look for the rank whose end explains it.
_EXPLAIN_S = 2.0
_JOIN_S = 5.0
# How long the processes of a replica may take to start, before any of them loads.
_START_S = 300.0

FailureListener = Callable[[RankLostError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """What every rank of a replica is started with.

    Attributes:
        model: The checkpoint folder.
        variant: Variant of the model family.
        dtype: Of the weights, e.g. "bfloat16".
        device: Of rank 0, e.g. "cuda:0".
        layout: The degrees of the axes.
        timeout_s: How long ranks wait for each other.
        num_threads: CPU threads of each rank; they shape the bits on the CPU, so they are rank 0's.
        rank: Of this process.
        port: Of rank 0's store on this machine; None: torchrun's store.
    """

    model: str
    variant: str
    dtype: str
    device: str
    layout: Layout
    timeout_s: float
    num_threads: int
    rank: int = 0
    port: int | None = None


class Ranks:
    """The ranks of one engine, seen from rank 0.

    Args:
        config: Of rank 0.
        own_ranks: Whether to start the other ranks here; else torchrun has.

    Raises:
        RankLostError: A rank ended before it was up.
    """

    def __init__(self, config: RankConfig, *, own_ranks: bool) -> None:
        self._config = config
        self.failure: RankLostError | None = None
        self._listeners: list[FailureListener] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._processes: RankProcesses | None = None
        self._is_up = False
        self._store: Store
        if own_ranks:
            self._store, port = serve_store()
            others = {rank: replace(config, rank=rank, port=port) for rank in range(1, config.layout.num_ranks)}
            self._processes = RankProcesses({rank: msgspec.json.encode(other).decode() for rank, other in others.items()})
        else:
            self._store = torchrun_store()
        self._channel = Channel(self._store, rank=0, num_ranks=config.layout.num_ranks)
        self._watch = threading.Thread(target=self._watch_ranks, name="flowroll-ranks", daemon=True)
        self._watch.start()
        try:
            self._wait_for_all("here", _START_S)
            self._channel.announce("here")
            self.mesh = Mesh(
                config.layout,
                rank=0,
                store=PrefixStore("mesh", self._store),
                device=torch.device(config.device),
                timeout_s=config.timeout_s,
                loopback=own_ranks,
            )
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the followers that were started here, by rank."""
        return {} if self._processes is None else self._processes.pids

    def add_listener(self, listener: FailureListener) -> None:
        """Calls it, on another thread, if the replica fails; at once if it has."""
        with self._lock:
            self._listeners.append(listener)
            failure = self.failure
        if failure is not None:
            listener(failure)

    def close(self) -> None:
        """Ends the other ranks and leaves the process group; may be called twice."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        try:
            if self._is_up and self.failure is None:
                self._channel.send(encode_command(Stop()))
                self._join()
            else:
                self._channel.take_down()
        finally:
            if self._processes is not None:
                self._processes.join(_JOIN_S if self.failure is None and self._is_up else 0.0)
            self._watch.join()
            # A broken group on GPUs can be waited for without end; it goes with the process.
            if hasattr(self, "mesh") and (self.failure is None or self.mesh.device.type == "cpu"):
                self.mesh.close()

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """What every rank does at the same time. An error of this rank's alone takes the replica down: the others wait for it.

        Raises:
            RankLostError: In place of any other exception than ours.
        """
        try:
            yield
        except (ShuttingDownError, RankLostError):
            # Every rank came to the first; after the second there are no ranks.
            raise
        except Exception as error:
            raise self._lost(error) from error
        except BaseException as error:
            # A Ctrl-C in a script, say.
            self._lost(error)
            raise

    def _lost(self, error: BaseException) -> RankLostError:
        """Why this rank could not go on: a rank that ended, if one is found, else what was raised here."""
        deadline_s = time.monotonic() + _EXPLAIN_S
        while self.failure is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if self.failure is None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            self._fail(
                f"every rank must take each step within {self._config.timeout_s:g} s, got {type(error).__name__}: {reason}; "
                "see the log and restart the replica."
            )
        if self.failure is not None:
            return fresh(self.failure)
        return RankLostError("every rank must run to take a step, got the replica's end; restart it.")

    def _join(self) -> None:
        """Waits for ranks that torchrun started; the store must not go before they have read the last command."""
        deadline_s = time.monotonic() + _JOIN_S
        others = self._config.layout.num_ranks - 1
        while self._processes is None and len(self._channel.announced("stopped")) < others and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _send(self, command: Command) -> None:
        if self.failure is not None:
            raise fresh(self.failure)
        self._channel.send(encode_command(command))

    def _wait_for_all(self, stage: str, timeout_s: float = math.inf, *, poll_s: float = _POLL_S) -> None:
        """Waits for every follower to reach a stage; as long as it takes where none is given, since loading takes its time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if failed := self._channel.announced("failed"):
                rank, reason = next(iter(failed.items()))
                raise CheckpointError(f"rank {rank}: {reason}")
            if self.failure is not None:
                raise fresh(self.failure)
            missing = set(range(1, self._config.layout.num_ranks)) - set(self._channel.announced(stage))
            if not missing:
                return
            if time.monotonic() > deadline_s:
                shown = ", ".join(map(str, sorted(missing)))
                raise RankLostError(
                    f"every rank must start within {timeout_s:g} s, got no sign of rank {shown}; start them all."
                )
            time.sleep(poll_s)

    def _watch_ranks(self) -> None:
        """Looks after the other ranks until the replica closes or fails."""
        try:
            pulse = Pulse(second_connection(self._store), num_ranks=self._config.layout.num_ranks)
            while not self._closing.wait(_POLL_S) and self.failure is None:
                self._look_at_processes()
                self._look_at_pulse(pulse)
        except Exception as error:
            self._fail(f"the ranks' store must answer, got {type(error).__name__}: {error}; restart the replica.")

    def _look_at_processes(self) -> None:
        if self._processes is not None and (ended := self._processes.ended()) and not self._closing.is_set():
            rank, status = next(iter(ended.items()))
            how = f"its end by signal {-status}" if status < 0 else f"its end with status {status}"
            self._fail(f"rank {rank} must live as long as its replica, got {how}; see the log and restart the replica.")

    def _look_at_pulse(self, pulse: Pulse) -> None:
        for rank, silence_s in pulse.silent_for_s().items():
            if silence_s > self._config.timeout_s:
                self._fail(
                    f"rank {rank} must give a sign of life within {self._config.timeout_s:g} s, got {silence_s:.0f} s of "
                    "silence; look after its machine and restart the replica."
                )
                return

    def _fail(self, message: str) -> None:
        """Takes the replica down, once."""
        with self._lock:
            if self.failure is not None or self._closing.is_set():
                return
            self.failure = RankLostError(message)
            listeners = list(self._listeners)
        _log.error("%s", message)
        # A collective that waits for one of them ends now.
        if self._processes is not None:
            self._processes.kill()
        else:
            with contextlib.suppress(Exception):  # the store may be what is lost
                self._channel.take_down()
        for listener in listeners:
            listener(self.failure)
