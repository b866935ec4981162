"""Converts numbers and arrays of numpy and torch to plain Python values."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """Converts numbers of numpy and torch to Python's, and lists, ranges and 1-D arrays to tuples; keeps all else."""
    if isinstance(value, tuple | list | range):
        return tuple(map(_one, value))
    made = _one(value)
    return tuple(made) if isinstance(made, list) else made


def _one(value: Any) -> Any:
    """Converts a value of 0 or 1 dimensions to plain Python; a value that its device does not give out stays unchanged."""
    if isinstance(value, str | int | float | None) or getattr(value, "ndim", None) not in (0, 1):
        # numpy's float64 is a float, and its text is text.
        return float(value) if isinstance(value, float) and type(value) is not float else value
    try:
        return value.tolist()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return value
