"""The checksums of one engine's weights: computed in pieces, between which samples take steps, and kept until they change."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from flowroll.engine.runner.executor import Executor
from flowroll.families.checksums import typed_prefix
from flowroll.parallel.linears import ColumnParallelLinear, whole_tensors
from flowroll.types.tensors import plain_tensor, tensor_bytes

# How long is hashed between two steps, in seconds. A step of a large model takes longer, one of a small one is hardly delayed.
_PIECE_S = 0.2
# How many bytes are hashed, and gathered from other ranks, before the clock is looked at: some ten milliseconds.
_CHUNK_BYTES = 32 * 2**20
# "plain": the sha256 of a tensor's bytes. "typed": of its dtype, shape and bytes, see `typed_tensor_checksum`.
Kind: TypeAlias = Literal["plain", "typed"]
T = TypeVar("T")
# Computes a value in pieces: it yields between two of them, and returns the value.
Pieces: TypeAlias = Generator[None, None, T]


class WeightDigests:
    """Computes checksums of whole modules, those of their tensors, and keeps them.

    Args:
        find: Returns the module of a name, or raises the error why it cannot be read now.
        executor: Reaches the other ranks, which hold only their parts of the transformer.
    """

    def __init__(self, find: Callable[[str], nn.Module], executor: Executor) -> None:
        self._find, self._executor = find, executor
        self._kept: dict[str, dict[str, Any]] = {}

    def forget(self, module: str) -> None:
        """Drops what is known of a module, whose weights are about to change or have changed."""
        self._kept.pop(module, None)

    def known(self, module: str) -> str | None:
        """Returns what `of_module` found, if it was asked since the module's weights changed. May be called from any thread."""
        known: str | None = self._kept.get(module, {}).get("module")
        return known

    def of_module(self, module: str) -> Pieces[str]:
        """Computes the sha256 over a module's names and tensors; see `checksum_of`."""
        return self._keep(module, "module", self._hash_module)

    def of_tensors(self, module: str, kind: Kind) -> Pieces[dict[str, str]]:
        """Computes the checksum of each of a module's tensors, by name."""
        return self._keep(module, kind, lambda found: self._hash_each(found, kind))

    def _keep(self, module: str, kind: str, make: Callable[[nn.Module], Pieces[T]]) -> Pieces[T]:
        found = self._find(module)
        kept = self._kept.setdefault(module, {})
        if kind not in kept:
            kept[kind] = yield from make(found)
        value: T = kept[kind]
        return value

    def _hash_module(self, module: nn.Module) -> Pieces[str]:
        digest, pace = hashlib.sha256(), _Pace()
        for name, tensor in self._tensors(module):
            digest.update(name.encode())
            yield from pace.update(digest, name, tensor)
        return digest.hexdigest()

    def _hash_each(self, module: nn.Module, kind: Kind) -> Pieces[dict[str, str]]:
        found, pace = {}, _Pace()
        for name, tensor in self._tensors(module):
            digest = hashlib.sha256()
            if kind == "typed":
                digest.update(typed_prefix(tensor))
            yield from pace.update(digest, name, tensor)
            found[name] = digest.hexdigest()
        return found

    def _tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yields all of a module's tensors, whole, in the order of their names. Sharded ones are gathered some at a time."""
        if not any(isinstance(part, ColumnParallelLinear) for part in module.modules()):
            yield from whole_tensors(module)
            return
        for names in _chunks(module):
            # Gathered before any of them is yielded: no step may come between the ranks' collectives.
            with self._executor.gathering(names):
                tensors = list(whole_tensors(module, names))
            yield from tensors


class _Pace:
    """Tells when to let samples take a step."""

    def __init__(self) -> None:
        self._since_s, self._num_bytes = time.monotonic(), 0

    def update(self, digest: Any, name: str, tensor: Tensor) -> Pieces[None]:
        """Adds a tensor's bytes to a digest."""
        view = tensor_bytes(plain_tensor(tensor, name))
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            digest.update(chunk)
            self._num_bytes += len(chunk)
            if self._num_bytes >= _CHUNK_BYTES and time.monotonic() - self._since_s >= _PIECE_S:
                yield
                self._since_s, self._num_bytes = time.monotonic(), 0


def _chunks(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yields the names of a module's tensors, in their order, in groups of about `_CHUNK_BYTES`."""
    names: list[str] = []
    num_bytes = 0
    for name, tensor in sorted(module.state_dict().items()):
        names.append(name)
        num_bytes += tensor.nbytes
        if num_bytes >= _CHUNK_BYTES:
            yield tuple(names)
            names, num_bytes = [], 0
    if names:
        yield tuple(names)
