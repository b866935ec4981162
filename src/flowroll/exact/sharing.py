"""One forward of a transformer for several samples: analysed once for each kind, repeated as often as it comes again.

A kind is what decides which functions the model calls, on which shapes, and with which kernels: the family's key of the forward
inputs, the number of samples, the number of threads, the gradient mode. Samples are run alone too when a kind is analysed, and
what the shared forward gave must be theirs. So a model that computes with the length of its batch is found out as well.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowroll.exact.layout import CannotMergeError, same_bits
from flowroll.exact.mode import Analysis, DivergedError, Notes, Repetition
from flowroll.exact.ways import Samples
from flowroll.families import ForwardInput, Output, Transformer, run_in_turn

_log = logging.getLogger(__name__)

# Kinds that are remembered for a transformer; those that came longest ago are forgotten first. A kind can have a few analyses,
# since forward inputs of one key may be prepared by other functions (a caption that needs no padding).
_KINDS, _ANALYSES = 256, 4


@dataclass(slots=True)
class _Known:
    """What is known of a transformer.

    Attributes:
        notes: By kind; None: the samples run alone.
        forms: Of forward inputs whose shared forwards were compared with every sample alone.
        reasons: Why some kinds cannot be shared, each told once.
    """

    notes: OrderedDict[Hashable, list[Notes] | None] = field(default_factory=OrderedDict)
    forms: set[Hashable] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)

    def of(self, kind: Hashable) -> list[Notes] | None:
        """The analyses of a kind; None where it is known that the samples run alone."""
        found = self.notes.setdefault(kind, [])
        self.notes.move_to_end(kind)
        if len(self.notes) > _KINDS:
            self.notes.popitem(last=False)
        return found

    def give_up(self, kind: Hashable, reason: str) -> None:
        """From now on the samples of this kind run alone."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            _log.warning("samples of one shape run one by one, since they cannot share a forward: %s", reason)
        self.notes[kind] = None


@runtime_checkable
class Collation(Protocol):
    """What sharing needs of a family."""

    def collate_key(self, forward_input: ForwardInput) -> Hashable:
        """Inputs with equal keys can be collated."""

    def collate(self, forward_inputs: Sequence[ForwardInput]) -> ForwardInput:
        """One forward input for several."""

    def uncollate(self, output: Output, num_inputs: int) -> list[Output]:
        """The output of each."""


class SharedForwards:
    """Runs forwards for several samples at once where every sample keeps its bits, and one by one where that is not certain.

    Args:
        family: How forward inputs are collated.
    """

    def __init__(self, family: Collation) -> None:
        self._family = family
        self._known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()

    def outputs(self, transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
        """One output per forward input; the inputs have equal keys."""
        count = len(forward_inputs)
        if count == 1 or torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled():
            return run_in_turn(transformer, forward_inputs)
        known = self._known.setdefault(transformer, _Known())
        form = _form(forward_inputs[0])
        key = self._family.collate_key(forward_inputs[0])
        kind = (form, key, count, torch.get_num_threads(), torch.is_grad_enabled())
        analyses = known.of(kind)
        if analyses is None:
            return run_in_turn(transformer, forward_inputs)
        random_state = torch.get_rng_state()
        output = self._repeat(transformer, analyses, forward_inputs)
        try:
            if output is None:
                output, notes = self._analyse(transformer, forward_inputs, is_new=form not in known.forms)
                known.forms.add(form)
                analyses[:] = [notes, *analyses][:_ANALYSES]
            if not torch.equal(torch.get_rng_state(), random_state):
                raise CannotMergeError("the model draws random numbers")
        except CannotMergeError as error:
            known.give_up(kind, str(error))
            torch.set_rng_state(random_state)
            return run_in_turn(transformer, forward_inputs)
        return self._family.uncollate(output, count)

    def _repeat(
        self, transformer: Transformer, analyses: Sequence[Notes], forward_inputs: Sequence[ForwardInput]
    ) -> Output | None:
        """The output computed as one of the analyses noted; None where the model calls other functions now."""
        for notes in analyses:
            batched = self._family.collate(forward_inputs)
            try:
                output: Output = Repetition(notes, _samples(batched, len(forward_inputs))).forward(transformer, batched)
            except (DivergedError, CannotMergeError):
                continue
            return output
        return None

    def _analyse(
        self, transformer: Transformer, forward_inputs: Sequence[ForwardInput], *, is_new: bool
    ) -> tuple[Output, Notes]:
        """The output and how it was computed, after a comparison with samples alone: all of them where the form is new."""
        count = len(forward_inputs)
        looked_at = range(count) if is_new else [count - 1]
        # Before the analysis, so that tables which the model makes at its first forward are there.
        alone = [run_in_turn(transformer, [forward_inputs[index]])[0] for index in looked_at]
        batched = self._family.collate(forward_inputs)
        output, notes = Analysis(_samples(batched, count)).forward(transformer, batched, forward_inputs)
        found = self._family.uncollate(list(output) if isinstance(output, list) else output, count)
        if not all(_same(found[index], one) for index, one in zip(looked_at, alone, strict=True)):
            raise CannotMergeError("the model computes with the length of its batch")
        return output, notes


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


def _form(forward_input: ForwardInput) -> Any:
    """Ranks and dtypes of the tensors in a forward input, and the kinds of its other values."""

    def of_value(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.ndim, value.dtype
        if isinstance(value, list):
            return tuple(map(of_value, value))
        return type(value)

    return tuple((name, of_value(value)) for name, value in forward_input.items())


def _same(one: Output, other: Output) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    return len(one) == len(other) and all(map(same_bits, one, other))
