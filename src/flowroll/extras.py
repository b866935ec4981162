"""Extras: the libraries that only some uses of flowroll need, and the message about what to install if one is missing.

The extras themselves are listed in pyproject.toml. This module must not know what they are for.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from flowroll.errors import MissingExtraError


@contextlib.contextmanager
def extra_for(user: str, extra: str) -> Iterator[None]:
    """Turns a failed import of an extra's library into an error that names the extra; the outermost of nested blocks decides.

    Args:
        user: What needs the libraries, e.g. "flowroll.client".
        extra: The extra that installs the libraries.

    Raises:
        MissingExtraError: A library cannot be imported; the message names it and the `pip install` that installs it.
    """
    try:
        yield
    except ImportError as error:
        if (missing := missing_extra(user, extra, error)) is None:
            raise
        raise missing from error


def check_installed(*libraries: str) -> None:
    """Checks that these libraries are installed, without importing them.

    Raises:
        ModuleNotFoundError: A library is not installed.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def missing_extra(user: str, extra: str, error: ImportError) -> MissingExtraError | None:
    """Makes the error about a failed import; None if the import that failed is one of flowroll's own modules."""
    library = (error.name or "").partition(".")[0]
    if library in ("", "flowroll"):
        return None
    reason = "it is not installed" if isinstance(error, ModuleNotFoundError | MissingExtraError) else str(error)
    missing = MissingExtraError(f"{user} must have {library}, got none ({reason}); run: pip install 'flowroll[{extra}]'.")
    missing.name = library
    return missing
