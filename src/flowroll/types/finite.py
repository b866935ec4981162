"""A test of whether a tensor holds only finite numbers."""

from __future__ import annotations

import math

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Tells whether no entry is NaN or infinite, in one pass over the tensor that allocates no second tensor."""
    if not tensor.is_floating_point():
        return True
    # A sum with NaN or infinity in it is not finite. A sum of finite numbers may overflow too, so then each number is checked.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
