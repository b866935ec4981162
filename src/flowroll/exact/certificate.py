"""Asks about a model's own shapes when an engine is started, so that the answers are there before the first step.

The answers are those of `probe` and `questions`, in the one table of `findings`: what is asked here is not asked again, and
what is not asked here is asked when it is met. Only as much is asked as takes no time worth speaking of.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from flowroll.errors import InvalidRequestError
from flowroll.exact import probe, questions
from flowroll.exact.findings import FINDINGS
from flowroll.exact.kernels import KernelSet
from flowroll.exact.probe import Setting
from flowroll.exact.questions import Heads, Weight
from flowroll.parallel.linears import COLUMN_BLOCK, ColumnParallelLinear, planned_linears
from flowroll.parallel.shards import MIN_ROWS
from flowroll.types import Layout


@dataclass(frozen=True, slots=True)
class _Scope:
    """How much is asked about a kind of device.

    Attributes:
        rows: The numbers of rows of one sample; one row is that of conditioning.
        samples: The numbers of samples in a forward.
        operations: The most floating-point operations of all questions; those of the fewest are asked first.
        shard_operations: The same for the questions about several ranks, which nobody asks later.
        elements: The most elements of one operand.
    """

    rows: tuple[int, ...]
    samples: tuple[int, ...]
    operations: float
    shard_operations: float
    elements: int


# On a CPU large shapes take seconds, and are asked about when they are met.
_SCOPES = {
    "cpu": _Scope((1, 16, 64, 256), (2,), 5e8, 1e10, 2**25),
    "cuda": _Scope((1, 16, 64, 256, 1024, 4096), (2, 4, 16), 2e14, 2e14, 2**28),
}
# What the numbers of an operand cost to make, in operations each.
_MADE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The kernels of an engine, and what they were found to do with the shapes of its model.

    Attributes:
        name: The name of the set of kernels, which every record has: equal hardware, versions and settings have one name.
        hardware: The name of the device; of a CPU with the instruction set that torch uses.
        versions: The versions of the libraries that hold kernels, by name.
        settings: torch's settings, by name.
        num_threads: The number of CPU threads that the questions were asked with.
        num_asked: The number of questions about this model's shapes.
        num_merged: Of these, those about several samples in one forward that found every sample's bits kept; the others run for
            each sample by itself.
        gradients: Whether all products and attention that were asked about have the same bits in gradient mode, in which a
            trainer replays.
        num_known: The number of answers in memory, those of earlier starts and other models included.
        seconds: How long the questions took.
    """

    name: str
    hardware: str
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    num_threads: int
    num_asked: int
    num_merged: int
    gradients: bool
    num_known: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The shapes of a transformer's kernels."""

    weights: frozenset[Weight]
    heads: frozenset[Heads]
    widths: frozenset[int]

    @classmethod
    def of(cls, transformer: nn.Module) -> _Shapes:
        modules = list(transformer.modules())
        linears = (one for one in modules if isinstance(one, (nn.Linear, ColumnParallelLinear)))
        # The names that diffusers' attention classes have for the two.
        sizes = ((getattr(one, "heads", None), getattr(one, "inner_dim", None)) for one in modules)
        norms = (weight for one in modules if "Norm" in type(one).__name__ for weight in one.parameters(recurse=False))
        return cls(
            frozenset(map(_weight, linears)),
            frozenset((heads, width // heads) for heads, width in sizes if isinstance(heads, int) and isinstance(width, int)),
            frozenset(weight.shape[0] for weight in norms if weight.ndim == 1),
        )


def _weight(linear: nn.Linear | ColumnParallelLinear) -> Weight:
    outputs, columns = linear.weight.shape
    return outputs, columns, linear.bias is not None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, not yet asked: how many operations it takes, what it is about, and how it is asked."""

    operations: float
    about: str
    ask: Callable[[], object]


def certify(transformer: nn.Module, kernels: KernelSet, *, device: torch.device, dtype: torch.dtype) -> Certificate:
    """Asks what the kernels do with a model's shapes: with several samples in a forward, and in gradient mode.

    Args:
        transformer: The transformer, or this rank's part of it.
        kernels: What `use_exact_kernels` returned.
        device: The device of the transformer.
        dtype: The transformer's dtype.
    """
    started, scope = time.perf_counter(), _SCOPES[device.type]
    setting, shapes = (dtype, device, torch.get_num_threads()), _Shapes.of(transformer)
    with torch.no_grad():
        shared = [one.ask() for one in _affordable(_of_samples(shapes, scope, setting), scope.operations)]
        gradients = [one.ask() for one in _affordable(_of_gradients(shapes, scope, setting), scope.operations)]
    return Certificate(
        name=kernels.name,
        hardware=kernels.hardware,
        versions=kernels.versions,
        settings=kernels.settings,
        num_threads=setting[2],
        num_asked=len(shared) + len(gradients),
        num_merged=sum(found not in (probe.each, False) for found in shared),
        gradients=all(gradients),
        num_known=len(FINDINGS),
        seconds=time.perf_counter() - started,
    )


def check_shards(
    transformer: nn.Module, layout: Layout, columns: tuple[str, ...], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuses a layout whose ranks would not compute the bits of the whole: they would agree with each other and be wrong.

    Args:
        transformer: The whole transformer; its weights may have no memory.
        layout: How it is to be distributed.
        columns: The paths of the linears whose columns are distributed, as the family's plan has them.
        device: The device of rank 0.
        dtype: The transformer's dtype.

    Raises:
        InvalidRequestError: A part was found to have other bits than the whole.
    """
    scope, setting = _SCOPES[device.type], (dtype, device, torch.get_num_threads())
    rows = _of_rows(_Shapes.of(transformer), layout.sp, setting) if layout.sp > 1 else iter(())
    wide = frozenset(_weight(linear) for _, linear in planned_linears(transformer, columns))
    split = _of_columns(wide, layout.tp, scope, setting) if layout.tp > 1 else iter(())
    with torch.no_grad():
        for axis, degree, asked in (("sp", layout.sp, rows), ("tp", layout.tp, split)):
            differing = [one.about for one in _affordable(asked, scope.shard_operations) if not one.ask()]
            if differing:
                raise InvalidRequestError(
                    f"{axis} must be a degree whose parts have the bits of the whole on every rank, got {degree} in "
                    f"{str(dtype).removeprefix('torch.')} on {device.type} with {setting[2]} threads, where {differing[0]} "
                    f"{'has' if len(differing) == 1 else f'and {len(differing) - 1} more have'} others; use {axis}=1, "
                    "another dtype or number of threads.",
                    field=axis,
                )


def _affordable(asked: Iterator[_Asked], bound: float) -> list[_Asked]:
    """Returns the questions that take the fewest operations, as many as are within the bound together."""
    ordered = sorted(asked, key=lambda one: one.operations)
    totals = itertools.accumulate(one.operations for one in ordered)
    return [one for one, total in zip(ordered, totals, strict=True) if total <= bound]


def _of_product(rows: int, weight: Weight) -> float:
    outputs, columns, _ = weight
    return 4.0 * rows * outputs * columns + _MADE * (outputs + rows) * columns


def _of_samples(shapes: _Shapes, scope: _Scope, setting: Setting) -> Iterator[_Asked]:
    for rows in scope.rows:
        for count in scope.samples:
            tokens = (count,) if rows == 1 else (count, rows)
            for outputs, columns, has_bias in shapes.weights:
                if count * rows * max(outputs, columns) <= scope.elements:
                    shape, weight = torch.Size((*tokens, columns)), torch.Size((outputs, columns))
                    way = partial(probe._way, shape, count, weight, has_bias, True, setting)
                    operations = _of_product(count * rows, (outputs, columns, has_bias))
                    yield _Asked(operations, f"a product of {list(shape)}", way)
            if rows == 1:
                continue
            for heads, channels in shapes.heads:
                shape = torch.Size((count, heads, rows, channels))
                ask = partial(probe._attends_alike, shape, shape, (True, True, True), count, setting)
                yield _Asked((16.0 * rows + 3 * _MADE) * shape.numel(), f"attention of {list(shape)}", ask)
                yield _of_mean(torch.Size((count, rows, heads, channels)), setting)
            for width in shapes.widths:
                yield _of_mean(torch.Size((count, rows, width)), setting)


def _of_mean(shape: torch.Size, setting: Setting) -> _Asked:
    # The norms of the models that we know take the mean of squares in float32, whatever their dtype.
    ask = partial(probe._reduces_alike, shape, shape[0], (torch.float32, *setting[1:]))
    return _Asked(float(_MADE * shape.numel()), f"means of {list(shape)}", ask)


def _of_gradients(shapes: _Shapes, scope: _Scope, setting: Setting) -> Iterator[_Asked]:
    for rows in scope.rows:
        for weight in shapes.weights:
            ask = partial(questions.product_keeps_bits_with_gradients, rows, weight, setting)
            yield _Asked(_of_product(rows, weight), f"a product of {rows} rows with {list(weight[:2])}", ask)
        for heads in shapes.heads if rows > 1 else ():
            ask = partial(questions.attention_keeps_bits_with_gradients, rows, heads, setting)
            yield _Asked(16.0 * rows * rows * heads[0] * heads[1], f"attention of {rows} rows in {heads[0]} heads", ask)


def _of_rows(shapes: _Shapes, ranks: int, setting: Setting) -> Iterator[_Asked]:
    """Asks about the fewest rows that are sharded, and about more, which do not divide evenly."""
    for rows in (MIN_ROWS * ranks, MIN_ROWS * ranks + 37, 7 * MIN_ROWS * ranks + 3):
        for weight in shapes.weights:
            ask = partial(questions.product_keeps_bits_by_rows, rows, ranks, weight, setting)
            yield _Asked(_of_product(rows, weight), f"a product of {rows} rows with {list(weight[:2])}", ask)
        for heads in shapes.heads:
            ask = partial(questions.attention_keeps_bits_by_rows, rows, ranks, heads, setting)
            yield _Asked(16.0 * rows * rows * heads[0] * heads[1], f"attention of {rows} rows in {heads[0]} heads", ask)
        for width in shapes.widths:
            ask = partial(questions.mean_keeps_bits_by_rows, rows, ranks, width, (torch.float32, *setting[1:]))
            yield _Asked(float(_MADE * rows * width), f"a mean of {rows} rows of {width}", ask)


def _of_columns(weights: frozenset[Weight], ranks: int, scope: _Scope, setting: Setting) -> Iterator[_Asked]:
    for weight in weights:
        for rows in scope.rows:
            # Elsewhere every rank computes all columns.
            if rows >= MIN_ROWS or weight[0] // ranks % COLUMN_BLOCK == 0:
                ask = partial(questions.product_keeps_bits_by_columns, rows, ranks, weight, setting)
                yield _Asked(_of_product(rows, weight), f"a product of {rows} rows with {list(weight[:2])}", ask)
