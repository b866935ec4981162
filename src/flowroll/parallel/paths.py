"""Module paths with wildcards, as the plans of the families use them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn


def find_modules(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """Returns the modules at a path, each with its own path. A path's parts are names, patterns, or `-1` for the last child.

    A pattern such as `*` or `attn*` (as for file names) stands for every child whose name it matches; some of these children
    may lack the rest of the path.

    Raises:
        LookupError: No module is at this path, so the plan does not fit the model.
    """
    found = [("", root)]
    for atom in path.split("."):
        following = []
        for parent, module in found:
            children = dict(module.named_children())
            wanted = list(children)[-1] if atom == "-1" and children else atom
            names = [name for name in children if fnmatchcase(name, wanted)]
            following += [(f"{parent}.{name}".lstrip("."), children[name]) for name in names]
        found = following
    if not found:
        raise LookupError(f"{type(root).__name__} has no module {path}")
    return found
