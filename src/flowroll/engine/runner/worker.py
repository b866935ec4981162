"""The process of a rank other than 0: it loads its part of the transformer, then handles rank 0's messages until `Stop`.

Between messages it does not wait in a collective, which would time out: rank 0 may send nothing for any length of time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from flowroll.checkpoints import find_checkpoint
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.config import Limits, resolve_device, resolve_dtype
from flowroll.engine.loading import LoadedModel, build_model, load_transformer
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import plan_request
from flowroll.engine.policies.held import HeldWeights
from flowroll.engine.runner import messages
from flowroll.engine.runner.changes import Change, RankWeights
from flowroll.engine.runner.messages import Message, Serve, Stop, decode_message
from flowroll.engine.runner.model_runner import ModelRunner
from flowroll.engine.runner.rank_group import ERRED, STAGED, RankConfig
from flowroll.engine.runner.sample import Conditioning
from flowroll.engine.weights.offload import WeightOffload
from flowroll.engine.weights.staged import slots_of
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
        transformer = model.transformer
        offload = WeightOffload(
            lambda: [*transformer.parameters(), *transformer.buffers(), *model.adapters.parameters()],
            lambda: [slot.live for slot in slots_of(transformer).values()],
        )
        self._weights = RankWeights(model=model, held=HeldWeights(transformer), offload=offload, mesh=mesh)
        # Puts the staged change into effect.
        self._finish: Callable[[], Any] | None = None

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
            case messages.Recompute():
                runner.use_threads(message.num_threads)
                self._recompute(message)
            case Change():
                self._prepare(message)
            case messages.ReceiveTensors():
                assert self._finish is not None
                self._finish = self._finish()
            case messages.Commit():
                assert self._finish is not None
                self._finish()
                self._finish = None
            case messages.DropStaged():
                self._finish = None
            case messages.GatherWeights(names=names):
                for _ in whole_tensors(model.transformer, frozenset(names)):
                    pass
            case _:
                raise AssertionError(f"{type(message).__name__} is no message for a running rank")

    def _recompute(self, message: messages.Recompute) -> None:
        model, record = self._model, message.record
        env, latents = message.env.empty(model.device), message.latents.empty(model.device)
        self._receive([*(tensor for _, tensor in env.tensors()), latents])
        recipe = Recipe.of(record, model.family, sde_step_indices=message.sde_step_indices, device=model.device)
        transformer = model.adapters.transformer(None if record.lora is None else record.lora.name, message.policy)
        self._runner.recompute(recipe, transformer, message.step, latents, env)

    def _prepare(self, change: Change) -> None:
        """Prepares a change and announces whether that succeeded; rank 0 decides whether it takes effect."""
        try:
            self._finish = change.prepare(self._weights)
        except (WeightsRejectedError, EngineError) as error:
            self._channel.announce(STAGED, error.message)
        else:
            self._channel.announce(STAGED)

    def _receive(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._mesh.broadcast(tensor)
