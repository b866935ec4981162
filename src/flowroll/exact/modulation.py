"""Keeps what a model's modulation layers make of a timestep, which is the same for every sample, branch and request.

A family declares the layers whose input depends on the timestep alone. Their outputs at a timestep are kept from one eager
forward and given to later ones in place of the layers' products, of which the operands and so the bits would be the same.
Weights that change end what is kept: whoever changes them says so with `forget`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flowroll.exact.compiled import is_compiled
from flowroll.exact.graphs import RunForward, runs_plainly
from flowroll.families import ForwardInput, Output, Transformer
from flowroll.parallel.paths import find_modules

# The argument by which a forward is given what was kept; it never reaches the model.
_GIVEN = "given modulations"
# The bytes at multiples of which outputs are kept: a GPU's allocator puts every tensor at one.
_ALIGNED = 512
_log = logging.getLogger(__name__)

# The place of every layer's output in the tensor that holds all of them: its first element, and its shape.
_Places: TypeAlias = Mapping[str, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class _Kept:
    outputs: Tensor
    # How often torch has seen it written to.
    version: int


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Stands for the forward of a layer during one forward of the model."""

    function: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Tensor:
        return self.function(*args)


def without_stand_in(copied: nn.Module) -> None:
    """Makes a shallow copy of a layer, which may have been made during a forward of the model on another thread, run itself."""
    if isinstance(copied.__dict__.get("forward"), _StandIn):
        del copied.__dict__["forward"]


class Modulations:
    """Keeps the outputs of modulation layers by model and timestep. Only one thread uses it.

    Args:
        layers: The paths of the layers, with wildcards.
        timestep: The argument of a forward that holds the timestep, once for each of its entries.
        max_bytes: The most memory that is taken; the timesteps that were used longest ago are dropped first.
    """

    def __init__(self, layers: Sequence[str], timestep: str, *, max_bytes: int) -> None:
        self._layers, self._timestep, self._max_bytes = layers, timestep, max_bytes
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        # By model and number of entries: where everything lies; None where nothing can be kept.
        self._places: WeakKeyDictionary[nn.Module, dict[Hashable, _Places | None]] = WeakKeyDictionary()
        self._found: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()

    @property
    def num_bytes(self) -> int:
        """The memory that is taken."""
        return sum(kept.outputs.nbytes for kept in self._kept.values())

    def forget(self) -> None:
        """Drops everything: weights have changed, or the memory is needed."""
        self._kept.clear()

    def given(self, transformer: Transformer, forward_input: ForwardInput, number: float) -> ForwardInput | None:
        """Returns the input of a forward with what was kept for its timestep; None if nothing was.

        Args:
            transformer: The model.
            forward_input: The arguments of the forward.
            number: The timestep, as a number of the host.
        """
        if not isinstance(transformer, nn.Module) or not runs_plainly():
            return None
        key = self._key(transformer, forward_input, number)
        if (kept := self._kept.get(key)) is None:
            return None
        if kept.outputs._version != kept.version:
            self._refuse(transformer, key, "the model writes into them")
            return None
        self._kept.move_to_end(key)
        return {**forward_input, _GIVEN: kept.outputs}

    def running(self, run: RunForward) -> RunForward:
        """Returns a function that runs a forward with what it is given."""

        def with_given(transformer: Transformer, forward_input: ForwardInput) -> Output:
            arguments = dict(forward_input)
            outputs = arguments.pop(_GIVEN)
            places = self._places[transformer][self._entries(arguments)]  # type: ignore[index]
            assert places is not None

            def kept(name: str, _: nn.Module) -> Callable[..., Tensor]:
                output = _part(outputs, places[name])
                return lambda *_: output

            with _in_place_of(self._modules(transformer), kept):
                return run(transformer, arguments)

        return with_given

    def keep(self, run: RunForward, transformer: Transformer, forward_input: ForwardInput, number: float) -> Output:
        """Runs a forward, and keeps what its layers make of the timestep."""
        if not isinstance(transformer, nn.Module) or not runs_plainly():
            return run(transformer, forward_input)
        key = self._key(transformer, forward_input, number)
        if self._is_refused(transformer, key):
            return run(transformer, forward_input)
        modules = self._modules(transformer)
        found: dict[str, Tensor] = {}
        calls: list[str] = []

        def noting(name: str, module: nn.Module) -> Callable[..., Tensor]:
            real = module.forward

            def forward(*args: Any) -> Tensor:
                calls.append(name)
                found[name] = real(*args)
                return found[name]

            return forward

        if any("forward" in module.__dict__ for module in modules.values()) or is_compiled(transformer):
            self._refuse(transformer, key, "something else has replaced a layer's forward")
            return run(transformer, forward_input)
        with _in_place_of(modules, noting):
            output = run(transformer, forward_input)
        if sorted(calls) != sorted(modules):
            self._refuse(transformer, key, "a layer is not called once")
        elif not all(one.is_contiguous() and one.dtype == found[calls[0]].dtype for one in found.values()):
            self._refuse(transformer, key, "the outputs cannot lie in one tensor")
        else:
            self._put(transformer, key, found)
        return output

    def _put(self, transformer: nn.Module, key: Hashable, found: Mapping[str, Tensor]) -> None:
        first = next(iter(found.values()))
        unit = _ALIGNED // first.element_size()
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for name, output in found.items():
            places[name] = end, tuple(output.shape)
            end += math.ceil(output.numel() / unit) * unit
        outputs = first.new_empty(end)
        torch._foreach_copy_([_part(outputs, place) for place in places.values()], list(found.values()))
        before = self._places.setdefault(transformer, {}).setdefault(key[-1], places)  # type: ignore[index]
        if before != places:
            self._refuse(transformer, key, "the outputs of two timesteps differ in shape")
            return
        self._kept[key] = _Kept(outputs, outputs._version)
        while self.num_bytes > self._max_bytes or next(iter(self._kept))[0]() is None:  # type: ignore[index]
            self._kept.popitem(last=False)

    def _key(self, transformer: Transformer, forward_input: ForwardInput, number: float) -> Hashable:
        return weakref.ref(transformer), number, torch.get_num_threads(), self._entries(forward_input)

    def _entries(self, forward_input: ForwardInput) -> Hashable:
        timestep: Tensor = forward_input[self._timestep]
        return len(timestep), timestep.dtype

    def _modules(self, transformer: Any) -> dict[str, nn.Module]:
        if transformer not in self._found:
            found = (pair for pattern in self._layers for pair in find_modules(transformer, pattern))
            self._found[transformer] = dict(found)
        return self._found[transformer]

    def _is_refused(self, transformer: nn.Module, key: Hashable) -> bool:
        return self._places.get(transformer, {}).get(key[-1], {}) is None  # type: ignore[index]

    def _refuse(self, transformer: Any, key: Hashable, reason: str) -> None:
        _log.info("modulations are not kept: %s", reason)
        self._kept.clear()
        self._places.setdefault(transformer, {})[key[-1]] = None  # type: ignore[index]


def _part(outputs: Tensor, place: tuple[int, tuple[int, ...]]) -> Tensor:
    start, shape = place
    return outputs[start : start + math.prod(shape)].view(shape)


@contextlib.contextmanager
def _in_place_of(modules: Mapping[str, nn.Module], make: Callable[[str, nn.Module], Callable[..., Tensor]]) -> Iterator[None]:
    """Calls other functions in place of the forwards of modules."""
    made = {name: _StandIn(make(name, module)) for name, module in modules.items()}
    for name, module in modules.items():
        module.__dict__["forward"] = made[name]
    try:
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)
