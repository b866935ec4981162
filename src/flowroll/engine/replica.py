"""Rank 0's hold on the ranks of its replica: it starts them, leads them through every sample, notices what goes wrong.

Every rank runs the same denoising loop on the same latents; only the transformer's forward is shared out. What rank 0 decides,
which sample comes next and whether it goes on, it tells the others before it acts on it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from flowroll.engine.checkpoint import Checkpoint
from flowroll.engine.commands import (
    STAGED,
    BranchShape,
    Command,
    CommitWeights,
    DropWeights,
    FillWeights,
    GatherWeights,
    PrepareWeights,
    ReleaseMemory,
    Request,
    ResumeMemory,
    Sample,
    Score,
    Serve,
    StageAdapter,
    StageWeights,
    Stop,
    UnloadAdapter,
    describe_branch,
    describe_tensor,
    encode_command,
    env_tensors,
)
from flowroll.engine.config import Limits
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import RequestPlan
from flowroll.engine.rest import SleepMode
from flowroll.engine.shares import as_bytes
from flowroll.engine.weights import WeightFiles
from flowroll.errors import (
    CheckpointError,
    EngineError,
    FlowrollError,
    InvalidRequestError,
    RankLostError,
    ShuttingDownError,
    WeightsRejectedError,
)
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
from flowroll.types import DenoisingEnv, Layout, LoraAdapter, SamplingRecord

_log = logging.getLogger(__name__)
_POLL_S = 0.1
# No request runs while the ranks read new weights.
_STAGED_POLL_S = 0.005
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


class Replica:
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

    def serve(self, spec: ModelSpec, limits: Limits) -> None:
        """Waits until every rank has loaded its part.

        Raises:
            CheckpointError: A rank could not.
            RankLostError: A rank ended.
        """
        self._wait_for_all("loaded")
        self._is_up = True
        self._send(Serve(spec=spec, limits=limits))

    def begin(self, plan: RequestPlan, env: DenoisingEnv) -> None:
        """Makes every rank ready for the samples of a request."""
        # What the others need to take the same steps. They record nothing.
        params = replace(
            plan.params,
            seed=None,
            seeds=plan.seeds,
            num_outputs_per_prompt=None,
            request_id=plan.request_id,
            debug_mode=False,
            return_denoising_env=False,
            return_dit_trajectory=False,
            return_step_indices=None,
        )
        positive, negative = self._described(env)
        self._send(Request(params=params, positive=positive, negative=negative))
        self._broadcast(env_tensors(env))

    def begin_scores(
        self,
        record: SamplingRecord,
        sde_step_indices: tuple[int, ...] | None,
        steps: Sequence[int],
        latents: torch.Tensor,
        env: DenoisingEnv,
    ) -> None:
        """Makes every rank run these steps of one sample."""
        positive, negative = self._described(env)
        self._send(
            Score(
                record=record,
                sde_step_indices=sde_step_indices,
                steps=tuple(steps),
                latents=describe_tensor(latents),
                positive=positive,
                negative=negative,
            )
        )
        self._broadcast([*env_tensors(env), latents])

    def _described(self, env: DenoisingEnv) -> tuple[BranchShape, BranchShape | None]:
        # What commands.py does not carry.
        assert env.guidance is None and not env.image_kwargs
        negative = None if env.neg_cond_kwargs is None else describe_branch(dict(env.neg_cond_kwargs))
        return describe_branch(dict(env.pos_cond_kwargs)), negative

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        # Where broadcast needs them to be.
        assert all(tensor.device.type == self.mesh.device.type for tensor in tensors)
        for tensor in tensors:
            self.mesh.broadcast(tensor.contiguous())

    def start_sample(self, seed: int) -> None:
        """Makes every rank take this sample's steps."""
        self._send(Sample(seed=seed))

    def goes_on(self, stop: bool) -> bool:
        """Tells every rank before a step whether to take it."""
        return not self.mesh.broadcast_flag(stop)

    def finish_sample(self, latents: torch.Tensor) -> None:
        """Checks that every rank came to the same latents.

        Raises:
            EngineError: It did not: a device or a library differs.
        """
        with self.in_step():
            odd = self.mesh.odd_ranks(latents)
            self._channel.forget()
        if odd:
            shown = ", ".join(map(str, odd))
            raise EngineError(
                f"every rank must come to the same latents, got others on rank {shown}; use equal devices and library versions."
            )

    def stage_weights(self, files: WeightFiles) -> None:
        """Makes every other rank read new weights of the transformer beside the old ones.

        Raises:
            WeightsRejectedError: A rank could not; all have dropped them.
            RankLostError: A rank ended.
        """
        config = None if files.config is None else str(files.config)
        self._stage(StageWeights(files=[str(file) for file in files.files], config=config), field="model_path")

    def share_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sends every other rank new weights of the transformer, of which it keeps its part beside the old ones.

        Args:
            tensors: Whole, by name, in the dtype of the weights.

        Raises:
            WeightsRejectedError: A rank has no memory for them; all have dropped them.
            RankLostError: A rank ended.
        """
        described = {name: describe_tensor(tensor) for name, tensor in tensors.items()}
        self._stage(PrepareWeights(tensors=described))
        with self.in_step():
            self._send(FillWeights())
            for tensor in tensors.values():
                self.mesh.broadcast(as_bytes(tensor.to(self.mesh.device)))
            self._channel.forget()

    def load_adapter(self, folder: Path, about: LoraAdapter) -> None:
        """Makes every other rank load an adapter, or none.

        Raises:
            WeightsRejectedError: A rank could not; all have dropped it.
            RankLostError: A rank ended.
        """
        self._stage(StageAdapter(folder=str(folder), about=about), field="lora_path")
        self.commit_weights()

    def unload_adapter(self, name: str) -> None:
        """Makes every other rank forget an adapter."""
        self._send(UnloadAdapter(name=name))

    def release_memory(self, mode: SleepMode) -> None:
        """Makes every other rank release the memory of its weights, or none.

        Raises:
            EngineError: A rank could not.
            RankLostError: A rank ended.
        """
        self._stage(ReleaseMemory(mode=mode), error=EngineError)
        self.commit_weights()

    def resume_memory(self) -> None:
        """Makes every other rank take its weights into memory again, or none; errors as for `release_memory`."""
        self._stage(ResumeMemory(), error=EngineError)
        self.commit_weights()

    def _stage(self, command: Command, *, field: str | None = None, error: type[FlowrollError] = WeightsRejectedError) -> None:
        self._send(command)
        # No collective: reading takes as long as it takes, and a rank that reads gives signs of life.
        with self.in_step():
            self._wait_for_all(STAGED, poll_s=_STAGED_POLL_S)
        refused = {rank: reason for rank, reason in self._channel.announced(STAGED).items() if reason}
        self._channel.retract(STAGED)
        self._channel.forget()
        if refused:
            self.drop_weights()
            rank, reason = next(iter(refused.items()))
            raise error(f"rank {rank}: {reason}", field=field)

    def commit_weights(self) -> None:
        """Makes every other rank take what it has read. One that cannot ends, and the replica with it."""
        self._send(CommitWeights())

    def drop_weights(self) -> None:
        """Makes every other rank forget what it has read."""
        self._send(DropWeights())

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Makes every rank go through `whole_tensors` of its transformer, as this one does in the block."""
        with self.in_step():
            self._send(GatherWeights())
            yield
            self._channel.forget()

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
        return self.failure or RankLostError("every rank must run to take a step, got the replica's end; restart it.")

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

    def _join(self) -> None:
        """Waits for ranks that torchrun started; the store must not go before they have read the last command."""
        deadline_s = time.monotonic() + _JOIN_S
        others = self._config.layout.num_ranks - 1
        while self._processes is None and len(self._channel.announced("stopped")) < others and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _send(self, command: Command) -> None:
        if self.failure is not None:
            raise self.failure
        self._channel.send(encode_command(command))

    def _wait_for_all(self, stage: str, timeout_s: float = math.inf, *, poll_s: float = _POLL_S) -> None:
        """Waits for every follower to reach a stage; as long as it takes where none is given, since loading takes its time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if failed := self._channel.announced("failed"):
                rank, reason = next(iter(failed.items()))
                raise CheckpointError(f"rank {rank}: {reason}")
            if self.failure is not None:
                raise self.failure
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


def open_replica(
    checkpoint: Checkpoint, layout: Layout, limits: Limits, *, dtype: torch.dtype, device: torch.device, timeout_s: float
) -> Replica:
    """The other ranks, started here or by torchrun, once the layout is known to fit.

    Raises:
        InvalidRequestError: The layout does not fit the model or the machine.
        EngineError: The process is a member of a process group already.
        RankLostError: A rank ended before it was up.
    """
    check_alone()
    check_layout(outline_model(checkpoint, device=device, dtype=dtype), layout, limits)
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
    return Replica(config, own_ranks=place is None)
