"""A replica of verl: it starts the server as a Ray actor beside the replica's workers.

Importing it imports verl and Ray. Reference: `RolloutReplica` and `vLLMReplica` of verl 0.9.1.
"""

from __future__ import annotations

import asyncio
import functools
import os
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.checkpoint_engine.base import CheckpointEngineWorker
from verl.plugin.platform import get_platform
from verl.single_controller.ray import RayClassWithInitArgs
from verl.utils.device import get_resource_name, get_visible_devices_keyword
from verl.workers.rollout.replica import RolloutReplica

from flowroll.errors import InvalidRequestError
from flowroll.integrations.verl_omni.names import server_name
from flowroll.integrations.verl_omni.options import ServerOptions, server_options
from flowroll.integrations.verl_omni.server import RolloutServer
from flowroll.integrations.verl_omni.transfer import receive_weights


class ServerActor(RolloutServer):
    """`RolloutServer` as a Ray actor.

    Args:
        options: How it runs.
        visible_devices: The devices of the replica's workers, as their environment variable lists them; "" for none.
        num_ranks: The number of the replica's workers.
    """

    def __init__(self, options: ServerOptions, visible_devices: str, num_ranks: int) -> None:
        # Before anything of this process touches a device.
        if visible_devices:
            os.environ[get_visible_devices_keyword()] = visible_devices
        job_id = ray.get_runtime_context().get_job_id()
        super().__init__(
            options,
            functools.partial(receive_weights, job_id=job_id, replica_rank=options.replica_rank, num_ranks=num_ranks),
        )

    async def get_server_address(self) -> tuple[str, int]:
        """Returns the address of this actor's host, and the id of its process: there is no HTTP behind it."""
        return ray.util.get_node_ip_address(), os.getpid()


class Worker(CheckpointEngineWorker):  # type: ignore[misc]  # verl has no types
    """verl's worker of a replica with devices of its own.

    Its process imports this module to make it, and so registers the plug-in. verl's own worker looks the rollout class up
    before anything has imported `model.external_lib` there.
    """


class FlowrollReplica(RolloutReplica):  # type: ignore[misc]  # verl has no types
    """One engine of flowroll behind one Ray actor, on one host.

    It starts in each of verl's ways: beside the trainer's ranks (`init_hybrid`, `init_hybrid_colocated`), beside them in
    processes of its own (`init_colocated`), or on devices of its own (`init_standalone`).
    """

    def get_ray_class_with_init_args(self) -> RayClassWithInitArgs:
        """Returns the class of the workers beside a server that has devices of its own, and their arguments."""
        return RayClassWithInitArgs(
            cls=ray.remote(Worker),
            rollout_config=self.config,
            model_config=self.model_config,
            replica_rank=self.replica_rank,
        )

    async def launch_servers(self) -> None:
        """Starts the server where the replica's first worker is, with the devices of all its workers.

        Raises:
            InvalidRequestError: The replica's workers are on several hosts, or the configuration asks for what flowroll does
                not do.
        """
        assert len(self.workers) == self.world_size, f"{len(self.workers)} workers, but a world of {self.world_size}"
        options = server_options(self.config, self.model_config, mode=self.rollout_mode.value, replica_rank=self.replica_rank)
        places = await asyncio.gather(*[worker.__ray_call__.remote(_place_of) for worker in self.workers])
        nodes = {node for node, _ in places}
        if len(nodes) > 1:
            raise InvalidRequestError(
                f"a replica must be on one host, got {len(nodes)}; make rollout.tensor_model_parallel_size smaller.",
                field="rollout.tensor_model_parallel_size",
            )
        kind = "reward_" if self.is_reward_model else "teacher_" if self.is_teacher_model else ""
        platform = get_platform()
        variables = {**dict.fromkeys(platform.ray_noset_envvars(), "1"), **platform.rollout_env_vars()}
        server = (
            ray.remote(ServerActor)
            .options(
                name=server_name(self.replica_rank, kind, self.name_suffix),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=nodes.pop(), soft=False),
                runtime_env={"env_vars": variables},
                max_concurrency=self.max_concurrency,
            )
            .remote(options, ",".join(device for _, device in places if device), self.world_size)
        )
        self.servers.append(server)
        await server.launch_server.remote()
        host, process = await server.get_server_address.remote()
        self._server_handle, self._server_address = server, f"{host}:{process}"

    async def sleep(self) -> None:
        """Has the server sleep once no sample runs."""
        await asyncio.gather(*[server.wait_for_requests_to_drain.remote() for server in self.servers])
        await super().sleep()

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        """Aborts the samples with this id."""
        (server,) = self.servers
        return dict(await server.abort_request.remote(request_id))


def _place_of(worker: Any) -> tuple[str, str]:
    """Returns the host of a worker, and its device; "" if it has none."""
    context = ray.get_runtime_context()
    devices = context.get_accelerator_ids().get(get_resource_name()) or [""]
    return context.get_node_id(), str(devices[0])
