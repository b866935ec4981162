"""Stands in for CUDA graphs on the fake device: a capture is a stage of its own, in which the host may wait for nothing.

What is recorded runs once in it, and a replay does nothing: on a fake device there are no numbers to compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.rehearsal.meter import CAPTURE, Count, Meter
from flowroll.exact import GraphedForwards

# The stage in which a forward is recorded, its capture apart.
RECORD = "record"


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        """Notes the replay."""
        self.num_replays += 1


@contextlib.contextmanager
def captures(meter: Meter) -> Iterator[None]:
    """Replaces what CUDA graphs are made with.

    Args:
        meter: Counts what is captured.
    """
    real = GraphedForwards._try_to_record

    def record(graphs: GraphedForwards, *args: Any) -> None:
        with meter.during(RECORD):
            real(graphs, *args)

    def capture(
        graph: Graph, pool: object, stream: object, capture_error_mode: str
    ) -> contextlib.AbstractContextManager[Count]:
        # Other threads encode and decode meanwhile, and may allocate.
        assert capture_error_mode == "thread_local"
        return meter.during(CAPTURE)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GraphedForwards, "_try_to_record", record))
        driver = {
            "CUDAGraph": Graph,
            "graph": capture,
            "graph_pool_handle": lambda: (0, 1),
            # Free memory before a capture, and after it, are the same.
            "mem_get_info": lambda _: (0, 0),
        }
        for name, value in driver.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield
