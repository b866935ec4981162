"""Module paths with wildcards, as the plans of the families use them."""

from __future__ import annotations

from torch import nn


def find_modules(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules at a path, each with its own path: `*` stands for every child, `-1` for the last.

    Raises:
        LookupError: There is no such module: the plan does not fit the model.
    """
    found = [("", root)]
    for atom in path.split("."):
        following = []
        for parent, module in found:
            children = dict(module.named_children())
            names = list(children) if atom == "*" else [list(children)[-1] if atom == "-1" and children else atom]
            following += [(f"{parent}.{name}".lstrip("."), children[name]) for name in names if name in children]
        found = following
    if not found:
        raise LookupError(f"{type(root).__name__} has no module {path}")
    return found
