"""Named tensors pickled as SGLang's trainers do it."""

import base64
import io
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor


@dataclass
class FlattenedTensorMetadata:
    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


@contextmanager
def trainer(module: str = "sglang.srt.weight_sync.tensor_bucket", strategy: str = "file_system") -> Iterator[None]:
    """Within it, this process pickles tensors and metadata as a trainer's does."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    own, words = FlattenedTensorMetadata.__module__, module.split(".")
    fakes = {".".join(words[: count + 1]): types.ModuleType(module) for count in range(len(words))}
    fakes[module].FlattenedTensorMetadata = FlattenedTensorMetadata  # type: ignore[attr-defined]
    FlattenedTensorMetadata.__module__ = module
    replaced = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
        FlattenedTensorMetadata.__module__ = own
        for name, known in replaced.items():
            del sys.modules[name]
            if known is not None:
                sys.modules[name] = known


def own_segments() -> set[str]:
    """The segments of shared memory that this process made; other test workers have theirs."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")}


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(value)
    return buffer.getvalue()


def text(value: object) -> str:
    return base64.b64encode(value if isinstance(value, bytes) else pickled(value)).decode()


def flattened(tensors: Mapping[str, Tensor], *, as_bytes: bool = True) -> dict[str, Any]:
    """A bucket: as bytes, or, as older versions make it, in the dtype that all of its tensors have."""
    flat = [tensor.flatten().view(torch.uint8) if as_bytes else tensor.flatten() for tensor in tensors.values()]
    metadata, start = [], 0
    for (name, tensor), part in zip(tensors.items(), flat, strict=True):
        end = start + part.numel()
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, end - start))
        start = end
    return {"flattened_tensor": torch.cat(flat), "metadata": metadata}


def pushed(
    tensors: Mapping[str, Tensor], *, version: str | None, bucket_bytes: int = 10**6, num_ranks: int = 1, **body: Any
) -> Iterator[tuple[dict[str, Any], object]]:
    """The requests of a push as a colocated trainer of miles sends them, each with what it must keep until it is answered.

    Tensors come in buckets of a size and, in each, by dtype; every rank of the trainer sends the same.
    """
    lots: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if lots[-1] and sum(one.nbytes for one in lots[-1].values()) + tensor.nbytes >= bucket_bytes:
            lots.append({})
        lots[-1][name] = tensor
    for lot in lots:
        for dtype in dict.fromkeys(tensor.dtype for tensor in lot.values()):
            buckets = [
                {"transformer": flattened({name: tensor for name, tensor in lot.items() if tensor.dtype == dtype})}
                for _ in range(num_ranks)
            ]
            yield (
                {
                    "serialized_named_tensors": [text(bucket) for bucket in buckets],
                    "payload_gpu_uuids": [f"GPU-00000000-0000-0000-0000-{rank:012}" for rank in range(num_ranks)],
                    "load_format": "flattened_bucket",
                    "target_modules": ["transformer"],
                    "weight_version": version,
                    **body,
                },
                buckets,
            )
