"""The trainer's end of a process group through which servers get new weights.

    # Of servers elsewhere: started with --weight-group-host 10.0.0.7.
    with WeightGroup([client], backend="nccl", master_address="10.0.0.7") as group:
        group.update_weights(model.named_parameters(), weight_version="120")

Each server is one member of the group, however many ranks its engine has: its rank 0 receives whole tensors and shares them
out. The trainer's own default group is left alone.

Of a trainer sharded by FSDP2, the first rank of the mesh gives the clients, the others give none; all make the same calls,
since all take part in gathering the weights:

    clients = [Client(url)] if torch.distributed.get_rank() == 0 else []
    with WeightGroup(clients) as group:
        group.update_weights(model.state_dict())
"""

from __future__ import annotations

import functools
import itertools
import secrets
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flowroll.client.exchange import post, read_object
from flowroll.client.pushing import BUCKET_BYTES, NamedTensors, buckets_of, ranks_of
from flowroll.client.synchronous import Client
from flowroll.errors import FlowrollError, InvalidRequestError
from flowroll.parallel.broadcasting import Backend, BroadcastGroup
from flowroll.wire.names import DESTROY_GROUP_ROUTE, INIT_GROUP_ROUTE, UPDATE_FROM_GROUP_ROUTE


class WeightGroup:
    """See the module. A context manager; `close` destroys the group on the servers.

    Args:
        clients: Of the servers; none on the ranks of a sharded trainer that do not send.
        master_address: Of this machine, as the servers reach it.
        master_port: 0 lets the system choose.
        backend: "gloo" sends from the CPU, "nccl" from a GPU.
        device: Of the same, e.g. "cuda:0".
        timeout_s: How long processes wait for each other; the servers have their own --rank-timeout-s.

    Raises:
        InvalidRequestError: A server does not come, or cannot.
        FlowrollError: Whatever else a server raised.
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
        """Makes the group, with the servers in it."""
        world_size = len(self._clients) + 1
        family = socket.getaddrinfo(master_address, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((master_address, master_port), family=family)
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            master_address, port, world_size, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        place = {"master_address": master_address, "master_port": port, "world_size": world_size, "backend": backend}
        own: Future[BroadcastGroup] | None = None
        try:
            joined = [
                self._post(client, INIT_GROUP_ROUTE, {**place, "rank_offset": rank})
                for rank, client in enumerate(self._clients, start=1)
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
        module: str = "transformer",
        weight_version: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> list[str]:
        """Broadcasts new weights: each server takes all of them, or, whatever goes wrong, none.

        Args:
            named_tensors: By the names of the module's state_dict, e.g. `trainer.state_dict()`, or a generator of pairs.
                DTensors are gathered: every rank of the trainer makes this call.
            module: "transformer" or "vae".
            weight_version: Of the new weights; None: each server counts.
            bucket_bytes: How much a server is told to expect at a time.

        Returns:
            The version of each server.

        Raises:
            WeightsRejectedError: The tensors are not the module's, or a server is gone. The group can only be closed then;
                servers that had all tensors may have taken them.
            InvalidRequestError: Tensors are missing. No server has taken any.
            FlowrollError: Whatever else a server raised.
        """
        buckets = buckets_of(named_tensors, bucket_bytes)
        first = next(buckets, {})
        ranks = ranks_of(named_tensors, first)
        target = {"target_modules": [module], "weight_version": weight_version}
        answers: list[dict[str, Any]] = [{}]
        for bucket in itertools.chain([first] if first else [], buckets):
            whole = ranks.gather(bucket, "cpu" if self._group is None else self._group.device)
            answers = ranks.run(functools.partial(self._broadcast, whole, target), list[dict[str, Any]])
        if not all(answer.get("is_complete") for answer in answers):
            message = answers[0].get("message", "none")
            raise InvalidRequestError(f"named_tensors must be all of the {module}'s, got {message}; give the rest too.")
        return [str(answer["weight_version"]) for answer in answers]

    def close(self) -> None:
        """Destroys the group, here and on the servers that can be reached; may be called twice."""
        if self._group is not None:
            self._group.close()
        clients, self._clients = self._clients, []
        left = [self._post(client, DESTROY_GROUP_ROUTE, {}) for client in clients]
        for future in left:
            # A server that never joined, or is gone, has nothing to destroy.
            if isinstance(error := future.exception(), Exception) and not isinstance(error, FlowrollError):
                raise error
        self._store = None
        self._threads.shutdown(wait=False)

    def _broadcast(self, bucket: Mapping[str, Tensor], target: Mapping[str, Any]) -> list[dict[str, Any]]:
        group, tensors = self._group, list(bucket.values())
        if group is None:
            raise InvalidRequestError(
                "clients must be given on the rank that sends, got none; give them on the first rank of the mesh.",
                field="clients",
            )
        expected = {
            **target,
            "names": list(bucket),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        answers = [self._post(client, UPDATE_FROM_GROUP_ROUTE, expected) for client in self._clients]

        def check() -> None:
            # A server that refuses the bucket does not receive it.
            for answer in answers:
                if answer.done():
                    answer.result()

        with group.turn():
            for tensor in tensors:
                group.broadcast(tensor, check)
        return _results(answers)

    def _post(self, client: Client, route: str, sent: Mapping[str, Any]) -> Future[dict[str, Any]]:
        call = post(route, {**sent, "group_name": self._name}, read_object)
        return self._threads.submit(client._send, call)


def _close_made(made: Future[BroadcastGroup]) -> None:
    if made.exception() is None:
        made.result().close()


def _results(futures: Sequence[Future[Any]]) -> list[Any]:
    """The results of all, or the first error."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return [future.result() for future in futures]
