"""Every rank but 0: loads its part of the transformer and takes the steps that rank 0 leads it through."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from flowroll.engine import denoising
from flowroll.engine.adapter_files import find_adapter, read_adapter, refused
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.commands import (
    STAGED,
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
    decode_command,
    empty_env,
    env_tensors,
)
from flowroll.engine.config import Limits, resolve_device, resolve_dtype
from flowroll.engine.denoising import DenoisingTask
from flowroll.engine.loading import LoadedModel, build_model, load_transformer
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import plan_request
from flowroll.engine.ranks import RankConfig
from flowroll.engine.rest import Rest
from flowroll.engine.scoring import velocities_of
from flowroll.engine.shares import Shares, prepare_shares
from flowroll.engine.weights import StagedWeights, WeightFiles, stage_weights
from flowroll.errors import EngineError, FlowrollError, InvalidRequestError, WeightsRejectedError
from flowroll.families import Recipe
from flowroll.parallel.channel import Channel
from flowroll.parallel.linears import whole_tensors
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.processes import ORPHANED
from flowroll.parallel.rendezvous import check_world, rank_device, second_connection, torchrun_rank, torchrun_store
from flowroll.types import Layout


class _Stopped(Exception):
    """Rank 0 ended the sample before its last step."""


def follow(
    model: str | Path,
    *,
    variant: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    layout: Layout,
    rank_timeout_s: float = 60.0,
) -> None:
    """Follows the `Engine` that rank 0 of a torchrun job opens with these same arguments, until that engine closes.

    Raises:
        InvalidRequestError: torchrun did not start this process, or started another number of them.
        CheckpointError: This rank cannot load its part; rank 0 raises it too.
    """
    place = torchrun_rank()
    if place is None or place.rank == 0:
        raise InvalidRequestError(
            "follow must be called on a rank above 0 of a torchrun job, got another process; open an Engine."
        )
    check_world(layout, place)
    first = resolve_device(device)
    own = resolve_device(str(rank_device(first, place.local_rank)))
    folder = Path(model)
    checkpoint = examine_checkpoint(folder, variant=variant)
    # As rank 0 does, which will not be there if it refuses.
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
    follow_rank_0(config, torchrun_store(), own)


def follow_rank_0(config: RankConfig, store: Store, device: torch.device) -> None:
    """Takes part in a replica until rank 0 ends it.

    Args:
        config: Of this rank.
        store: Shared by all ranks.
        device: Of this rank.

    Raises:
        FlowrollError: This rank cannot load its part.
    """
    channel = Channel(store, rank=config.rank, num_ranks=config.layout.num_ranks)
    # Not an exit: the main thread may be in a collective that never returns.
    channel.beat(second_connection(store), lambda: os._exit(ORPHANED))
    channel.announce("here")
    channel.wait_for("here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
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
        channel.announce("loaded")
        serve = decode_command(channel.receive())
        if isinstance(serve, Serve):
            model = build_model(checkpoint, transformer, serve.spec, device=device, dtype=dtype, mesh=mesh)
            with torch.no_grad():
                _obey(model, serve, channel, mesh)


def _obey(model: LoadedModel, serve: Serve, channel: Channel, mesh: Mesh) -> None:
    task: DenoisingTask | None = None
    # Puts in place what was read.
    take: Callable[[], object] | None = None
    rest = Rest(lambda: [*model.transformer.parameters(), *model.adapters.parameters()])
    shares: Shares | None = None
    while True:
        command = decode_command(channel.receive())
        match command:
            case Request():
                env = empty_env(command, model.device)
                _receive(env_tensors(env), mesh)
                plan = plan_request(command.params, model, serve.limits)
                task = DenoisingTask.build(plan, model, env, plan.record)
            case Sample():
                assert task is not None
                _take_sample(task, command.seed, mesh)
            case Score():
                _take_scores(model, command, mesh)
            case StageWeights():
                take = _stage(functools.partial(_read_weights, model, command), channel)
            case StageAdapter():
                take = _stage(functools.partial(_read_adapter, model, command), channel)
            case ReleaseMemory():
                take = _stage(functools.partial(rest.prepare_release, command.mode), channel)
            case ResumeMemory():
                take = _stage(rest.prepare_resume, channel)
            case PrepareWeights():
                shares = prepare_shares(model.transformer, command, channel)
            case FillWeights():
                assert shares is not None
                take, shares = _taking(model, shares.fill(mesh)), None
            case CommitWeights():
                assert take is not None
                take()
                take = None
            case DropWeights():
                take = shares = None
            case UnloadAdapter():
                model.adapters.drop(command.name)
            case GatherWeights():
                for _ in whole_tensors(model.transformer):
                    pass
            case Stop():
                channel.stop()
                channel.announce("stopped")
                return
            case Serve():
                raise AssertionError("served twice")


def _stage(prepare: Callable[[], Callable[[], object]], channel: Channel) -> Callable[[], object] | None:
    """Prepares a change and says how it went; whether anybody makes it is rank 0's to say."""
    try:
        take = prepare()
    except (WeightsRejectedError, EngineError) as error:
        channel.announce(STAGED, error.message)
        return None
    channel.announce(STAGED)
    return take


def _read_weights(model: LoadedModel, command: StageWeights) -> Callable[[], None]:
    files = WeightFiles(
        module="transformer",
        files=tuple(map(Path, command.files)),
        config=None if command.config is None else Path(command.config),
        stamps=command.stamps,
    )
    return _taking(model, stage_weights(model.transformer, files))


def _taking(model: LoadedModel, staged: StagedWeights) -> Callable[[], None]:
    return lambda: staged.commit(lambda: model.adapters.adopt(model.adapters.over_new_base()))


def _read_adapter(model: LoadedModel, command: StageAdapter) -> Callable[[], None]:
    about, files = command.about, find_adapter(command.folder)
    # Rank 0 has counted its bytes.
    adapter = model.adapters.stage(read_adapter(files, max_bytes=sys.maxsize), name=about.name, merged=about.merged)
    if adapter.about.sha256 != about.sha256:
        raise refused(
            f"{files.folder} must hold the same adapter on every rank, got another one; save it where all ranks read."
        )
    return lambda: model.adapters.put(model.adapters.finished(adapter, about.version))


def _receive(tensors: Sequence[Tensor], mesh: Mesh) -> None:
    for tensor in tensors:
        mesh.broadcast(tensor)


def _check_stop(mesh: Mesh) -> None:
    if mesh.broadcast_flag(False):
        raise _Stopped


def _take_sample(task: DenoisingTask, seed: int, mesh: Mesh) -> None:
    sample = denoising.start(task, seed)
    try:
        denoising.denoise(task, sample, functools.partial(_check_stop, mesh))
    except _Stopped:
        return
    mesh.odd_ranks(sample.latents)


def _take_scores(model: LoadedModel, command: Score, mesh: Mesh) -> None:
    env, latents = empty_env(command, model.device), command.latents.empty(model.device)
    _receive([*env_tensors(env), latents], mesh)
    recipe = Recipe.of(command.record, model.family, sde_step_indices=command.sde_step_indices, device=model.device)
    transformer = model.adapters.transformer(None if command.record.lora is None else command.record.lora.name)
    try:
        velocities = velocities_of(
            model, transformer, recipe, latents, command.steps, env, functools.partial(_check_stop, mesh)
        )
    except _Stopped:
        return
    mesh.odd_ranks(torch.stack(velocities))
