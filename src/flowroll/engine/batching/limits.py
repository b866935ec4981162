"""How much runs at once."""

from __future__ import annotations

from dataclasses import dataclass

from flowroll.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How much an engine runs at once.

    Attributes:
        max_batch_samples: Samples in one forward.
        max_running_samples: Samples in memory from their initial noise to their decoded picture.
        max_running_pixels: Their pixels together. A sample that exceeds this by itself runs alone.

    Raises:
        InvalidRequestError: A limit below 1.
    """

    max_batch_samples: int = 16
    max_running_samples: int = 32
    max_running_pixels: int = 32 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_batch_samples", "max_running_samples", "max_running_pixels"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidRequestError(f"{name} must be >= 1, got {value}; leave it out.", field=name)

    def admits(self, *, pixels: int, num_running: int, running_pixels: int) -> bool:
        """Whether one more sample of so many pixels may start."""
        if num_running == 0:
            return True
        return num_running < self.max_running_samples and running_pixels + pixels <= self.max_running_pixels


# The ranks of a replica take the steps of one sample at a time.
ONE_BY_ONE = BatchLimits(max_batch_samples=1, max_running_samples=1)
