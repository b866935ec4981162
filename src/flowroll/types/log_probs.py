"""The rules for the form of the log-probs that a request asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from flowroll.sampling.transition import LogProbForm
from flowroll.types.plain import plain
from flowroll.types.rules import require


def as_log_prob_form(given: object) -> LogProbForm:
    """Returns a form from one, or from a mapping of its fields.

    Raises:
        InvalidRequestError: It is neither, or a value breaks its rule.
    """
    name, known = "log_prob", [field.name for field in fields(LogProbForm)]
    if isinstance(given, Mapping):
        for key in given:
            require(key in known, name, f"hold {', '.join(known)} alone", key, "remove that name")
        given = LogProbForm(**{key: plain(value) for key, value in given.items()})
    require(isinstance(given, LogProbForm), name, f"be an object with {', '.join(known)}", given, "use {} for the usual form")
    assert isinstance(given, LogProbForm)
    require(given.reduce in ("mean", "sum"), name, 'have "mean" or "sum" as reduce', given.reduce, "choose one of these")
    for key in ("constants", "inverse_variance"):
        value = getattr(given, key)
        require(isinstance(value, bool), name, f"have true or false as {key}", value, "use a bool")
    return given
