"""The trainer's side of a replica: what verl's workers call to send weights to its server, and to have it sleep and wake.

Importing it imports verl. Reference: `BaseRollout` and `ServerAdapter` of verl 0.9.1, and `update_weights` in
verl_omni/workers/engine_workers.py, verl-project/verl-omni at a1139baf.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import ray
from torch import Tensor
from verl.workers.rollout.base import BaseRollout

from flowroll.errors import InvalidRequestError
from flowroll.integrations.verl_omni.names import server_name
from flowroll.integrations.verl_omni.options import read
from flowroll.integrations.verl_omni.transfer import zmq_handle
from flowroll.integrations.verl_omni.weights import send_weights

_DEFAULT_BUCKET_MB = 2048


class FlowrollRollout(BaseRollout):  # type: ignore[misc]  # verl has no types
    """Sends the weights of a trainer's rank to the server of its replica.

    The first rank of each replica sends; the others take part in the gathering of the weights, and drop them.

    Args:
        config: The configuration of the rollout.
        model_config: The configuration of the model.
        device_mesh: The mesh of the ranks; not used, and None where a replica has devices of its own.
        replica_rank: The number of the replica; -1: from the rank of this process.

    Attributes:
        replica_rank: The number of the replica.
        is_leader_rank: Whether this rank sends.
        sleep_level: 1, which verl-omni reads and sets: a sleeping engine keeps all its weights.
        use_shm: True: adapters that verl-omni sends past Ray come in shared memory of the host.
        zmq_handle: The address at which this rank offers these.
    """

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1, **_: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        world = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        world *= self.config.pipeline_model_parallel_size
        self.replica_rank = rank // world if replica_rank == -1 else replica_rank
        self.rollout_rank = rank % world
        self.is_leader_rank = self.rollout_rank == 0
        self.sleep_level = 1
        self.use_shm = True
        local = int(os.environ.get("RAY_LOCAL_WORLD_SIZE", world))
        job_id = ray.get_runtime_context().get_job_id()
        self.zmq_handle = zmq_handle(job_id, self.replica_rank, self.rollout_rank % local)
        self._server: Any = None

    async def resume(self, tags: Sequence[str], **_: Any) -> None:
        """Has the server restore the weights, if the tags name them."""
        if self.config.free_cache_engine and self.is_leader_rank:
            await self._handle().wake_up.remote(tags=list(tags))

    async def release(self) -> None:
        """Has the server release the memory of the weights."""
        if self.config.free_cache_engine and self.is_leader_rank:
            await self._handle().sleep.remote()

    async def update_weights(
        self,
        weights: Iterator[tuple[str, Tensor]] | AsyncIterator[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        *,
        global_steps: int | None = None,
        peft_config: Mapping[str, Any] | None = None,
        base_sync_done: bool = True,
        **_: Any,
    ) -> None:
        """Sends weights to the server, which exchanges them all at once when no sample runs.

        All weights are taken from the generator, whatever happens, since the other ranks gather them together.

        Args:
            weights: The named tensors.
            wire_format: "named_tensors".
            global_steps: The training step whose weights these are.
            peft_config: The configuration of the adapter whose factors these are; None: the transformer's weights.
            base_sync_done: False: these are the transformer's weights under that adapter.

        Raises:
            InvalidRequestError: Another wire format.
            FlowrollError: The server refused the weights, and keeps those that it has.
        """
        if wire_format != "named_tensors":
            raise InvalidRequestError(
                f"wire_format must be named_tensors, got {wire_format!r}; use a checkpoint engine that sends whole tensors.",
                field="wire_format",
            )
        announced = {
            "global_steps": global_steps,
            "peft_config": None if peft_config is None else dict(peft_config),
            "base_sync_done": base_sync_done,
        }
        server = self._handle() if self.is_leader_rank else None
        await send_weights(server, weights, max_bytes=self._bucket_bytes, **announced)

    async def _execute_method(
        self,
        method: str,
        non_block: bool = False,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls a method of the server's workers, as verl-omni does to send an adapter past Ray; None on other ranks."""
        if not self.is_leader_rank:
            return None
        future = self._handle().collective_rpc.remote(method, timeout=timeout, args=tuple(args), kwargs=dict(kwargs or {}))
        return future if non_block else await future

    @property
    def _bucket_bytes(self) -> int:
        megabytes = read(self.config.checkpoint_engine, "update_weights_bucket_megabytes") or _DEFAULT_BUCKET_MB
        return int(megabytes) << 20

    def _handle(self) -> Any:
        # Not at the start: the server starts after the trainer's workers.
        if self._server is None:
            self._server = ray.get_actor(server_name(self.replica_rank))
        return self._server
