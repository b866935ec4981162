r"""Refuses regular expressions in an adapter's configuration, which peft compiles, if they could block the server.

Python matches by backtracking, and holds the interpreter lock meanwhile: `([\w.]+)+!` takes practically forever on one name.
The number of ways that a match can try is bounded from the pattern's text:

- no group is repeated, there is no `(?`, and no group is referred to, so only single characters are repeated;
- then each repetition can end at any character of the name, and each group, and the whole, can take any of its alternatives.

Lists of names, which peft writes, are not patterns, so this bound does not apply to them; nor does it restrict keys without
repetition and alternatives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from flowroll.errors import WeightsRejectedError

_MAX_CHARS, _MAX_KEYS, _MAX_NAMES = 1000, 1024, 4096
# The number of keys or layer patterns that are more than a name; each is tried on every linear.
_MAX_PATTERNS = 16
# The assumed longest name of a linear, and the largest number of ways of all patterns together. A way takes 0.5 to 25 ns, so
# one linear takes at most 0.1 s, and a model of a thousand linears a minute and a half, in which others have their turns.
_NAME_CHARS, _MAX_WAYS = 64, 2**22
_FORBIDDEN = re.compile(r"\)[*+?{]|\(\?|\\[1-9]")
_REPEATS = re.compile(r"[*+?{]")
_BEYOND_NAMES = re.compile(r"[*+?{|(]")
_REMEDY = "list the modules by name"


def check_patterns(config: Mapping[str, Any]) -> None:
    """Checks all options of a configuration that choose modules.

    Raises:
        WeightsRejectedError: A pattern is invalid or could take too long, or there are too many patterns or names.
    """
    ways = 0.0
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        texts = [value] if isinstance(value, str) else _names(key, value)
        # In layers_pattern, a list of names is also compiled as patterns.
        if isinstance(value, str) or key == "layers_pattern":
            ways += _check_all(key, texts, _MAX_PATTERNS)
    for key in ("rank_pattern", "alpha_pattern"):
        ways += _check_all(key, list(config.get(key) or {}), _MAX_KEYS)
    if ways > _MAX_WAYS:
        raise _refused("patterns must be quickly tried, got ones that are slow together")


def _names(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_NAMES or not all(isinstance(name, str) for name in value):
        raise _refused(f"{key} must be a pattern or a list of at most {_MAX_NAMES} names, got another")
    return value


def _check_all(key: str, patterns: list[str], most: int) -> float:
    """Checks the patterns of one option; returns the number of ways in which matches with them can be tried."""
    if len(patterns) > most or sum(_BEYOND_NAMES.search(pattern) is not None for pattern in patterns) > _MAX_PATTERNS:
        raise _refused(f"{key} must hold at most {most} names, and {_MAX_PATTERNS} that are more, got {len(patterns)}")
    for pattern in patterns:
        if len(pattern) > _MAX_CHARS:
            raise _refused(f"{key} must have patterns of at most {_MAX_CHARS} characters, got {len(pattern)}")
        if _FORBIDDEN.search(pattern) or _ways(key, pattern) > _MAX_WAYS:
            raise _refused(f"{key} must hold patterns that are quickly tried, got {pattern[:80]}")
        try:
            # Compiled by itself, because peft puts it between parentheses, which the pattern could close.
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise _refused(f"{key} must hold regular expressions, got {pattern[:80]} ({str(error)[:80]})") from error
    return math.fsum(_ways(key, pattern) for pattern in patterns if _BEYOND_NAMES.search(pattern))


def _ways(key: str, pattern: str) -> float:
    """Returns an upper bound of the number of ways in which a match with this pattern of an option can be tried."""
    groups = 1 + pattern.count("(")
    # peft lets all but the modules to choose begin anywhere in a name, which is one repetition more.
    repeats = len(_REPEATS.findall(pattern)) + (key not in ("target_modules", "exclude_modules"))
    # Repetitions end one after the other: n characters in k parts. The alternatives are worst if they are spread evenly over
    # the groups. Logarithms avoid float overflow.
    splits = repeats * math.log(_NAME_CHARS) - math.lgamma(repeats + 1)
    return math.exp(min(splits + groups * math.log1p(pattern.count("|") / groups), 700.0))


def _refused(what: str) -> WeightsRejectedError:
    return WeightsRejectedError(f"{what}; {_REMEDY}.", field="lora_path")
