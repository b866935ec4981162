"""Rank 0's lead over the ranks of its replica, through every sample and every change of weights.

Every rank runs the same denoising loop on the same latents; only the transformer's forward is shared out. What rank 0 decides,
which sample comes next and whether it goes on, it tells the others before it acts on it. Their life is in ranks.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

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
    UnloadAdapter,
    describe_branch,
    describe_tensor,
    env_tensors,
)
from flowroll.engine.config import Limits
from flowroll.engine.outline import check_layout, outline_model
from flowroll.engine.plan import RequestPlan
from flowroll.engine.ranks import RankConfig, Ranks
from flowroll.engine.rest import SleepMode
from flowroll.engine.shares import as_bytes
from flowroll.engine.weights import WeightFiles
from flowroll.errors import (
    EngineError,
    FlowrollError,
    InvalidRequestError,
    WeightsRejectedError,
)
from flowroll.families import ModelSpec
from flowroll.parallel.mesh import check_alone
from flowroll.parallel.rendezvous import (
    check_devices,
    check_world,
    torchrun_rank,
)
from flowroll.types import DenoisingEnv, Layout, LoraAdapter, SamplingRecord

# No request runs while the ranks read new weights.
_STAGED_POLL_S = 0.005


class Replica(Ranks):
    """The ranks of one engine, and what they are told."""

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
            rollout_debug_mode=False,
            rollout_return_denoising_env=False,
            rollout_return_dit_trajectory=False,
            rollout_return_step_indices=None,
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
            WeightsRejectedError: A rank could not, or found another save; all have dropped them.
            RankLostError: A rank ended.
        """
        # Between this rank's reading and theirs, somebody may save other weights under the same names.
        assert files.stamps is not None
        config = None if files.config is None else str(files.config)
        named = [str(file) for file in files.files]
        self._stage(StageWeights(files=named, stamps=files.stamps, config=config), field="model_path")

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
