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
from flowroll.types import Number

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

    def prepare_update(self, name: str, source: str | None, decay: Number | None) -> Callable[[], int]:
        """Makes a set: a copy of the source, or decay x the set + (1 - decay) x the source, in float32.

        An average stays in float32, so that steps too small for the weights' dtype add up.

        Args:
            name: The name of the set.
            source: Another set; None: the weights that the engine was last given.
            decay: The set's own share; None: it becomes a copy.

        Returns:
            A function that puts the set in place of the one of its name, and returns the number of its bytes on this rank.

        Raises:
            EngineError: There is not enough memory. Nothing has changed.
        """
        assert self.active is None
        new = self._live() if source is None else self._sets[source]
        made = _kept(lambda: _on_host(new) if decay is None else _averaged(self._sets[name], new, decay))

        def keep() -> int:
            self._sets[name] = made
            return sum(tensor.nbytes for tensor in made.values())

        return keep

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


def _averaged(old: _Set, new: _Set, decay: Number) -> _Set:
    memory = PinnedMemory()

    def average(one: Tensor, other: Tensor) -> Tensor:
        kept = memory.empty(one.shape, torch.float32)
        return kept.copy_(one).mul_(decay).add_(other.detach().cpu().to(torch.float32), alpha=1 - decay)

    return {key: average(old[key], tensor) for key, tensor in new.items()}
