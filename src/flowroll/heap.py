"""Returning freed memory to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

# Only glibc has it. Other C libraries keep less, or return it by themselves.
_malloc_trim: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Returns to the system what the C library keeps of freed memory, in about a millisecond.

    glibc returns what lies at the end of its heaps, and requests of many sizes leave holes elsewhere: the resident memory of a
    server rises for hours although nothing is held. Does nothing where the C library is another one.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
