"""Forks: where a sample becomes several, and how each of them is named and seeded. Owns the rules of the field `fork`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flowroll.types.rules import is_int, require

# The steps at which samples fork, ascending, each with its number of children.
Fork: TypeAlias = tuple[tuple[int, int], ...]
MAX_CHILDREN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One level of the tree that a sample is a leaf of: the node that it belongs to below a fork.

    Attributes:
        step: The step at which the parent forked: the first one whose noise is the child's own.
        parent: The id of the parent: the place of the sample that was started among those of the request, then the child of
            each level, as in "0/3".
        id: The id of this node: that of its parent, and its own place among the children.
        sde_seed: The seed of the node's noise, from `step` on.
    """

    step: int
    parent: str
    id: str
    sde_seed: int


def node_at(branches: Sequence[Branch] | None, step: int) -> str | None:
    """Returns the id of the node whose forward a step is, which a step at a fork shares with its siblings.

    Args:
        branches: The branches of a sample's record; None: it is no leaf of a tree.
        step: The step, counted from 0.
    """
    if not branches:
        return None
    return next((branch.parent for branch in branches if step <= branch.step), branches[-1].id)


def plain_fork(given: object) -> object:
    """Returns a fork as ascending pairs, from a mapping of steps, numbers or their digits, to numbers of children."""
    if not isinstance(given, Mapping):
        return given
    pairs = [
        (int(step) if isinstance(step, str) and step.isdecimal() and len(step) < 10 else step, n) for step, n in given.items()
    ]
    return tuple(sorted(pairs, key=lambda pair: pair[0] if is_int(pair[0]) else -1))


def check_fork(fork: object) -> None:
    """Checks the steps and the numbers of a fork; whether its steps can fork is known where the grid is.

    Raises:
        InvalidRequestError: A step or a number of children is none.
    """
    if fork is None:
        return
    remedy = 'send {"2": 4} to fork at step 2 into four'
    is_pairs = isinstance(fork, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in fork)
    require(is_pairs and fork != (), "fork", "be an object of steps and numbers of children", fork, remedy)
    assert isinstance(fork, tuple)
    for step, children in fork:
        require(is_int(step) and step >= 0, "fork", "have steps that are integers >= 0", step, "count steps from 0")
        is_number = is_int(children) and 2 <= children <= MAX_CHILDREN
        require(is_number, "fork", f"have from 2 to {MAX_CHILDREN} children at a step", children, remedy)
    steps = [step for step, _ in fork]
    require(steps == sorted(set(steps)), "fork", "name each step once, in ascending order", steps, remedy)


def count_leaves(fork: Fork | None) -> int:
    """Returns the number of leaves of a sample's tree; 1 without a fork."""
    return math.prod(children for _, children in fork or ())
