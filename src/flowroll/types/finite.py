"""Whether a tensor holds finite numbers alone."""

from __future__ import annotations

import math

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Costs one pass over the tensor, without a second one in memory."""
    if not tensor.is_floating_point():
        return True
    # A sum with NaN or infinity in it is not finite. That of finite numbers may overflow, so only then each is looked at.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
