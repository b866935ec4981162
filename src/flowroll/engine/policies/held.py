"""The sets of weights that one rank holds in the host's memory, and their exchange with the weights in place.

There is never a second set on the device. Changes have two halves, so that either all ranks make them or none: the first half
copies and can fail; the second cannot. An exchange copies into the memory of the weights in place: their addresses stay, and
with them the bits of every product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from flowroll.engine.weights.host import PinnedMemory
from flowroll.engine.weights.staged import slots_of
from flowroll.errors import EngineError, InvalidRequestError

# The tensors of a set by name; of a sharded weight, this rank's rows.
_Set: TypeAlias = Mapping[str, Tensor]


class HeldWeights:
    """Holds sets of the transformer's weights on one rank. Only one thread uses it.

    Args:
        transformer: The transformer in memory, or this rank's part of it.

    Attributes:
        active: The name of the set that is in place; None: the weights that the engine was last given.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._sets: dict[str, _Set] = {}
        # The weights that the engine was last given, while another set is in place.
        self._given: _Set = {}
        self.active: str | None = None

    def num_bytes(self, name: str) -> int:
        """Returns the number of bytes of a set on this rank."""
        return sum(tensor.nbytes for tensor in self._sets[name].values())

    def prepare_copy(self, name: str, source: str | None) -> Callable[[], None]:
        """Copies a set, or the weights that the engine was last given (None); the returned function names it.

        Raises:
            EngineError: There is not enough memory. Nothing has changed.
        """
        return self._keeping(name, lambda: _on_host(self._source(source)))

    def prepare_average(self, name: str, source: str | None, decay: float) -> Callable[[], None]:
        """Makes decay x the set + (1 - decay) x the source, in float32; the returned function puts it in the set's place.

        It stays in float32, so that steps too small for the weights' dtype add up.

        Raises:
            EngineError: There is not enough memory. Nothing has changed.
        """
        old = self._sets[name]

        def average() -> _Set:
            memory = PinnedMemory()
            return {key: _averaged(old[key], tensor.cpu(), decay, memory) for key, tensor in self._source(source).items()}

        return self._keeping(name, average)

    def drop(self, name: str) -> None:
        """Forgets a set that is not in place."""
        assert name != self.active
        del self._sets[name]

    def prepare_exchange(self, name: str | None) -> Callable[[], None]:
        """Makes ready to put a set in place; the returned function does it.

        Raises:
            InvalidRequestError: There is no such set any more.
            EngineError: There is not enough memory for the weights in place. Nothing has changed.
        """
        if name is not None and name not in self._sets:
            raise InvalidRequestError(
                f"policy must still be there, got {name}, which was dropped; make it again.", field="policy"
            )
        live = self._live()
        given = self._given
        if self.active is None and name is not None:
            given = _kept(lambda: _on_host(live))
        wanted = given if name is None else self._sets[name]

        def exchange() -> None:
            if name != self.active:
                with torch.no_grad():
                    for key, tensor in live.items():
                        # Of a set in float32 this rounds to the weights' dtype, as loading a checkpoint does.
                        tensor.data.copy_(wanted[key])
            self.active, self._given = name, {} if name is None else given

        return exchange

    def _keeping(self, name: str, make: Callable[[], _Set]) -> Callable[[], None]:
        made = _kept(make)

        def keep() -> None:
            self._sets[name] = made

        return keep

    def _source(self, name: str | None) -> _Set:
        assert self.active is None
        return self._live() if name is None else self._sets[name]

    def _live(self) -> dict[str, Tensor]:
        return {name: slot.live for name, slot in slots_of(self._transformer).items()}


def _kept(make: Callable[[], _Set]) -> _Set:
    try:
        return make()
    except (MemoryError, RuntimeError) as error:  # torch's lack of memory is a RuntimeError
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EngineError(
            f"a policy must find room in the host's memory, got {type(error).__name__}: {reason}; drop one, then ask again."
        ) from error


def _on_host(tensors: _Set) -> _Set:
    memory = PinnedMemory()
    return {key: memory.empty(one.shape, one.dtype).copy_(one.detach()) for key, one in tensors.items()}


def _averaged(old: Tensor, new: Tensor, decay: float, memory: PinnedMemory) -> Tensor:
    kept = memory.empty(old.shape, torch.float32)
    return kept.copy_(old).mul_(decay).add_(new.detach().to(torch.float32), alpha=1 - decay)
