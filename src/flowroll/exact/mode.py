"""The function modes of torch under which a forward is shared by several samples.

`Analysis` is active in the first forward of its kind. It follows every tensor from the inputs on, knows which samples it
belongs to, asks `rules` how each function is to be computed, and notes the answers. Beside every batched tensor it carries the
first
sample's own tensor, computed as that sample alone computes it: shapes, strides and bits of the batched one must agree with it
after every function.
`Repetition` is active in later forwards of the same kind: it computes every function in the way that was noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowroll.exact.checkpointing import remembered_blocks, saved_hooks
from flowroll.exact.functions import WRITES, named
from flowroll.exact.layout import CannotMergeError, same_bits, same_layout
from flowroll.exact.padding import Padding, cut, moved, same_padded_layout
from flowroll.exact.rules import decide
from flowroll.exact.tracking import Batched, Own, Place, tensors_in
from flowroll.exact.ways import Samples, Way
from flowroll.families import Output
from flowroll.parallel.mesh import gather_parts

# A function that the model called, and how it is computed; None: by the plain call.
Note: TypeAlias = "tuple[Callable[..., Any], Way | None]"

# Reads an attribute of a tensor.
Getter = type(Tensor.shape.__get__)  # type: ignore[attr-defined]
# Where a tensor's place is kept: an attribute of the tensor, so that it goes when the tensor goes.
_PLACE = "_flowroll_place"


class DivergedError(Exception):
    """A forward calls other functions than the analyzed forward of its kind."""


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of an analysis: how each function of a forward is computed.

    Attributes:
        steps: The functions of the forward, in the order of the calls.
        without_rule: Names of functions of the samples' data that have no rule, and are computed for each sample.
    """

    steps: tuple[Note, ...]
    without_rule: frozenset[str] = frozenset()


class Analysis(TorchFunctionMode):
    """Follows the first forward of its kind.

    Args:
        samples: The samples that share the forward.
        goes_on: Whether a forward that cannot be shared still runs to its end as a plain one, whose output is not used: other
            ranks wait for this one in the collectives of that forward.

    Attributes:
        failure: Why the forward cannot be shared; None if it can.
    """

    def __init__(self, samples: Samples, *, goes_on: bool = False) -> None:
        super().__init__()
        self.samples, self._goes_on = samples, goes_on
        self.failure: CannotMergeError | None = None
        self.steps: list[Note] = []
        # Blocks of a model are alike, and so are their notes: each is kept once.
        self._kept: dict[Note, Note] = {}
        self.without_rule: set[str] = set()
        # Marks the places of this analysis. Tensors may outlive the forward, and must not keep the analysis alive.
        self.token = object()
        # What may decide which tensors are kept for a backward: what does at the beginning, and checkpointing that we know.
        self._hooks: set[object] = set()

    def forward(
        self, transformer: Callable[..., Any], batched: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]
    ) -> tuple[Any, Notes]:
        """Runs the shared forward, and returns its output and its notes; neither may be used if there is a `failure`.

        Args:
            transformer: The model that is run.
            batched: The collated forward input.
            alone: The samples' own forward inputs.

        Raises:
            CannotMergeError: A function cannot be computed for several samples at once with the bits of each, and no other rank
                waits for this forward to end.
        """
        self._try(lambda: self._place_inputs(batched, alone))
        self._hooks = {saved_hooks()}
        with self, remembered_blocks(transformer, self._begin_block):
            output = transformer(**batched, return_dict=False)[0]
        self._try(lambda: self._check_output(output))
        return output, Notes(tuple(self.steps), frozenset(self.without_rule))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is gather_parts:
            return self._gather_parts(args)
        if self.failure is not None:
            return func(*args, **kwargs)
        found: list[Any] = []
        self._try(lambda: found.append(self._decided(func, args, kwargs)))
        return found[0] if found else func(*args, **kwargs)

    def _begin_block(self) -> Callable[[], AbstractContextManager[None]]:
        self._hooks.add(saved_hooks())
        return nullcontext

    def _try(self, check: Callable[[], object]) -> None:
        """Runs a check; if it fails, notes that the forward cannot be shared, or raises where the forward may stop."""
        if self.failure is not None:
            return
        try:
            check()
        except CannotMergeError as error:
            if not self._goes_on:
                raise
            self.failure = error

    def _gather_parts(self, args: Sequence[Any]) -> Tensor:
        """Gathers the ranks' parts once; the first sample's own tensor is its part of the result, as numbers are only moved."""
        result: Tensor = gather_parts(*args)
        self._note(gather_parts, None)
        _, part, _, dim, _ = args
        place = self.place(part)
        if not isinstance(place, Batched):
            self.put(result, place)
            return result

        def follow() -> None:
            if dim in (0, -part.ndim) or place.padding is not None:
                raise CannotMergeError("ranks have parts of the batch itself, or of padded texts")
            self.put_batched(result, result[: len(place.alone)].clone(), place.is_conditioning)

        self._try(follow)
        return result

    def _decided(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if type(func) is Getter:
            return self._get(func, args[0])
        if saved_hooks() not in self._hooks:
            raise CannotMergeError("what the backward needs is computed again, or kept elsewhere, in a way that is not known")
        found = [tensor for _, tensor in tensors_in(args, kwargs)]
        versions = [tensor._version for tensor in found]
        try:
            result, way = decide(self, func, args, kwargs)
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            if "memory" in str(error):
                raise
            # For instance, the model asks for a shape that a batch does not have. If the model is at fault, a sample alone
            # fails too.
            raise CannotMergeError(f"{named(func)} fails: {str(error).splitlines()[0]}") from error
        if func not in WRITES and versions != [tensor._version for tensor in found]:
            raise CannotMergeError(f"{named(func)} writes into its arguments")
        self._note(func, way)
        return result

    def _note(self, func: Callable[..., Any], way: Way | None) -> None:
        note = (func, way)
        self.steps.append(self._kept.setdefault(note, note))

    def place(self, tensor: Tensor) -> Place | None:
        """Returns the place of a tensor; None for what existed before the forward, such as weights and tables."""
        place: Place | None = getattr(tensor, _PLACE, None)
        return place if place is not None and place.trace is self.token else None

    def put(self, result: Any, place: Place | None, args: Sequence[Any] = ()) -> None:
        """Sets the place of every tensor in a result; an argument that is returned unchanged keeps its place."""
        if isinstance(result, Tensor):
            if not any(result is one for one in args):
                setattr(result, _PLACE, place)
        elif isinstance(result, (tuple, list)):
            for one in result:
                self.put(one, place, args)

    def put_batched(self, result: Any, alone: Any, is_conditioning: bool, padding: Padding | None = None) -> None:
        """Marks a result, or each of several, as batched, after comparing it with the first sample's own.

        Args:
            result: The result of the shared forward.
            alone: The first sample's own.
            is_conditioning: Whether it depends on nothing of a sample but its conditioning.
            padding: Where the texts in it are padded; None: every sample's own has the same shape.

        Raises:
            CannotMergeError: The first sample's part differs in layout or bits from what the sample has alone.
        """
        if isinstance(result, (tuple, list)):
            for one, own in zip(result, alone, strict=True):
                self.put_batched(one, own, is_conditioning)
        elif isinstance(result, Tensor):
            own = result[: len(alone)]
            if padding is None:
                lies_alike = same_layout(result, alone, self.samples.count)
            else:
                lengths = self.samples.lengths
                assert lengths is not None
                lies_alike = same_padded_layout(result, alone, padding, lengths, self.samples.count)
                own = cut(own, padding, lengths.own[0], lengths.padded)
            if not lies_alike:
                raise CannotMergeError(f"a result of {list(result.shape)} where a sample alone has {list(alone.shape)}")
            if not same_bits(own, alone):
                raise CannotMergeError("a result has other bits than the sample alone")
            setattr(result, _PLACE, Batched(self.token, alone, is_conditioning, padding))
        elif result is not None:
            raise CannotMergeError("a function of the samples' data returns no tensor")

    def _get(self, func: Any, tensor: Tensor) -> Any:
        """Reads an attribute of a tensor. An attribute that is a tensor is a view, and needs no way of its own."""
        found, place = func(tensor), self.place(tensor)
        if isinstance(found, Tensor) and place is not None:
            if isinstance(place, Batched):
                own = func(place.alone)
                padding, lengths = place.padding, self.samples.lengths
                if padding is not None and lengths is not None:
                    padding = moved(padding, found.shape, own.shape, lengths.missing)
                self.put_batched(found, own, place.is_conditioning, padding)
            else:
                self.put(found, place)
        return found

    def _place_inputs(self, batched: Mapping[str, Any], alone: Sequence[Mapping[str, Any]]) -> None:
        for name, value in batched.items():
            self._place_input(name, value, [one[name] for one in alone])

    def _place_input(self, name: str, value: Any, own: Sequence[Any]) -> None:
        count = self.samples.count
        if isinstance(value, Tensor):
            # Numbers of a pair may be one number, expanded; joined with others' they lie one after the other.
            own = [one.contiguous() if isinstance(one, Tensor) and one.ndim == 1 else one for one in own]
            if all(isinstance(one, Tensor) and one.ndim and same_bits(value, one) for one in own):
                # It has no batch dimension and is the same for every sample, as the weights are.
                return
            padding = Padding(1, 0) if self._is_padded(value, own) else None
            if padding is None and not all(isinstance(one, Tensor) and same_layout(value, one, count) for one in own):
                raise CannotMergeError(f"{name} is not collated along its first dimension")
            setattr(value, _PLACE, Batched(self.token, own[0].clone(), value.ndim == 1, padding))
        elif isinstance(value, list) and any(isinstance(one, Tensor) for one in value):
            rows = len(value) // count
            if not all(len(one) == rows and isinstance(one, list) for one in own):
                raise CannotMergeError(f"{name} has other numbers of entries in other samples")
            for index, entry in enumerate(value):
                # Copied, since samples may share one tensor, and each entry needs a place of its own.
                value[index] = entry.clone()
                setattr(value[index], _PLACE, Own(self.token, index // rows))
        elif not isinstance(value, list) and any(one != value for one in own):
            raise CannotMergeError(f"{name} differs among the samples and is not collated")

    def _is_padded(self, value: Tensor, own: Sequence[Any]) -> bool:
        """Tells whether an input holds the samples' texts, padded behind their own rows."""
        lengths = self.samples.lengths
        if lengths is None or value.ndim < 2 or value.shape[1] != lengths.padded or len(value) != self.samples.count:
            return False
        return all(
            isinstance(one, Tensor) and one.shape[1] == length and same_bits(row[None, :length], one)
            for row, one, length in zip(value, own, lengths.own, strict=True)
        )

    def _check_output(self, output: Any) -> None:
        if isinstance(output, Tensor):
            place = self.place(output)
            if not isinstance(place, Batched) or place.padding is not None:
                raise CannotMergeError("the output is not batched")
            delattr(output, _PLACE)
            return
        rows, rest = divmod(len(output), self.samples.count)
        if rest:
            raise CannotMergeError("the output has no equal number of entries for each sample")
        for index, entry in enumerate(output):
            place = self.place(entry)
            if not isinstance(place, Own) or place.sample != index // rows:
                raise CannotMergeError("an entry of the output is not its sample's")
            delattr(entry, _PLACE)


class Repetition(TorchFunctionMode):
    """Computes each function of a forward in the way that the analysis of its kind noted.

    Args:
        notes: The notes of the analysis.
        samples: The samples that share the forward.
        start: The number of the first function: that of a block which the backward computes again.
    """

    def __init__(self, notes: Notes, samples: Samples, start: int = 0) -> None:
        super().__init__()
        self._notes, self._samples, self._at = notes, samples, start

    def forward(self, transformer: Callable[..., Any], batched: Mapping[str, Any]) -> Any:
        """Runs the shared forward and returns its output.

        Raises:
            DivergedError: The model calls other functions than in the analysis.
        """
        with self, remembered_blocks(transformer, self._begin_block):
            output = transformer(**batched, return_dict=False)[0]
        if self._at != len(self._notes.steps):
            raise DivergedError
        return output

    def _begin_block(self) -> Callable[[], AbstractContextManager[Repetition]]:
        return partial(Repetition, self._notes, self._samples, self._at)

    @property
    def way(self) -> Way | None:
        """The way of the next function."""
        return self._notes.steps[self._at][1] if self._at < len(self._notes.steps) else None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if type(func) is Getter:
            return func(*args)
        if self._at == len(self._notes.steps):
            raise DivergedError
        expected, way = self._notes.steps[self._at]
        self._at += 1
        if expected is not func and expected != func:
            raise DivergedError
        if way is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return way(self._samples, func, args, kwargs or {})


def repeat(notes: Notes, transformer: Callable[..., Any], batched: Mapping[str, Any], samples: Samples) -> Output:
    """Runs a shared forward as it was analyzed, and returns its output.

    Raises:
        DivergedError: The model calls other functions than in the analysis.
    """
    output: Output = Repetition(notes, samples).forward(transformer, batched)
    return output
