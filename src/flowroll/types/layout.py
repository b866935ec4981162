"""How an engine is spread over ranks: `Layout`, and what a model family declares about its transformer: `ParallelPlan`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from flowroll.errors import InvalidRequestError

_AXIS = re.compile(r"(sp|tp|cfg)(\d{1,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The degrees of an engine's parallel axes; the default is one rank.

    Attributes:
        cfg_parallel: Whether the conditional and the unconditional branch run on two groups of ranks.
        sp: The number of ranks that share the rows of the token sequence.
        tp: The number of ranks that share the output columns of the transformer's linear layers.

    Raises:
        InvalidRequestError: A degree is below 1.
    """

    cfg_parallel: bool = False
    sp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.cfg_parallel, bool):
            raise InvalidRequestError(
                f"cfg_parallel must be True or False, got {self.cfg_parallel!r}; there are two branches, so it has no degree.",
                field="cfg_parallel",
            )
        for name in ("sp", "tp"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise InvalidRequestError(f"{name} must be an integer >= 1, got {degree!r}; use 1 for no sharding.", field=name)

    @property
    def cfg(self) -> int:
        """The number of rank groups over which the guidance branches are spread: 2 or 1."""
        return 2 if self.cfg_parallel else 1

    @property
    def num_ranks(self) -> int:
        """The number of ranks of the engine."""
        return self.cfg * self.sp * self.tp

    @property
    def name(self) -> str:
        """The layout's name, e.g. "sp2xcfg2", or "single" for one rank; `parse` reads it."""
        parts = [f"{axis}{degree}" for axis in ("sp", "cfg", "tp") if (degree := getattr(self, axis)) > 1]
        return "x".join(parts) or "single"

    @classmethod
    def parse(cls, name: str) -> Layout:
        """Returns the layout of a name such as "sp2", "cfg2", "sp2xtp2" or "single".

        Raises:
            InvalidRequestError: There is no layout of that name.
        """
        degrees: dict[str, int] = {}
        for part in [] if name == "single" else name.split("x"):
            match = _AXIS.fullmatch(part)
            if match is None or match[1] in degrees or (match[1] == "cfg" and match[2] not in ("1", "2")):
                raise InvalidRequestError(
                    f"a layout must be a product of spN, tpN and cfg2, got {name!r}; write e.g. sp2, cfg2 or sp2xtp2.",
                    field="layouts",
                )
            degrees[match[1]] = int(match[2])
        return cls(cfg_parallel=degrees.get("cfg", 1) == 2, sp=degrees.get("sp", 1), tp=degrees.get("tp", 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A tensor that is narrowed to the part of this rank.

    Attributes:
        module: Path of a module in the transformer; `*` stands for every child, `-1` for the last.
        argument: Name of the argument to narrow; None: the module's output.
        item: Index in an output that is a tuple; None: the output is the tensor.
        rows: Dimension of the token rows (sequence parallel); None: not narrowed by rows.
        branches: Dimension of the guidance branches (CFG-parallel); None: not narrowed by branches.
        is_behind_others: Whether the region's rows are the last ones of the tensor, behind rows that stay whole.
    """

    module: str
    argument: str | None = None
    item: int | None = None
    rows: int | None = None
    branches: int | None = None
    is_behind_others: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """A module whose output is made whole again.

    Attributes:
        module: Path of the module in the transformer.
        rows: Dimension of the token rows.
        branches: Dimension of the guidance branches; None where branches are separate forwards.
    """

    module: str
    rows: int
    branches: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of the transformer in which a rank computes its own rows.

    Every module between `enter` and `leave` treats rows independently, but for attention, whose keys and values are gathered.

    Attributes:
        enter: Where the hidden states are narrowed.
        follow: The other tensors that are narrowed in the same way.
        leave: The module whose output is gathered.
        attention: Path of the attention modules in the region.
        sliced: Paths of linears whose input is a part of a longer sequence. For a pair of branches such a part is not
            contiguous, and torch's linear adds the bias to the rounded product; for one branch it is, and the sum is rounded
            once (measured with torch 2.13 on CPU, bfloat16). Those listed here compute one branch as they compute a pair.
        unless: An argument of the entered module; a forward that gives it is not sharded.
        is_in_front: Whether attention has the sharded keys before those that are not sharded; otherwise they come after them.
    """

    enter: Split
    follow: tuple[Split, ...] = ()
    leave: Gather
    attention: str
    sliced: tuple[str, ...] = ()
    is_in_front: bool = False
    unless: str | None = None

    def following(self, *more: Split) -> Region:
        """Returns this region with more tensors to narrow."""
        return replace(self, follow=(*self.follow, *more))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """The parts of a transformer that can be sharded, declared from outside the model.

    Attributes:
        regions: Where rows (and branches that share a batch) are sharded.
        columns: Paths of the linear layers whose output columns are sharded.
    """

    regions: tuple[Region, ...]
    columns: tuple[str, ...]
