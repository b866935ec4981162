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
    """Refuses to share torch.distributed, whose default group is the process's, with anybody.

    Raises:
        EngineError: The process is a member of a process group already.
    """
    if dist.is_initialized():
        raise EngineError(
            "an engine of several ranks must be the only user of torch.distributed in its process, got a process group that is "
            "there already; start the engine in a process of its own."
        )


class Mesh:
    """Holds this rank's place among the ranks of an engine. A context manager; `close` leaves the process group.

    Rank r is at (cfg, sp, tp) in row-major order: tensor-parallel neighbours, which talk most, have neighbouring ranks.

    Args:
        layout: The degrees of the axes.
        rank: Of this process.
        store: Where the ranks find each other.
        device: Of this rank's tensors.
        timeout_s: How long a collective waits for the slowest rank.
        loopback: Whether all ranks are on this machine and talk over its loopback interface alone.
    """

    def __init__(
        self, layout: Layout, *, rank: int, store: Store, device: torch.device, timeout_s: float, loopback: bool
    ) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        # Whether the batch of the forward that runs holds the branches of every sample side by side, to be shared out.
        self.shares_branches = False
        # Bytes that this rank received, by axis.
        self.received_bytes: Counter[Axis] = Counter()
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        with _loopback_interface() if loopback else contextlib.nullcontext():
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=layout.num_ranks, timeout=timedelta(seconds=timeout_s)
            )
            # NCCL ends the process when it is out of patience; gloo, whose error can be told to the requests, comes first.
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
        """Ranks on this axis."""
        return {"cfg": self.layout.cfg, "sp": self.layout.sp, "tp": self.layout.tp}[axis]

    def coordinate(self, axis: Axis) -> int:
        """This rank's index on this axis."""
        return self._coordinates[axis]

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of this rank along an axis."""
        return self._groups[axis]

    @contextlib.contextmanager
    def sharing_branches(self) -> Iterator[None]:
        """In the block, regions of the transformer give each group of the cfg axis its own branch of every sample."""
        self.shares_branches = self.degree("cfg") > 1
        try:
            yield
        finally:
            self.shares_branches = False

    def gather(self, part: Float[Tensor, ...], *, axis: Axis, dim: int, sizes: Sequence[int]) -> Float[Tensor, ...]:
        """The parts of an axis's ranks side by side in rank order, contiguous.

        Args:
            part: This rank's part; all dimensions but `dim` are the same on every rank.
            axis: Whose ranks hold the parts.
            dim: The dimension to join them along.
            sizes: Length of every rank's part. The transport sends equal lengths: shorter ones travel with filler rows, which
                are dropped on arrival.
        """
        return gather_parts(self, part, axis, dim, sizes)

    def all_agree(self, vote: bool, axes: Sequence[Axis]) -> bool:
        """Tells whether every rank on these axes votes yes; all of them call it at the same time."""
        for axis in axes:
            if self.degree(axis) > 1:
                own = torch.tensor([vote], dtype=torch.uint8, device=self.device)
                vote = bool(gather_parts(self, own, axis, 0, [1] * self.degree(axis)).all().item())
        return vote

    def broadcast(self, tensor: Tensor) -> None:
        """Fills the tensor with rank 0's, on every rank."""
        dist.broadcast(tensor, 0)

    def odd_ranks(self, tensor: Tensor) -> list[int]:
        """The ranks whose tensor does not have rank 0's bits; the same list everywhere. Tensors have the same shape."""
        own = _digest(tensor)
        digests = [torch.zeros_like(own) for _ in range(self.layout.num_ranks)]
        dist.all_gather(digests, own)
        return [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]

    def close(self) -> None:
        """Leaves the process group; may be called twice."""
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
    """The group along one axis that a rank is in; every rank makes every group, in the same order."""
    own = None
    for ranks in grid.movedim(dim, -1).flatten(0, -2).tolist():
        # A group that a device mesh makes by itself would have torch's own timeout, of many minutes.
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
        own = group if rank in ranks else own
    assert own is not None
    return own  # type: ignore[no-any-return]


def _digest(tensor: Tensor) -> Tensor:
    """64 bits that change with (nearly) any change of the tensor, on the CPU."""
    bits = tensor.contiguous().flatten().view(torch.uint8).to(torch.int64)
    places = torch.arange(1, 2 * bits.numel(), 2, device=bits.device) * 0x9E3779B1
    return ((bits + 1) * (places ^ (places >> 15))).sum().reshape(1).cpu()


@contextlib.contextmanager
def _loopback_interface() -> Iterator[None]:
    """Keeps gloo, which otherwise listens on the interface that the host's name resolves to, on the loopback interface."""
    name = "GLOO_SOCKET_IFNAME"
    before = os.environ.get(name)
    os.environ[name] = before or ("lo0" if sys.platform == "darwin" else "lo")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
