"""The other ranks of an engine as processes: rank 0 starts them, sends them messages, notices lost ones, and ends them."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from typing_extensions import override

from flowroll.engine.checkpoint import Checkpoint
from flowroll.engine.config import Limits
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.runner.changes import AnyChange
from flowroll.engine.runner.messages import DropStaged, Message, Serve, Stop, encode_message
from flowroll.engine.runner.peers import Peers
from flowroll.errors import CheckpointError, InvalidRequestError, RankLostError, fresh
from flowroll.families import ModelSpec
from flowroll.parallel.channel import Channel, Pulse
from flowroll.parallel.mesh import Mesh, check_alone
from flowroll.parallel.processes import RankProcesses
from flowroll.parallel.rendezvous import (
    check_devices,
    check_world,
    second_connection,
    serve_store,
    torchrun_rank,
    torchrun_store,
)
from flowroll.types import Layout

_log = logging.getLogger(__name__)
_POLL_S = 0.1
# Polled more often, because no request runs while the ranks prepare a change.
_STAGED_POLL_S = 0.005
# How long to look, after a failed collective, for a rank that has ended and so explains the failure.
_EXPLAIN_S = 2.0
_JOIN_S = 5.0
# How long the processes of a group may take to start, before any of them loads.
_START_S = 300.0
# A rank announces this once it has tried to prepare a change, with an empty text or the reason why it could not.
STAGED = "staged"
# A rank announces this, with the reason, before it ends because of an error.
ERRED = "erred"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """The configuration that every rank of an engine is started with.

    Attributes:
        model: The checkpoint folder.
        variant: The variant of the model family.
        dtype: The dtype of the weights, e.g. "bfloat16".
        device: The device of rank 0, e.g. "cuda:0".
        layout: The degrees of the mesh axes.
        timeout_s: How long ranks wait for each other, in seconds.
        num_threads: The number of CPU threads of each rank while it loads; later, each step's message gives the number.
        rank: The rank of this process.
        port: The port of rank 0's store on this machine; None if torchrun's store is used.
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


class RankGroup(Peers):
    """The other ranks of an engine of several: it starts or joins them, and reaches them from rank 0.

    Args:
        config: The configuration of rank 0.
        own_ranks: Whether to start the other ranks here; otherwise torchrun has started them.

    Raises:
        RankLostError: A rank ended before it was up.
    """

    def __init__(self, config: RankConfig, *, own_ranks: bool) -> None:
        super().__init__()
        self._config = config
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
        self._watching = threading.Thread(target=self._watch, name="flowroll-ranks", daemon=True)
        self._watching.start()
        try:
            self._wait_for_all("here", _START_S)
            self._channel.announce("here")
            self.mesh = self._mesh = Mesh(
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
    @override
    def pids(self) -> dict[int, int]:
        return {} if self._processes is None else self._processes.pids

    @property
    @override
    def received_bytes(self) -> Mapping[str, int]:
        return {str(axis): count for axis, count in self._mesh.received_bytes.items()}

    @override
    def serve(self, spec: ModelSpec, limits: Limits) -> None:
        self._wait_for_all("loaded")
        self._is_up = True
        self.send(Serve(spec=spec, limits=limits))

    @override
    def send(self, message: Message, tensors: Iterable[Tensor] = ()) -> None:
        if self.failure is not None:
            raise fresh(self.failure)
        self._channel.send(encode_message(message))
        for tensor in tensors:
            # A broadcast needs the tensor on the mesh's kind of device.
            assert tensor.device.type == self._mesh.device.type
            self._mesh.broadcast(tensor.contiguous())

    @override
    def compare(self, tensor: Tensor) -> list[int]:
        odd = self._mesh.odd_ranks(tensor)
        # Every rank has reached this collective, so every rank has received all earlier messages.
        self._channel.forget()
        return odd

    @override
    def stage(self, change: AnyChange) -> None:
        self.send(change)
        # Not a collective, which would time out: reading may take long, and a rank that reads still gives signs of life.
        with self.together():
            self._wait_for_all(STAGED, poll_s=_STAGED_POLL_S)
        refused = {rank: reason for rank, reason in self._channel.announced(STAGED).items() if reason}
        self._channel.retract(STAGED)
        self._channel.forget()
        if refused:
            self.send(DropStaged())
            rank, reason = next(iter(refused.items()))
            raise change.error(f"rank {rank}: {reason}", field=change.field)

    @override
    def lose(self, message: str) -> None:
        with self._lock:
            if self.failure is not None or self._closing.is_set():
                return
            self.failure = RankLostError(message)
            listeners = list(self._listeners)
        _log.error("%s", message)
        # This ends any collective that waits for one of them.
        if self._processes is not None:
            self._processes.kill()
        else:
            with contextlib.suppress(Exception):  # the store may be what is lost
                self._channel.take_down()
        for listener in listeners:
            listener(self.failure)

    @override
    def close(self) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        try:
            if self._is_up and self.failure is None:
                self._channel.send(encode_message(Stop()))
                self._join()
            else:
                self._channel.take_down()
        finally:
            if self._processes is not None:
                self._processes.join(_JOIN_S if self.failure is None and self._is_up else 0.0)
            self._watching.join()
            # Closing a broken process group on GPUs could block forever, so it is left to the end of the process.
            if self.mesh is not None and (self.failure is None or self.mesh.device.type == "cpu"):
                self.mesh.close()

    @override
    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Takes the engine down after an error on this rank, because the others wait for it.

        A forward that ran out of memory on one rank is among these errors: the other ranks are in the middle of a collective
        that this rank will never join, and cannot be called back from it.

        Raises:
            RankLostError: The operation failed. It replaces the exception that was raised, which is its cause.
        """
        try:
            yield
        except RankLostError:
            # The ranks are down already.
            raise
        except Exception as error:
            raise self._lost(error) from error
        except BaseException as error:
            # For example a KeyboardInterrupt in a script.
            self._lost(error)
            raise

    def _lost(self, error: BaseException) -> RankLostError:
        """Returns why this rank could not go on: the end of another rank if one is found, otherwise the error raised here."""
        deadline_s = time.monotonic() + _EXPLAIN_S
        while self.failure is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if self.failure is None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            self.lose(
                f"every rank must take each step within {self._config.timeout_s:g} s, got {type(error).__name__}: {reason}; "
                "see the log and restart the engine."
            )
        if self.failure is not None:
            return fresh(self.failure)
        return RankLostError("every rank must run to take a step, got the engine's end; restart it.")

    def _watch(self) -> None:
        """Watches the other ranks until the engine closes or one of them is lost; the target of a thread."""
        try:
            # Signs of life use a second connection to the store.
            pulse = Pulse(second_connection(self._store), num_ranks=self._config.layout.num_ranks)
            while not self._closing.wait(_POLL_S):
                if reason := self._ended_rank() or self._silent_rank(pulse):
                    self.lose(reason)
                    return
        except Exception as error:
            self.lose(f"the ranks' store must answer, got {type(error).__name__}: {error}; restart the engine.")

    def _ended_rank(self) -> str | None:
        if self._processes is None or not (ended := self._processes.ended()) or self._closing.is_set():
            return None
        rank, status = next(iter(ended.items()))
        if reason := self._channel.announced(ERRED).get(rank):
            return f"rank {rank} must run every step, got {reason}; see the log and restart the engine."
        how = f"its end by signal {-status}" if status < 0 else f"its end with status {status}"
        return f"rank {rank} must live as long as its engine, got {how}; see the log and restart the engine."

    def _silent_rank(self, pulse: Pulse) -> str | None:
        for rank, silence_s in pulse.silent_for_s().items():
            if silence_s > self._config.timeout_s:
                return (
                    f"rank {rank} must give a sign of life within {self._config.timeout_s:g} s, got {silence_s:.0f} s of "
                    "silence; look after its machine and restart the engine."
                )
        return None

    def _join(self) -> None:
        """Waits for ranks that torchrun started, so that the store exists until they have read the last message."""
        deadline_s = time.monotonic() + _JOIN_S
        others = self._config.layout.num_ranks - 1
        while self._processes is None and len(self._channel.announced("stopped")) < others and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _wait_for_all(self, stage: str, timeout_s: float = math.inf, *, poll_s: float = _POLL_S) -> None:
        """Waits until every other rank has reached a stage; by default without a time limit, since loading can take long."""
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


def open_peers(
    checkpoint: Checkpoint, layout: Layout, limits: Limits, *, dtype: torch.dtype, device: torch.device, timeout_s: float
) -> Peers:
    """Checks that the layout fits, then starts the other ranks or connects to those that torchrun started.

    Raises:
        InvalidRequestError: The layout does not fit the model or the machine.
        EngineError: The process is a member of a process group already.
        RankLostError: A rank ended before it was up.
    """
    if layout.num_ranks == 1:
        return Peers()
    check_alone()
    place = torchrun_rank()
    if place is None:
        check_devices(layout, device, torch.cuda.device_count())
    else:
        check_world(layout, place)
        if place.rank > 0:
            raise InvalidRequestError(
                f"an Engine of several ranks must be opened on rank 0 alone, got rank {place.rank}; call "
                "flowroll.engine.follow there."
            )
    # Last, since it asks the kernels.
    check_layout(outline_model(checkpoint, device=device, dtype=dtype), layout, limits)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = RankConfig(
        model=str(checkpoint.folder),
        variant=checkpoint.variant,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        layout=layout,
        timeout_s=timeout_s,
        num_threads=torch.get_num_threads(),
    )
    return RankGroup(config, own_ranks=place is None)
