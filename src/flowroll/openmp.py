"""Giving back the OpenMP threads that work for a thread on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

# `omp_pause_soft` of the OpenMP standard (5.0, section 3.2.44): threads end, settings stay.
_SOFT = 1


def release_team() -> None:
    """Ends the OpenMP threads that work for the calling thread; its next parallel work starts new ones.

    GNU's library gives every thread that calls it a team of its own, and keeps it. Once all teams have more threads than there
    are CPUs, none of them waits actively for its next work, and each parallel part of a function begins with waking threads: a
    product of a few rows takes 130 microseconds in place of 10 (two CPUs, the threads of an engine). So a thread gives its
    team back before it waits. It takes less than a millisecond as a rule. Nothing is done where torch uses another library.
    """
    if _pause is not None:
        _pause(_SOFT)


def _pause_function() -> Callable[[int], int] | None:
    """Returns `omp_pause_resource_all` of the library that torch is linked with, if it is GNU's."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        # LLVM's and Intel's, which also have GNU's functions, keep one set of threads for the whole process.
        return None if hasattr(library, "__kmpc_fork_call") else library.omp_pause_resource_all
    except (AttributeError, OSError):
        return None


_pause = _pause_function()
