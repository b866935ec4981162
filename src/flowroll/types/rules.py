"""How a rule about one value of a request is checked and worded; the modules beside this one have the rules themselves."""

from __future__ import annotations

import math
from typing import NoReturn

from flowroll.errors import InvalidRequestError


def require(ok: bool, field_name: str, rule: str, value: object, remedy: str) -> None:
    """Refuses a value unless it is right.

    Args:
        ok: Whether it is.
        field_name: The field.
        rule: The rule in words, with its verb.
        value: The value, or what of it breaks the rule.
        remedy: What to do.

    Raises:
        InvalidRequestError: It is not.
    """
    if not ok:
        refuse(field_name, rule, shown(value), remedy)


def refuse(field_name: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Refuses a value; see `require`.

    Raises:
        InvalidRequestError: Always.
    """
    raise InvalidRequestError(f"{field_name} must {rule}, got {got}; {remedy}.", field=field_name)


def shown(value: object) -> str:
    """Returns a short text of a value."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of several thousand digits, also inside a tuple.
        return "a huge integer"
    return text if len(text) <= 80 else text[:77] + "..."


def is_int(value: object) -> bool:
    """Tells whether a value is an integer, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Tells whether a value is a finite number."""
    # math.isfinite would overflow for a huge integer.
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))
