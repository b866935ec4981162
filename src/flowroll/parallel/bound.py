"""Runs a module in a process that is bound to the process that started it: `python bound.py PARENT MODULE ARGUMENTS...`.

The kernel kills a bound process as soon as its parent has ended, in whatever way: also while it imports or loads for seconds,
and whether or not Python runs in it just then. This file imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_ORPHANED = 70


def bind(parent: int) -> None:
    """Has the kernel kill this process when its parent ends: more exactly, the thread of the parent that started it.

    Args:
        parent: The process id of the parent. If the parent has ended already, this process ends too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(_ORPHANED)


def unbind() -> None:
    """Ends the effect of `bind`, so that the thread that started this process may end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0)


if __name__ == "__main__":
    bind(int(sys.argv[1]))
    module = sys.argv[2]
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
