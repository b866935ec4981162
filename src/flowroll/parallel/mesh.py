"""The ranks of one engine on the axes cfg, sp and tp, and the few collectives that flowroll uses.

Every collective moves bits and computes nothing. On GPUs the data goes through NCCL and the control messages, which are on the
CPU, through gloo, so that no step waits for the device to tell whether it may go on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store
from torch.overrides import handle_torch_function, has_torch_function

from flowroll.errors import EngineError
from flowroll.types import Layout

Axis: TypeAlias = Literal["cfg", "sp", "tp"]
AXES: tuple[Axis, ...] = ("cfg", "sp", "tp")
_NCCL_PATIENCE = 3


def check_alone() -> None:
    """Refuses a process that is already in a process group: torch.distributed has one default group per process.

    Raises:
        EngineError: The process is already a member of a process group.
    """
    if dist.is_initialized():
        raise EngineError(
            "an engine of several ranks must be the only user of torch.distributed in its process, got a process group that is "
            "there already; start the engine in a process of its own."
        )


class Mesh:
    """This rank's place among the ranks of an engine. It is a context manager; `close` leaves the process group.

    Rank r is at (cfg, sp, tp) in row-major order: tensor-parallel neighbors, which exchange most data, have neighboring ranks.

    Args:
        layout: The degrees of the axes.
        rank: The rank of this process.
        store: The store through which the ranks find each other.
        device: The device of this rank's tensors.
        timeout_s: How many seconds a collective waits for the slowest rank.
        loopback: Whether all ranks are on this machine and communicate over its loopback interface only.
    """

    def __init__(
        self, layout: Layout, *, rank: int, store: Store, device: torch.device, timeout_s: float, loopback: bool
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        # Whether the batch of the running forward holds the branches of every sample side by side, to be split over the cfg
        # axis.
        self.shares_branches = False
        # The bytes that this rank has received, by axis.
        self.received_bytes: Counter[Axis] = Counter()
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        with _loopback_interface() if loopback else contextlib.nullcontext():
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=layout.num_ranks, timeout=timedelta(seconds=timeout_s)
            )
            # NCCL ends the process at its timeout; gloo raises an error that can be reported to the requests, so it must time
            # out first.
            patience_s = timeout_s if device.type == "cpu" else _NCCL_PATIENCE * timeout_s
            grid = torch.arange(layout.num_ranks).view([self.degree(axis) for axis in AXES])
            try:
                groups = [_own_group(grid, dim, rank, patience_s) for dim in range(len(AXES))]
                mesh = DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=AXES)
            except BaseException:
                dist.destroy_process_group()
                raise
        self._groups = {axis: mesh.get_group(axis) for axis in AXES}
        self._coordinates = dict(zip(AXES, mesh.get_coordinate() or (), strict=True))

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def degree(self, axis: Axis) -> int:
        """Returns the number of ranks on this axis."""
        return {"cfg": self.layout.cfg, "sp": self.layout.sp, "tp": self.layout.tp}[axis]

    def coordinate(self, axis: Axis) -> int:
        """Returns this rank's index on this axis."""
        return self._coordinates[axis]

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """Returns the process group of this rank along an axis."""
        return self._groups[axis]

    @contextlib.contextmanager
    def sharing_branches(self) -> Iterator[None]:
        """Gives each group of the cfg axis its own branch of every sample, in the transformer's regions, within the block."""
        self.shares_branches = self.degree("cfg") > 1
        try:
            yield
        finally:
            self.shares_branches = False

    def gather(self, part: Float[Tensor, ...], *, axis: Axis, dim: int, sizes: Sequence[int]) -> Float[Tensor, ...]:
        """Joins the parts of an axis's ranks in rank order; the result is contiguous.

        Args:
            part: This rank's part; all dimensions but `dim` must be the same on every rank.
            axis: The axis whose ranks hold the parts.
            dim: The dimension to join them along.
            sizes: The length of every rank's part. The transport sends equal lengths: shorter parts are sent with filler rows,
                which are dropped on arrival.
        """
        return gather_parts(self, part, axis, dim, sizes)

    def all_agree(self, vote: bool, axes: Sequence[Axis]) -> bool:
        """Tells whether every rank on these axes votes yes; all of these ranks must make this call."""
        for axis in axes:
            if self.degree(axis) > 1:
                own = torch.tensor([vote], dtype=torch.uint8, device=self.device)
                vote = bool(gather_parts(self, own, axis, 0, [1] * self.degree(axis)).all().item())
        return vote

    def broadcast(self, tensor: Tensor) -> None:
        """Fills the tensor with rank 0's data on every rank."""
        dist.broadcast(tensor, 0)

    def odd_ranks(self, tensor: Tensor) -> list[int]:
        """Returns, on every rank, the ranks whose tensor differs in bits from rank 0's; the shapes must be equal."""
        own = _digest(tensor)
        digests = [torch.zeros_like(own) for _ in range(self.layout.num_ranks)]
        dist.all_gather(digests, own)
        return [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]

    def close(self) -> None:
        """Leaves the process group. It may be called twice."""
        if dist.is_initialized():
            dist.destroy_process_group()


def gather_parts(mesh: Mesh, part: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
    """Joins the parts of an axis's ranks; see `Mesh.gather`. A function mode of torch sees it as one function."""
    if has_torch_function((part,)):
        return handle_torch_function(gather_parts, (part,), mesh, part, axis, dim, sizes)
    front = part.movedim(dim, 0)
    longest = max(sizes)
    if front.shape[0] < longest:
        front = torch.cat([front, front.new_zeros((longest - front.shape[0], *front.shape[1:]))])
    front = front.contiguous()
    parts = front.new_empty((len(sizes), *front.shape))
    dist.all_gather(list(parts.unbind(0)), front, group=mesh.group(axis))
    mesh.received_bytes[axis] += parts.nbytes - front.nbytes
    if min(sizes) == longest:
        whole = parts.flatten(0, 1)
    else:
        whole = torch.cat([received[:size] for received, size in zip(parts.unbind(0), sizes, strict=True)])
    return whole.movedim(0, dim).contiguous()


def _own_group(grid: Tensor, dim: int, rank: int, timeout_s: float) -> dist.ProcessGroup:
    """Returns the rank's group along one axis; every rank makes every group, in the same order."""
    own = None
    for ranks in grid.movedim(dim, -1).flatten(0, -2).tolist():
        # A group that a device mesh makes by itself would have torch's own timeout, of many minutes.
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
        own = group if rank in ranks else own
    assert own is not None
    return own  # type: ignore[no-any-return]


def _digest(tensor: Tensor) -> Tensor:
    """Returns 64 bits, on the CPU, that change with nearly any change of the tensor."""
    bits = tensor.contiguous().flatten().view(torch.uint8).to(torch.int64)
    places = torch.arange(1, 2 * bits.numel(), 2, device=bits.device) * 0x9E3779B1
    return ((bits + 1) * (places ^ (places >> 15))).sum().reshape(1).cpu()


@contextlib.contextmanager
def _loopback_interface() -> Iterator[None]:
    """Makes gloo listen on the loopback interface instead of the one to which the host's name resolves."""
    name = "GLOO_SOCKET_IFNAME"
    before = os.environ.get(name)
    os.environ[name] = before or ("lo0" if sys.platform == "darwin" else "lo")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
