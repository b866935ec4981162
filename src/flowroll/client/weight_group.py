"""The trainer's end of a process group through which servers receive new weights.

    # Servers on other machines must be started with --weight-group-host 10.0.0.7.
    with WeightGroup([client], backend="nccl", master_address="10.0.0.7") as group:
        group.update_weights(model.named_parameters(), weight_version="120")

Each engine is one member of the group, however many ranks it has: its rank 0 receives whole tensors and shares them out. A
fleet is a member for each of its replicas. The trainer's own default group is left alone.

If FSDP2 shards the trainer, the first rank of the mesh passes the clients and the other ranks pass none; all ranks make the
same calls, since all take part in gathering the weights:

    clients = [Client(url)] if torch.distributed.get_rank() == 0 else []
    with WeightGroup(clients) as group:
        group.update_weights(model.state_dict())
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from msgspec.structs import replace
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flowroll.client.exchange import post, read_object
from flowroll.client.pushing import BUCKET_BYTES, NamedTensors, abandon_call, begin_call, commit_call, gathered_buckets
from flowroll.client.synchronous import Client
from flowroll.errors import FlowrollError, InvalidRequestError, WeightsRejectedError
from flowroll.families.checksums import tensors_digest
from flowroll.parallel.broadcasting import Backend, BroadcastGroup
from flowroll.wire.fields import Request
from flowroll.wire.group import DestroyGroupRequest, InitGroupRequest, UpdateFromGroupRequest
from flowroll.wire.names import DESTROY_GROUP_ROUTE, INIT_GROUP_ROUTE, UPDATE_FROM_GROUP_ROUTE
from flowroll.wire.weights import Updatable

# How long the answer of a server may take that has closed the group.
_REASON_S = 5.0


class WeightGroup:
    """A process group of a trainer and servers. As a context manager it ends with `close`, which destroys the group.

    Args:
        clients: The clients of the servers; empty on the ranks of a sharded trainer that do not send.
        master_address: The address of this machine at which the servers reach it.
        master_port: The port of the group's store; 0 lets the system choose.
        backend: "gloo" sends from the CPU, "nccl" from a GPU.
        device: The device from which the backend sends, e.g. "cuda:0".
        timeout_s: How many seconds processes wait for each other; the servers have their own --rank-timeout-s.

    Raises:
        InvalidRequestError: A server does not join the group, or cannot.
        FlowrollError: A server raised any other error.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
        backend: Backend = "gloo",
        device: str = "cpu",
        timeout_s: float = 60.0,
    ) -> None:
        self._clients, self._name = list(clients), f"flowroll-{secrets.token_hex(4)}"
        self._threads = ThreadPoolExecutor(len(self._clients) + 1, thread_name_prefix="flowroll-group")
        self._group: BroadcastGroup | None = None
        self._store: TCPStore | None = None
        if self._clients:
            self._join(master_address, master_port, backend, device, timeout_s)

    def _join(self, master_address: str, master_port: int, backend: Backend, device: str, timeout_s: float) -> None:
        """Makes the group together with the servers."""
        infos = [self._threads.submit(client.server_info) for client in self._clients]
        # A fleet is one member for each of its replicas.
        ranks = list(itertools.accumulate([int(info.get("world_size", 1)) for info in _results(infos)], initial=1))
        world_size = ranks.pop()
        family = socket.getaddrinfo(master_address, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((master_address, master_port), family=family)
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            master_address, port, world_size, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        first = InitGroupRequest(
            master_address=master_address,
            master_port=port,
            rank_offset=1,
            world_size=world_size,
            group_name=self._name,
            backend=backend,
        )
        own: Future[BroadcastGroup] | None = None
        try:
            joined = [
                self._post(client, INIT_GROUP_ROUTE, replace(first, rank_offset=rank))
                for rank, client in zip(ranks, self._clients, strict=True)
            ]
            own = self._threads.submit(
                BroadcastGroup,
                self._name,
                rank=0,
                world_size=world_size,
                backend=backend,
                address=master_address,
                port=port,
                device=device,
                timeout_s=timeout_s,
                store=self._store,
            )
            _results([own, *joined])
            self._group = own.result()
        except BaseException:
            if own is not None:
                # It may be waiting for the servers yet.
                own.add_done_callback(_close_made)
            self.close()
            raise

    def __enter__(self) -> WeightGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update_weights(
        self,
        named_tensors: NamedTensors,
        *,
        module: Updatable = "transformer",
        weight_version: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        verify: bool = True,
    ) -> list[str]:
        """Broadcasts new weights: each server takes all of them, or, whatever goes wrong, none.

        Args:
            named_tensors: The tensors by their names in the module's state_dict, e.g. `trainer.state_dict()`, or a generator of
                pairs. DTensors are gathered: every rank of the trainer makes this call.
            module: The module to update: "transformer" or "vae".
            weight_version: The version of the new weights; None: each server increments its own.
            bucket_bytes: How many bytes a server is told to expect at a time.
            verify: Whether a sha256 of each bucket is sent before it, with which the servers compare what arrives. It is
                computed on the CPU, here and on every server; `Client.weights_checksum` compares at the end as well.

        Returns:
            The weight version of each server.

        Raises:
            WeightsRejectedError: The tensors are not the module's, some are missing, or a server is gone. Where tensors were
                refused the group can only be closed; servers that had all tensors may have taken them.
            WeightsBusyError: A server takes another update just now.
            FlowrollError: A server raised any other error.
        """
        device = "cpu" if self._group is None else self._group.device
        ranks, buckets = gathered_buckets(named_tensors, bucket_bytes, device)
        begun: list[str] = ranks.run(lambda: self._begin(module, weight_version), list[str])
        try:
            for bucket in buckets:
                ranks.run(functools.partial(self._broadcast, bucket, module, begun, verify), None)
            return ranks.run(lambda: self._commit(begun), list[str])
        except BaseException:
            if ranks.sends:
                self._abandon(begun, self._clients)
            raise

    def close(self) -> None:
        """Destroys the group, here and on the servers that can be reached. It may be called twice."""
        if self._group is not None:
            self._group.close()
        clients, self._clients = self._clients, []
        left = [self._post(client, DESTROY_GROUP_ROUTE, DestroyGroupRequest(group_name=self._name)) for client in clients]
        for future in left:
            # A server that never joined, or is gone, has nothing to destroy.
            if isinstance(error := future.exception(), Exception) and not isinstance(error, FlowrollError):
                raise error
        self._store = None
        self._threads.shutdown(wait=False)

    def _begin(self, module: Updatable, weight_version: str | None) -> list[str]:
        if self._group is None:
            raise InvalidRequestError(
                "clients must be given on the rank that sends, got none; give them on the first rank of the mesh.",
                field="clients",
            )
        begin = begin_call(module, weight_version, False)
        calls = [self._threads.submit(client._send, begin) for client in self._clients]
        wait(calls)
        if any(call.exception() for call in calls):
            # Or those that have begun refuse the next update until they give this one up.
            for client, call in zip(self._clients, calls, strict=True):
                if call.exception() is None:
                    self._abandon([call.result()], [client])
        return _results(calls)

    def _commit(self, begun: Sequence[str]) -> list[str]:
        commits = [commit_call(update_id, "drain") for update_id in begun]
        calls = [self._threads.submit(client._send, commit) for client, commit in zip(self._clients, commits, strict=True)]
        return [update.weight_version for update in _results(calls)]

    def _abandon(self, begun: Sequence[str], clients: Sequence[Client]) -> None:
        for client, update_id in zip(clients, begun, strict=True):
            # It may have ended already, or be out of reach; it drops the update by itself in the end.
            with contextlib.suppress(FlowrollError):
                client._send(abandon_call(update_id))

    def _broadcast(self, bucket: Mapping[str, Tensor], module: Updatable, begun: Sequence[str], verify: bool) -> None:
        group = self._group
        assert group is not None
        tensors = list(bucket.values())
        expected = UpdateFromGroupRequest(
            group_name=self._name,
            target_modules=[module],
            names=list(bucket),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
            sha256=tensors_digest(tensors) if verify else None,
        )
        answers = [
            self._post(client, UPDATE_FROM_GROUP_ROUTE, replace(expected, update_id=update_id))
            for client, update_id in zip(self._clients, begun, strict=True)
        ]

        def check() -> None:
            # A server that refuses the bucket does not receive it.
            for answer in answers:
                if answer.done():
                    answer.result()

        try:
            with group.turn():
                for tensor in tensors:
                    group.broadcast(tensor, check)
        except WeightsRejectedError:
            # A server that refuses a bucket closes the group, and then says why.
            wait(answers, timeout=_REASON_S, return_when=FIRST_EXCEPTION)
            check()
            raise
        _results(answers)

    def _post(self, client: Client, route: str, sent: Request) -> Future[dict[str, Any]]:
        return self._threads.submit(client._send, post(route, sent, read_object))


def _close_made(made: Future[BroadcastGroup]) -> None:
    if made.exception() is None:
        made.result().close()


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Returns the results of all calls, or raises the first error."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return [future.result() for future in futures]
