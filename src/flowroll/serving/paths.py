"""Which paths of this machine, and which hosts, a client may name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowroll.errors import ForbiddenError, InvalidRequestError

_MOST_SHOWN = 200
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")


def allowed_path(text: str, roots: Sequence[str], field: str = "model_path") -> Path:
    """Returns the path that a client sent, symbolic links resolved.

    Nothing is said of what lies outside the roots, not even whether it is there.

    Args:
        text: The path as it was sent.
        roots: Resolved folders; none: no path is allowed.
        field: What the request calls it.

    Raises:
        ForbiddenError: It does not lead into a root.
        InvalidRequestError: It is relative.
    """
    if not roots:
        raise ForbiddenError(
            "the server must be started with leave to read weights from its disk, got none; start it with --weights-root DIR.",
            field=field,
        )
    if not os.path.isabs(text):
        raise InvalidRequestError(
            f"{field} must be an absolute path on the server's disk, got {text[:_MOST_SHOWN]!r}; begin it with /.",
            field=field,
        )
    try:
        resolved = Path(text).resolve()
    except (OSError, ValueError, RuntimeError):  # no name that a file can have, or links in a circle
        resolved = None
    if resolved is None or not _is_inside(resolved, roots):
        raise _forbidden(text, field)
    return resolved


def check_inside(files: Iterable[Path], roots: Sequence[str], field: str = "model_path") -> None:
    """Refuses resolved files, found at an allowed path, of which one is a link that leads out.

    Raises:
        ForbiddenError: One does.
    """
    for file in files:
        if not _is_inside(file, roots):
            raise _forbidden(file.name, field)


def check_host(host: str, allowed: Sequence[str], field: str) -> None:
    """Refuses a host that this server is not to connect to; otherwise whoever reaches it could have it knock anywhere.

    Args:
        host: The host as it was sent.
        allowed: Hosts, to the letter, besides this machine; "*": every one.
        field: What the request calls it.

    Raises:
        ForbiddenError: It is none of these.
    """
    if host not in (*_THIS_MACHINE, *allowed) and "*" not in allowed:
        raise ForbiddenError(
            f"{field} must be this machine or a host that the server was started with, got {host[:_MOST_SHOWN]!r}; start it "
            "with --weight-group-host HOST.",
            field=field,
        )


def _is_inside(path: Path, roots: Sequence[str]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _forbidden(shown: str, field: str) -> ForbiddenError:
    return ForbiddenError(
        f"{field} must lead into a folder of --weights-root, got {shown[:_MOST_SHOWN]!r}; save the weights there.",
        field=field,
    )
