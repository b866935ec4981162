"""Temporary folders that are removed even if the process that made them was killed: the next server's start does it.

A folder is locked as long as its process uses it. The kernel drops the lock with the process, so a folder without a lock is
left over, whichever container or process made it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "flowroll-scratch-"
# A folder may be made and not locked yet for a moment.
_YOUNG_S = 10.0


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a new folder, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(descriptor)


def sweep_scratch() -> list[Path]:
    """Removes the folders of this user that no process uses any more; returns their paths."""
    return [path for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if _remove_unused(path)]


def _remove_unused(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode) or time.time() - status.st_mtime < _YOUNG_S:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
