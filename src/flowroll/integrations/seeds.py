"""Seeds of trainers that have more bits than those of an engine."""

from __future__ import annotations

from typing import Any

from flowroll.types.plain import plain
from flowroll.types.rules import is_int, require

# The largest seed that torch's generators take from a signed 64-bit integer, and that trainers send.
MAX_TRAINER_SEED = 2**63 - 1


def fold_seed(seed: Any, field: str = "seed") -> int:
    """Returns the 32-bit seed of an engine for a trainer's seed of up to 63 bits: the exclusive or of its two halves.

        (seed ^ (seed >> 32)) mod 2^32

    A seed below 2^32 stays as it is. Of seeds whose upper halves are equal, no two become one; of any others, two share a seed
    with the chance of a collision of 32 bits.

    Args:
        seed: The trainer's seed, in [0, 2^63): an integer of Python, numpy or torch.
        field: The name of the field in an error message.

    Raises:
        InvalidRequestError: The seed is no integer in that range.
    """
    seed = plain(seed)
    ok = is_int(seed) and 0 <= seed <= MAX_TRAINER_SEED
    require(ok, field, "be an integer from 0 to 2^63 - 1", seed, "send the seed of one sample")
    return int((seed ^ (seed >> 32)) % 2**32)
