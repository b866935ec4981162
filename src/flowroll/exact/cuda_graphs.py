"""Records forwards as CUDA graphs. It has not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowroll.exact.graphs import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaRecording:
    """A CUDA graph of one forward.

    Attributes:
        graph: The graph.
        outputs: The tensors that a replay writes to.
        num_bytes: By how much the device's free memory shrank while it was recorded: new memory of the shared pool, and what
            the driver keeps for a graph.
    """

    graph: torch.cuda.CUDAGraph
    outputs: list[Tensor]
    num_bytes: int

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        self.graph.replay()


def recorder_for(device: torch.device) -> Recorder | None:
    """Returns what records forwards on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CudaRecorder:
    """Records on a stream of its own, with the intermediate tensors of all recordings in one pool.

    Recordings share that memory, so no two replays may run at the same time: a replay on another stream waits for the one
    before it. The pool has what the largest recording needs, and the outputs of all. Dropping a recording makes room in the
    pool for the next ones; the device gets the memory back with the last one.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recording_stream: torch.cuda.Stream | None = None
        self._pool: object = None
        # The stream of the last replay.
        self._last: torch.cuda.Stream | None = None

    def record(self, function: Callable[[], list[Tensor]]) -> CudaRecording:
        """Runs a function once, so that libraries set up what they need, and records it when it is run again.

        Other threads may use the device meanwhile, on their own streams.
        """
        if self._recording_stream is None:
            self._recording_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        stream, current = self._recording_stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            outputs = function()
        left, _ = torch.cuda.mem_get_info(self._device)
        return CudaRecording(graph=graph, outputs=outputs, num_bytes=max(0, free - left))

    def before_replay(self) -> None:
        """Makes the current stream wait for the last replay, if that was on another one."""
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def before_drop(self) -> None:
        """Waits for the last replay."""
        torch.cuda.synchronize(self._device)
