"""One forward of a transformer for several samples: analysed once for each kind, repeated as often as it comes again.

A kind is what decides which functions the model calls, on which shapes, and with which kernels: the shapes of the forward
input, the number of samples, the number of threads, the gradient mode. Samples are run alone too when a kind is analysed, and
what the shared forward gave must be theirs. So a model that computes with the length of its batch is found out as well.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowroll.exact.layout import CannotMergeError, same_bits
from flowroll.exact.mode import Analysis, DivergedError, Notes, Repetition
from flowroll.exact.ways import Samples
from flowroll.families import Family, ForwardInput, Output, Transformer, run_in_turn

_log = logging.getLogger(__name__)

# Kinds that are remembered for a transformer; those that came longest ago are forgotten first.
_KINDS = 256


@dataclass(slots=True)
class _Known:
    """What is known of a transformer.

    Attributes:
        notes: By kind; None: the samples run alone.
        forms: Of forward inputs whose shared forwards were compared with every sample alone.
        reasons: Why some kinds cannot be shared, each told once.
    """

    notes: OrderedDict[Hashable, Notes | None] = field(default_factory=OrderedDict)
    forms: set[Hashable] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)


class SharedForwards:
    """Runs forwards for several samples at once where every sample keeps its bits, and one by one where that is not certain.

    Args:
        family: How forward inputs are collated.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()

    def outputs(self, transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
        """One output per forward input; the inputs have equal keys."""
        if len(forward_inputs) == 1 or torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled():
            return run_in_turn(transformer, forward_inputs)
        known = self._known.setdefault(transformer, _Known())
        batched = self._family.collate(forward_inputs)
        count = len(forward_inputs)
        kind = (_outline(batched, with_sizes=True), count, torch.get_num_threads(), torch.is_grad_enabled())
        random_state = torch.get_rng_state()
        output = None
        if kind in known.notes:
            known.notes.move_to_end(kind)
            output = self._repeat(transformer, known, kind, batched, _samples(batched, count))
        if output is None and known.notes.get(kind, ()) is not None:
            output = self._analyse(transformer, known, kind, forward_inputs)
        if output is not None and not torch.equal(torch.get_rng_state(), random_state):
            torch.set_rng_state(random_state)
            self._give_up(known, kind, "the model draws random numbers")
            output = None
        if output is None:
            return run_in_turn(transformer, forward_inputs)
        return self._family.uncollate(output, count)

    def _repeat(
        self, transformer: Transformer, known: _Known, kind: Hashable, batched: ForwardInput, samples: Samples
    ) -> Output | None:
        notes = known.notes[kind]
        if notes is None:
            return None
        try:
            output: Output = Repetition(notes, samples).forward(transformer, batched)
        except (DivergedError, CannotMergeError):
            # The model has another state, as with tables that it makes at its first forward: look at it again.
            del known.notes[kind]
            return None
        return output

    def _analyse(
        self, transformer: Transformer, known: _Known, kind: Hashable, forward_inputs: Sequence[ForwardInput]
    ) -> Output | None:
        count = len(forward_inputs)
        form = _outline(forward_inputs[0], with_sizes=False)
        # At the first forward of a form every sample is looked at, later the last one.
        looked_at = [count - 1] if form in known.forms else list(range(count))
        # Before the analysis, so that tables which the model makes at its first forward are there.
        alone = [run_in_turn(transformer, [forward_inputs[index]])[0] for index in looked_at]
        batched = self._family.collate(forward_inputs)
        try:
            output, notes = Analysis(_samples(batched, count)).forward(transformer, batched, forward_inputs)
            found = self._family.uncollate(list(output) if isinstance(output, list) else output, count)
            if not all(_same(found[index], one) for index, one in zip(looked_at, alone, strict=True)):
                raise CannotMergeError("the model computes with the length of its batch")
        except CannotMergeError as error:
            self._give_up(known, kind, str(error))
            return None
        known.forms.add(form)
        known.notes[kind] = notes
        if len(known.notes) > _KINDS:
            known.notes.popitem(last=False)
        return output  # type: ignore[no-any-return]

    def _give_up(self, known: _Known, kind: Hashable, reason: str) -> None:
        if reason not in known.reasons:
            known.reasons.add(reason)
            _log.warning("samples of one shape run one by one, since they cannot share a forward: %s", reason)
        known.notes[kind] = None


def _samples(batched: ForwardInput, count: int) -> Samples:
    """Which samples have the same conditioning: the same numbers in every argument that has one number per entry.

    On a GPU nobody looks, since looking would wait for it.
    """
    numbers = [value for value in batched.values() if isinstance(value, Tensor) and value.ndim == 1]
    if any(value.device.type != "cpu" for value in numbers):
        return Samples.of(range(count))
    columns = [[tuple(part) for part in value.view(count, -1).tolist()] for value in numbers]
    keys = list(zip(*columns, strict=True)) if columns else list(range(count))
    return Samples.of([keys.index(key) for key in keys])


def _outline(forward_input: ForwardInput, *, with_sizes: bool) -> Hashable:
    """Shapes, or ranks, and dtypes of the tensors in a forward input, and its other values."""

    def of_tensor(tensor: Tensor) -> Hashable:
        return (tensor.shape, tensor.dtype) if with_sizes else (tensor.ndim, tensor.dtype)

    found: list[Hashable] = []
    for name, value in forward_input.items():
        if isinstance(value, Tensor):
            found.append((name, of_tensor(value)))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            found.append((name, *map(of_tensor, value)))
        else:
            found.append((name, repr(value) if with_sizes else type(value)))
    return tuple(found)


def _same(one: Output, other: Output) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return len(one) == len(other) and all(map(same_bits, one, other))
