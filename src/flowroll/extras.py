"""Extras: the libraries that only some uses of flowroll need, and what to install where one is missing.

The extras themselves are listed in pyproject.toml. It must not know what they are for.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from flowroll.errors import MissingExtraError


@contextlib.contextmanager
def extra_for(user: str, extra: str) -> Iterator[None]:
    """Surrounds imports of an extra's libraries. Of nested blocks, the outermost one decides which extra is named.

    Args:
        user: What needs them, e.g. "flowroll.client".
        extra: The extra that brings them.

    Raises:
        MissingExtraError: One of them cannot be imported; names it and the `pip install` that brings it.
    """
    try:
        yield
    except ImportError as error:
        if (missing := missing_extra(user, extra, error)) is None:
            raise
        raise missing from error


def check_installed(*libraries: str) -> None:
    """Refuses to go on without these libraries, which are imported later, where they are used.

    Raises:
        ModuleNotFoundError: One of them is not installed.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def missing_extra(user: str, extra: str, error: ImportError) -> MissingExtraError | None:
    """What to raise of a failed import; None where it is no library that fails but our own code."""
    library = (error.name or "").partition(".")[0]
    if library in ("", "flowroll"):
        return None
    reason = "it is not installed" if isinstance(error, ModuleNotFoundError | MissingExtraError) else str(error)
    missing = MissingExtraError(f"{user} must have {library}, got none ({reason}); run: pip install 'flowroll[{extra}]'.")
    missing.name = library
    return missing
