"""How many samples fit into one forward, learned from the forwards that ran out of memory."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

# So many forwards of the most that fits, and twice as many samples are tried: others on the device may have let go of theirs.
_PATIENCE = 64
# Kinds of samples that are remembered.
_KINDS = 256


@dataclass(slots=True)
class _Learned:
    failed: int
    most: int
    num_good: int = 0


class Room:
    """What was learned, by the key of the samples. Only the denoising loop touches it."""

    def __init__(self) -> None:
        self._learned: dict[Hashable, _Learned] = {}

    def most(self, key: Hashable, wanted: int) -> int:
        """How many of the wanted samples to put into one forward, at least 1."""
        learned = self._learned.get(key)
        return wanted if learned is None else min(wanted, learned.most)

    def ran_out(self, key: Hashable, size: int) -> None:
        """A forward of so many samples, more than one, ran out of memory: half as many are tried."""
        before = self._learned.pop(key, None)
        if len(self._learned) >= _KINDS:
            del self._learned[next(iter(self._learned))]
        self._learned[key] = _Learned(failed=size if before is None else max(before.failed, size), most=-(-size // 2))

    def went_well(self, key: Hashable, size: int) -> None:
        """A forward of so many samples came to its end."""
        learned = self._learned.get(key)
        if learned is None or size < learned.most:
            return
        learned.num_good += 1
        if learned.num_good == _PATIENCE:
            learned.most, learned.num_good = 2 * learned.most, 0
            if learned.most >= learned.failed:
                del self._learned[key]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory, of a device or, a plain RuntimeError in torch, of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
