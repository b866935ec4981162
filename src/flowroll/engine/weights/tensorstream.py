"""A safetensors file that arrives in pieces: the bytes of each tensor go straight to the memory that the engine will hold."""

from __future__ import annotations

from flowroll.engine.weights.receiver import Bucket, WeightReceiver
from flowroll.engine.weights.staged import rejected
from flowroll.engine.weights.tensorfile import parse_header
from flowroll.errors import CheckpointError, WeightsRejectedError
from flowroll.types.tensors import tensor_bytes

_SUBJECT, _REMEDY = "the body", "send it again"
# Several times what the names and shapes of the largest models take.
_MAX_HEADER = 16 * 2**20


class TensorStream:
    """One bucket of new weights. Whoever begins one ends it with `finish` or `drop`; used by one thread at a time.

    Args:
        incoming: What the bucket is part of. It looks at the header as soon as that is here, before any data is.
    """

    def __init__(self, incoming: WeightReceiver) -> None:
        self._incoming = incoming
        self._head = bytearray()
        self._bucket: Bucket | None = None
        # Of the tensors that are not full, what is still to be filled, the next one last.
        self._offload: list[memoryview] = []

    def feed(self, piece: bytes | memoryview) -> None:
        """Takes the next bytes of the file.

        Raises:
            WeightsRejectedError: The header is none, or names tensors that are not wanted, or there are bytes behind the end.
        """
        view = memoryview(piece)
        if self._bucket is None:
            view = self._take_head(view)
        while view:
            if not self._offload:
                raise WeightsRejectedError(f"{_SUBJECT} must end with its last tensor, got more bytes; {_REMEDY}.")
            target = self._offload[-1]
            count = min(len(target), len(view))
            target[:count] = view[:count]
            view = view[count:]
            if count < len(target):
                self._offload[-1] = target[count:]
            else:
                self._offload.pop()

    def finish(self) -> int:
        """Adds the bucket to what has arrived, once the file has ended.

        Returns:
            How many tensors it held.

        Raises:
            WeightsRejectedError: The file is not whole.
        """
        if self._bucket is None or self._offload:
            missing = f"{sum(map(len, self._offload))} bytes too few" if self._bucket else "no whole header"
            raise WeightsRejectedError(f"{_SUBJECT} must be a whole safetensors file, got {missing}; {_REMEDY}.")
        self._bucket.keep()
        return len(self._bucket.targets)

    def drop(self) -> None:
        """Forgets the bucket; its tensors may come again in another. Without effect on one that was added."""
        if self._bucket is not None:
            self._bucket.drop()

    def _take_head(self, view: memoryview) -> memoryview:
        """Takes what belongs to the header, opens the bucket once it is whole, and gives back the rest."""
        view = self._fill_head(view, 8)
        if len(self._head) < 8:
            return view
        length = int.from_bytes(self._head[:8], "little")
        if length > _MAX_HEADER:
            raise WeightsRejectedError(f"{_SUBJECT} must be a safetensors file, got a broken header; {_REMEDY}.")
        view = self._fill_head(view, 8 + length)
        if len(self._head) == 8 + length:
            self._open()
        return view

    def _fill_head(self, view: memoryview, size: int) -> memoryview:
        count = max(0, size - len(self._head))
        self._head += view[:count]
        return view[count:]

    def _open(self) -> None:
        try:
            stored = parse_header(self._head[8:], _SUBJECT, _REMEDY)
        except CheckpointError as error:
            raise rejected(error, None) from error
        self._bucket = self._incoming.open(stored)
        views = [tensor_bytes(target) for target in self._bucket.targets]
        self._offload = [view for view in reversed(views) if len(view)]
