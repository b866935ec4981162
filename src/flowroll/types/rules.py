"""What the checks of a request share: how a refusal is worded, and what counts as a number."""

from __future__ import annotations

import math

from flowroll.errors import InvalidRequestError


def require(ok: bool, field: str, rule: str, value: object, remedy: str) -> None:
    """Refuses a value that breaks its rule.

    Raises:
        InvalidRequestError: `ok` is false: `<field> must <rule>, got <value>; <remedy>.`
    """
    if not ok:
        raise InvalidRequestError(f"{field} must {rule}, got {shown(value)}; {remedy}.", field=field)


def shown(value: object) -> str:
    """Returns a short text of a value."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of several thousand digits, also inside a tuple.
        return "a huge integer"
    return text if len(text) <= 80 else text[:77] + "..."


def is_int(value: object) -> bool:
    """Returns whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Returns whether a value is a finite number."""
    # math.isfinite would overflow for a huge integer.
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))
