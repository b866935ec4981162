"""The process of a rank other than 0: it loads its part of the transformer, then handles rank 0's messages until `Stop`.

Between messages it does not wait in a collective, which would time out: rank 0 may send nothing for any length of time.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from flowroll.checkpoints import find_checkpoint
from flowroll.engine.adapters.files import AdapterFiles, read_adapter, refused
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import Limits, resolve_device, resolve_dtype
from flowroll.engine.loading import LoadedModel, build_model, load_transformer
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import plan_request
from flowroll.engine.policies.held import HeldWeights
from flowroll.engine.runner import messages
from flowroll.engine.runner.messages import Message, Serve, Stop, decode_message
from flowroll.engine.runner.model_runner import ModelRunner, Recomputation
from flowroll.engine.runner.rank_group import STAGED, RankConfig
from flowroll.engine.runner.rank_watch import ERRED
from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.shares import Shares
from flowroll.engine.weights.staged import StagedWeights, WeightFiles, rejected, slots_of, stage_weights
from flowroll.errors import EngineError, FlowrollError, InvalidRequestError, WeightsRejectedError
from flowroll.exact import use_exact_kernels
from flowroll.families import Recipe
from flowroll.parallel.bound import unbind
from flowroll.parallel.channel import Channel
from flowroll.parallel.linears import whole_tensors
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.processes import ORPHANED
from flowroll.parallel.rendezvous import check_world, rank_device, second_connection, torchrun_rank, torchrun_store
from flowroll.types import Layout


def follow(
    model: str | Path,
    *,
    variant: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    layout: Layout,
    rank_timeout_s: float = 60.0,
) -> None:
    """Runs this process as a rank of the `Engine` that rank 0 of a torchrun job opens, until that engine closes.

    The arguments must be those that rank 0 opens its engine with.

    Raises:
        InvalidRequestError: torchrun did not start this process, or the number of processes does not fit the layout.
        CheckpointError: This rank cannot load its part; rank 0 raises the error too.
    """
    place = torchrun_rank()
    if place is None or place.rank == 0:
        raise InvalidRequestError(
            "follow must be called on a rank above 0 of a torchrun job, got another process; open an Engine."
        )
    check_world(layout, place)
    first = resolve_device(device)
    own = resolve_device(str(rank_device(first, place.local_rank)))
    folder = find_checkpoint(model)
    checkpoint = examine_checkpoint(folder, variant=variant)
    use_exact_kernels(own)
    # Rank 0 makes the same check. If it refuses the layout, it ends, and this rank would wait for it in vain.
    check_layout(outline_model(checkpoint, device=own, dtype=resolve_dtype(dtype, own)), layout, Limits())
    config = RankConfig(
        model=str(folder),
        variant=checkpoint.variant,
        dtype=str(resolve_dtype(dtype, own)).removeprefix("torch."),
        device=str(own),
        layout=layout,
        timeout_s=rank_timeout_s,
        num_threads=torch.get_num_threads(),
        rank=place.rank,
    )
    run_worker(config, torchrun_store(), own)


def run_worker(config: RankConfig, store: Store, device: torch.device) -> None:
    """Runs one rank of an engine until rank 0 ends it.

    Args:
        config: The configuration of this rank.
        store: The store that all ranks share.
        device: The device of this rank.

    Raises:
        FlowrollError: This rank cannot load its part.
    """
    channel = Channel(store, rank=config.rank, num_ranks=config.layout.num_ranks)
    # `os._exit`, because the main thread may be in a collective that never returns.
    channel.beat(second_connection(store), lambda: os._exit(ORPHANED))
    channel.announce("here")
    channel.wait_for("here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    use_exact_kernels(device)
    with Mesh(
        config.layout,
        rank=config.rank,
        store=PrefixStore("mesh", store),
        device=device,
        timeout_s=config.timeout_s,
        loopback=config.port is not None,
    ) as mesh:
        try:
            checkpoint = examine_checkpoint(Path(config.model), variant=config.variant)
            dtype = resolve_dtype(config.dtype, device)
            transformer = load_transformer(checkpoint, dtype, mesh).to(device)
        except FlowrollError as error:
            channel.announce("failed", error.message)
            raise
        # From here on this rank's own threads notice the end of rank 0, whose thread that started this process may end now.
        unbind()
        channel.announce("loaded")
        serve = decode_message(channel.receive())
        if isinstance(serve, Serve):
            model = build_model(checkpoint, transformer, serve.spec, device=device, dtype=dtype, mesh=mesh)
            _work(Worker(model, serve.limits, channel, mesh), channel)


def _work(worker: Worker, channel: Channel) -> None:
    try:
        with torch.no_grad():
            while not isinstance(message := decode_message(channel.receive()), Stop):
                worker.apply(message)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        channel.announce(ERRED, f"{type(error).__name__}: {reason}")
        raise
    channel.stop()
    channel.announce("stopped")


class Worker:
    """Applies rank 0's messages on its own rank.

    Args:
        model: This rank's part of the model.
        limits: The limits of one request.
        channel: The channel on which messages arrive.
        mesh: The collectives of all ranks.
    """

    def __init__(self, model: LoadedModel, limits: Limits, channel: Channel, mesh: Mesh) -> None:
        self._model, self._limits, self._channel, self._mesh = model, limits, channel, mesh
        self._runner = ModelRunner(model, mesh.odd_ranks)
        self._held = HeldWeights(model.transformer)
        transformer = model.transformer
        self._offload = WeightOffload(
            lambda: [*transformer.parameters(), *transformer.buffers(), *model.adapters.parameters()],
            lambda: [slot.live for slot in slots_of(transformer).values()],
        )
        # Puts the staged change into effect.
        self._commit: Callable[[], object] | None = None
        self._shares: Shares | None = None

    def apply(self, message: Message) -> None:
        """Applies one message."""
        runner, model = self._runner, self._model
        match message:
            case messages.AddRequest(id=number, params=params, env=shape):
                env = shape.empty(model.device)
                latents = None if message.latents is None else message.latents.empty(model.device)
                self._receive([*(tensor for _, tensor in env.tensors()), *([] if latents is None else [latents])])
                if latents is not None:
                    params = replace(params, latents=latents, start_step=message.start_step)
                plan = plan_request(params, model, self._limits, images=message.images)
                runner.add_request(number, Conditioning.build(plan, model, env, plan.record))
            case messages.StartSample(id=number, request=request, planned=planned):
                runner.start_sample(number, request, planned)
            case messages.StartChild(id=number, request=request, planned=planned, parent=parent):
                runner.start_child(number, request, planned, parent)
            case messages.Step(samples=samples, num_threads=num_threads):
                runner.use_threads(num_threads)
                for error in runner.step(samples).failures.values():
                    raise error
            case messages.DropRequest(id=number):
                runner.drop_request(number)
            case messages.BeginRecomputation():
                runner.begin_recomputation(message.id, self._recomputation(message))
            case messages.Recompute(id=number, row=row, num_threads=num_threads):
                runner.use_threads(num_threads)
                runner.recompute(number, row)
            case messages.EndRecomputation(id=number):
                runner.end_recomputation(number)
            case _:
                self._change_model(message)

    def _change_model(self, message: Message) -> None:
        model = self._model
        match message:
            case messages.StageWeights():
                self._stage(functools.partial(_read_weights, model, self._offload, message))
            case messages.StageTensors(tensors=tensors):
                self._stage(functools.partial(self._make_room, tensors))
            case messages.ReceiveTensors():
                assert self._shares is not None
                self._commit, self._shares = _taking(model, self._offload, self._shares.fill(self._mesh)), None
            case messages.StageAdapter():
                self._stage(functools.partial(_read_adapter, model, message))
            case messages.StageRelease(mode=mode):
                self._stage(functools.partial(self._offload.prepare_release, mode))
            case messages.StageResume():
                self._stage(self._offload.prepare_resume)
            case messages.Commit():
                assert self._commit is not None
                self._commit()
                self._commit = None
            case messages.DropStaged():
                self._commit = self._shares = None
            case messages.UnloadAdapter(name=name):
                model.adapters.drop(name)
            case messages.StagePolicy(name=name, source=source, decay=None):
                self._stage(functools.partial(self._held.prepare_copy, name, source))
            case messages.StagePolicy(name=name, source=source, decay=float() as decay):
                self._stage(functools.partial(self._held.prepare_average, name, source, decay))
            case messages.StagePolicyAdapter():
                self._stage(functools.partial(_average_adapter, model, message))
            case messages.StageExchange(name=place):
                self._stage(functools.partial(self._held.prepare_exchange, place))
            case messages.DropPolicy(name=name):
                self._held.drop(name)
            case messages.GatherWeights(names=names):
                for _ in whole_tensors(model.transformer, frozenset(names)):
                    pass
            case _:
                raise AssertionError(f"{type(message).__name__} is no message for a running rank")

    def _recomputation(self, message: messages.BeginRecomputation) -> Recomputation:
        model = self._model
        env, latents = message.env.empty(model.device), message.latents.empty(model.device)
        self._receive([*(tensor for _, tensor in env.tensors()), latents])
        record = message.record
        recipe = Recipe.of(record, model.family, sde_step_indices=message.sde_step_indices, device=model.device)
        transformer = model.adapters.transformer(None if record.lora is None else record.lora.name, message.policy)
        return Recomputation(recipe=recipe, transformer=transformer, steps=message.steps, latents=latents, env=env)

    def _stage(self, prepare: Callable[[], Callable[[], object] | None]) -> None:
        """Prepares a change and announces whether that succeeded; rank 0 decides whether it takes effect."""
        try:
            self._commit = prepare()
        except (WeightsRejectedError, EngineError) as error:
            self._channel.announce(STAGED, error.message)
        else:
            self._channel.announce(STAGED)

    def _make_room(self, tensors: dict[str, messages.TensorShape]) -> None:
        try:
            self._shares = Shares(tensors, slots_of(self._model.transformer))
        except (MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
            raise rejected(error) from error

    def _receive(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._mesh.broadcast(tensor)


def _read_weights(model: LoadedModel, offload: WeightOffload, message: messages.StageWeights) -> Callable[[], None]:
    files = WeightFiles(
        module="transformer",
        files=tuple(map(Path, message.files)),
        config=None if message.config is None else Path(message.config),
        stamps=message.stamps,
    )
    return _taking(model, offload, stage_weights(model.transformer, files))


def _taking(model: LoadedModel, offload: WeightOffload, staged: StagedWeights) -> Callable[[], None]:
    def conclude() -> None:
        model.adapters.adopt(model.adapters.over_new_base())
        # Rank 0 has checked that nothing is missing.
        offload.note_weights()

    return lambda: staged.commit(conclude)


def _average_adapter(model: LoadedModel, message: messages.StagePolicyAdapter) -> Callable[[], None]:
    adapter = model.adapters.averaged(message.name, message.source, message.decay)
    return lambda: model.adapters.put(replace(adapter, about=replace(adapter.about, version=message.version)))


def _read_adapter(model: LoadedModel, message: messages.StageAdapter) -> Callable[[], None]:
    about, files = message.about, AdapterFiles(config=Path(message.config), weights=Path(message.weights))
    # Without a limit, because rank 0 has checked the number of bytes.
    adapter = model.adapters.stage(read_adapter(files, max_bytes=sys.maxsize), name=about.name, merged=about.merged)
    if adapter.about.sha256 != about.sha256:
        raise refused(
            f"{files.weights} must hold the same adapter on every rank, got another one; save it where all ranks read."
        )
    return lambda: model.adapters.put(model.adapters.finished(adapter, about.version))
