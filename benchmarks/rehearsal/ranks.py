"""One rank of several, without the others: the process groups are torch's fake ones, which send nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.rehearsal.device import CUDA
from benchmarks.rehearsal.meter import Meter
from flowroll.engine.runner.peers import Peers
from flowroll.parallel.mesh import Mesh
from flowroll.types import Layout


@contextlib.contextmanager
def fake_mesh(layout: Layout, rank: int) -> Iterator[Mesh]:
    """The collectives of one rank of a layout. It must be entered before the modes of the fake device."""
    real = dist.init_process_group

    def without_network(backend: str, **options: Any) -> None:
        real("fake", **options)

    store = FakeStore()
    with (
        mock.patch.object(dist, "init_process_group", without_network),
        Mesh(layout, rank=rank, store=store, device=CUDA, timeout_s=60.0, loopback=False) as mesh,
    ):
        yield mesh


class FakePeers(Peers):
    """The ranks beside this one: what is sent to them goes nowhere, and collectives return at once.

    Args:
        mesh: The collectives.
        meter: Counts them.
    """

    def __init__(self, mesh: Mesh, meter: Meter) -> None:
        super().__init__()
        self.mesh, self._meter = mesh, meter

    def compare(self, tensor: Tensor) -> list[int]:
        """Compares the latents of a finished sample, as the ranks of an engine do."""
        with self._meter.during("compare"):
            return self.mesh.odd_ranks(tensor)
