r"""What of an adapter's configuration peft compiles as regular expressions: those that could hold up the server are refused.

Python matches by trying, and holds its lock meanwhile: `([\w.]+)+!` takes longer on one name than the server will run. How many
ways of trying there can be is bounded from the pattern's text:

- nothing after a group repeats it, there is no `(?`, and no group is referred to; so what repeats is one character;
- each repetition may then end at any character of the name, and each group, like the whole, take any of its alternatives.

Lists of names, which is what peft writes, are no patterns and have no such bound; nor have keys without repetition and choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from flowroll.errors import WeightsRejectedError

_MAX_CHARS, _MAX_KEYS, _MAX_NAMES = 1000, 1024, 4096
# Keys, or patterns of layers, that are more than a name: each is tried on every linear.
_MAX_PATTERNS = 16
# As long as a linear's name may be. With it, and with so many ways, one match takes a tenth of a second at the very most.
_NAME_CHARS, _MAX_WAYS = 64, 2**24
_FORBIDDEN = re.compile(r"\)[*+?{]|\(\?|\\[1-9]")
_REPEATS = re.compile(r"[*+?{]")
_BEYOND_NAMES = re.compile(r"[*+?{|(]")
_REMEDY = "list the modules by name"


def check_patterns(config: Mapping[str, Any]) -> None:
    """Checks everything of a configuration that chooses modules.

    Raises:
        WeightsRejectedError: A pattern is none, or could take too long; or there are too many.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        texts = [value] if isinstance(value, str) else _names(key, value)
        # A list of layers' names is one of patterns all the same.
        if isinstance(value, str) or key == "layers_pattern":
            _check_all(key, texts, _MAX_PATTERNS)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_all(key, list(config.get(key) or {}), _MAX_KEYS)


def _names(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_NAMES or not all(isinstance(name, str) for name in value):
        raise _refused(f"{key} must be a pattern or a list of at most {_MAX_NAMES} names, got another")
    return value


def _check_all(key: str, patterns: list[str], most: int) -> None:
    if len(patterns) > most or sum(_BEYOND_NAMES.search(pattern) is not None for pattern in patterns) > _MAX_PATTERNS:
        raise _refused(f"{key} must hold at most {most} names, and {_MAX_PATTERNS} that are more, got {len(patterns)}")
    for pattern in patterns:
        if len(pattern) > _MAX_CHARS:
            raise _refused(f"{key} must have patterns of at most {_MAX_CHARS} characters, got {len(pattern)}")
        if _FORBIDDEN.search(pattern) or _ways(pattern) > _MAX_WAYS:
            raise _refused(f"{key} must hold patterns that are quickly tried, got {pattern[:80]}")
        try:
            # Alone: peft puts it between brackets, which it could close.
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise _refused(f"{key} must hold regular expressions, got {pattern[:80]} ({str(error)[:80]})") from error


def _ways(pattern: str) -> float:
    """At most so many ways of trying it there are."""
    groups = 1 + pattern.count("(")
    repeats = len(_REPEATS.findall(pattern))
    # However the choices are spread over the groups, their product is greatest if evenly. Logarithms: of powers beyond floats.
    return math.exp(min(repeats * math.log(_NAME_CHARS) + groups * math.log1p(pattern.count("|") / groups), 700.0))


def _refused(what: str) -> WeightsRejectedError:
    return WeightsRejectedError(f"{what}; {_REMEDY}.", field="lora_path")
