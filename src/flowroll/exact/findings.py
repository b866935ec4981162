"""What kernels were found to do: the answers to the questions of `probe`, in memory and on disk.

There is one table for a process, as there is one set of kernels for each of its devices. A question is asked of the kernels at
its first meeting, or before, when an engine is started (`certificate`); a file in the cache folder carries the answers from one
process to the next.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import msgspec
import torch

from flowroll.exact.kernels import KernelSet

P = ParamSpec("P")
A = TypeVar("A", str, bool)
_log = logging.getLogger(__name__)

# The name of a way of computing, or whether something has the same bits.
Answer: TypeAlias = "str | bool"
# What is asked, the shapes and options that it is asked of, and last dtype, device and number of CPU threads.
Question: TypeAlias = "tuple[Any, ...]"

# The most answers in memory, more than a server meets between two restarts, and in a file, which every start reads in 10 ms or
# so; the oldest are forgotten first.
_IN_MEMORY, _IN_A_FILE = 65536, 2048
# The most files, one for each set of kernels; the oldest are removed first.
_FILES = 32
_FOLDER, _VARIABLE = "kernels", "FLOWROLL_CACHE_DIR"
# Answers depend on how the questions are put, so files are of one text of these modules.
_ASKED_BY = hashlib.sha256(
    b"".join((Path(__file__).parent / name).read_bytes() for name in ("probe.py", "questions.py", "findings.py"))
).hexdigest()[:8]


class _Entry(msgspec.Struct, array_like=True):
    asked: str
    about: tuple[Any, ...]
    dtype: str
    num_threads: int
    found: str | bool


class _File(msgspec.Struct):
    kernels: dict[str, Any]
    sha256: str
    entries: msgspec.Raw


class Findings:
    """A bounded table of answers. Any thread may ask; two threads that ask one question at once both find its one answer."""

    def __init__(self) -> None:
        self._found: dict[Question, Answer] = {}
        # How many answers there were in each file that was read or written.
        self._files: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self._found)

    def answer(self, question: Question, ask: Callable[..., Answer]) -> Answer:
        """Returns the answer to a question; at its first meeting that of `ask`, which is given the rest of the question."""
        found = self._found.get(question)
        if found is None:
            found = self._found[question] = ask(*question[1:])
            while len(self._found) > _IN_MEMORY:
                del self._found[next(iter(self._found))]
        return found

    def load(self, folder: Path, kernels: KernelSet, device: torch.device) -> bool:
        """Takes in, once, the answers that earlier processes found with a set of kernels; a damaged file is ignored.

        Returns:
            Whether there was a file.
        """
        path = _path(folder, kernels)
        if path in self._files:
            return True
        try:
            known = {_question(entry, device): entry.found for entry in _read(path)}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("%s is damaged and is made again: %s", path, error)
            return False
        self._found, self._files[path] = known | self._found, len(known)
        return True

    def save(self, folder: Path, kernels: KernelSet, device: torch.device) -> None:
        """Writes the answers for a device to its file, whole or not at all, if there are more of them than in the file."""
        path = _path(folder, kernels)
        entries = [_entry(*one) for one in list(self._found.items()) if one[0][-1][1] == device][-_IN_A_FILE:]
        if path in self._files and self._files[path] >= len(entries):
            return
        body = msgspec.json.encode(entries)
        file = _File(msgspec.to_builtins(kernels), hashlib.sha256(body).hexdigest(), msgspec.Raw(body))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                (whole := Path(scratch) / path.name).write_bytes(msgspec.json.encode(file))
                os.replace(whole, path)
            self._files[path] = len(entries)
            for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)[:-_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("what was found about this machine's kernels cannot be kept: %s", error)


# The table of this process.
FINDINGS = Findings()


def asked(kind: str) -> Callable[[Callable[P, A]], Callable[P, A]]:
    """Makes of a function that runs kernels a question, whose answer is remembered.

    Args:
        kind: The name of the question. Its arguments are shapes and options, given by position, and last the setting.
    """

    def remembered(ask: Callable[P, A]) -> Callable[P, A]:
        @functools.wraps(ask)
        def answer(*about: P.args, **options: P.kwargs) -> A:
            assert not options
            return cast(A, FINDINGS.answer((kind, *about), ask))

        return answer

    return remembered


def cache_folder(given: str | Path | None = None) -> Path:
    """Returns the folder for what is kept from one process to the next.

    Args:
        given: The folder; None: that of the environment variable FLOWROLL_CACHE_DIR, else `flowroll` in the user's cache.
    """
    if given is None and not (given := os.environ.get(_VARIABLE)):
        given = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowroll"
    return Path(given)


def _path(folder: Path, kernels: KernelSet) -> Path:
    return folder / _FOLDER / f"{kernels.name}-{_ASKED_BY}.json"


def _read(path: Path) -> list[_Entry]:
    file = msgspec.json.decode(path.read_bytes(), type=_File)
    if hashlib.sha256(file.entries).hexdigest() != file.sha256:
        raise ValueError("its digest does not fit")
    return msgspec.json.decode(file.entries, type=list[_Entry])


def _entry(question: Question, found: Answer) -> _Entry:
    asked, *about, (dtype, _, num_threads) = question
    return _Entry(asked, tuple(about), str(dtype).removeprefix("torch."), num_threads, found)


def _question(entry: _Entry, device: torch.device) -> Question:
    return (entry.asked, *map(_hashable, entry.about), (getattr(torch, entry.dtype), device, entry.num_threads))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
