"""The streams of a rank's device, and the order among them. On a CPU nothing is queued, and nothing here does anything.

Steps are queued on the default stream. If encoding, decoding and copies were queued there too, whoever waits for one of them
would wait for all the steps before it, of every request. So each has a stream of its own, and where a tensor goes from one to
another, the order is made by an event, never by the host:

- a step waits for the encoding of its request (`Conditioning.ready`): it reads the whole environment;
- a decoding waits for the last step of its samples (`Sample.done`): it reads their final latents;
- a copy to the host waits for the step that made the tensor: the record has the bits that were scored;
- who reads a record waits for its last copy (`Recorder.wait`), and for nothing that was queued later;
- a tensor that another stream reads keeps its memory until that is done (`after`): torch would give it away at once;
- a change of the weights waits for everything (`synchronize`): no kernel sees half of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Mark(Protocol):
    """What was queued on a stream up to some moment: an event of CUDA. On a CPU, where it is done, there is None."""

    def synchronize(self) -> None:
        """Waits until it is done."""


class Streams:
    """Queues work on a device: steps on the current stream, and encoding, decoding and copies each on one of their own.

    Args:
        device: The device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        make: Any = torch.cuda.Stream
        self._encode, self._decode, self._copy = (make(device) if self.are_queued else None for _ in range(3))

    @property
    def are_queued(self) -> bool:
        """Whether the host runs ahead of the device."""
        return self._device.type == "cuda"

    def encoding(self) -> AbstractContextManager[object]:
        """Queues what the block does on the stream for encoding."""
        return _on(self._encode)

    def decoding(self) -> AbstractContextManager[object]:
        """Queues what the block does on the stream for decoding."""
        return _on(self._decode)

    def mark(self) -> Mark | None:
        """Marks what is queued on the current stream so far."""
        if not self.are_queued:
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event  # type: ignore[no-any-return]

    def after(self, mark: Mark | None, tensors: Iterable[Tensor]) -> None:
        """Has what is queued on the current stream from here on come after a mark, and read tensors that were made before it.

        Their memory is not used for others before what is queued here at their end is done.
        """
        if mark is None:
            return
        stream: Any = torch.cuda.current_stream(self._device)
        stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(stream)

    def copy_out(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Mark | None:
        """Copies tensors of the current stream to the host's memory, without a wait; returns the mark of their arrival.

        Args:
            pairs: Pinned memory, and the tensor that goes there, which nobody may write to any more.
        """
        made = self.mark()
        with _on(self._copy):
            self.after(made, [source for _, source in pairs])
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.mark()

    def synchronize(self) -> None:
        """Waits until nothing is queued on any stream."""
        if self.are_queued:
            torch.cuda.synchronize(self._device)


def _on(stream: Any) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
