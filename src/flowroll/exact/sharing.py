"""Runs one forward of a transformer for several samples; each kind of forward is analyzed once and then repeated.

A kind is what decides which functions the model calls, on which shapes, and with which kernels: the family's key of the forward
inputs, the number of samples, the number of threads, the gradient mode. When a kind is analyzed, samples are also run alone,
and the shared forward must give the same outputs. This also detects a model that computes with the length of its batch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowroll.exact.checkpointing import keeping_nothing
from flowroll.exact.layout import CannotMergeError, same_outputs
from flowroll.exact.mode import Analysis, DivergedError, Notes, repeat
from flowroll.exact.padding import Lengths, padded_length
from flowroll.exact.programs import Programs
from flowroll.exact.ways import Samples
from flowroll.families import ForwardInput, Output, Transformer

_log = logging.getLogger(__name__)

# How many analyses are remembered for a transformer; the least recently used kinds are forgotten first. A kind can have a few,
# since forward inputs of one key may be prepared by other functions (a caption that needs no padding).
_ANALYSES, _ANALYSES_OF_A_KIND = 256, 4


@dataclass(slots=True)
class _Known:
    """What is known about the forwards of one transformer.

    Attributes:
        programs: Repeats the analyzed forwards; None: they run the model's Python code.
        notes: The analyses of each kind; None if the samples of that kind run alone.
        forms: The forms of forward inputs whose shared forwards were compared with every sample alone.
        lengths: For each shape of padded forward inputs, the lengths of the texts that were compared with a sample alone.
        reasons: Why some kinds cannot be shared; each reason is logged once.
    """

    programs: Programs | None = None
    notes: OrderedDict[Hashable, list[Notes] | None] = field(default_factory=OrderedDict)
    forms: set[Hashable] = field(default_factory=set)
    lengths: OrderedDict[Hashable, set[int]] = field(default_factory=OrderedDict)
    reasons: set[str] = field(default_factory=set)

    def of(self, kind: Hashable) -> list[Notes] | None:
        """Returns the analyses of a kind; None if the samples of that kind run alone."""
        if kind not in self.notes:
            self.notes[kind] = []
            self._forget()
        self.notes.move_to_end(kind)
        return self.notes[kind]

    def add(self, work: _Work, notes: Notes) -> None:
        """Remembers an analysis of the kind of a forward."""
        self.forms.add(work.form)
        self.notes[work.kind] = [notes, *(self.notes[work.kind] or [])][:_ANALYSES_OF_A_KIND]
        self._forget()

    def unseen(self, work: _Work) -> list[int]:
        """Returns a sample of each length of text that was not yet compared with a sample alone, in a batch with others."""
        seen = self.lengths.get(work.shape, set())
        runs = () if work.lengths is None else work.lengths.runs
        return [start for start, _, length in runs if length not in seen]

    def saw(self, work: _Work) -> None:
        """Remembers that the lengths of this forward were compared."""
        if work.lengths is not None:
            self.lengths.setdefault(work.shape, set()).update(work.lengths.own)
            while len(self.lengths) > _ANALYSES:
                self.lengths.popitem(last=False)

    def give_up(self, kind: Hashable, reason: str) -> None:
        """Makes the samples of this kind run alone from now on, and logs the reason."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            _log.warning("samples of one shape run one by one, since they cannot share a forward: %s", reason)
        self.notes[kind] = None
        self._forget()

    def _forget(self) -> None:
        while sum(len(analyses or (None,)) for analyses in self.notes.values()) > _ANALYSES:
            self.notes.popitem(last=False)


@runtime_checkable
class Collation(Protocol):
    """The methods of a family that shared forwards need."""

    def collate_key(self, forward_input: ForwardInput) -> Hashable:
        """Returns a key; inputs with equal keys can be collated."""

    def run_in_turn(self, transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
        """Runs several forwards one after the other, and returns their outputs."""

    def collate(self, forward_inputs: Sequence[ForwardInput]) -> ForwardInput:
        """Joins several forward inputs into one."""

    def uncollate(self, output: Output, num_inputs: int) -> list[Output]:
        """Splits an output into one output per forward input."""

    def num_text_rows(self, forward_input: ForwardInput) -> int:
        """Returns the number of rows of the text; 0 if texts may not be padded."""

    def pad_text(self, forward_input: ForwardInput, num_rows: int) -> ForwardInput:
        """Pads the text to so many rows."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Forward inputs that are to share a forward.

    Attributes:
        inputs: The samples' own.
        padded: The same, with all texts of the same length.
        lengths: The lengths of the texts, ascending; None: they are all the same.
        form: What distinguishes models' inputs, whatever their shapes.
        shape: All that decides how one sample is computed, padded.
    """

    inputs: Sequence[ForwardInput]
    padded: Sequence[ForwardInput]
    lengths: Lengths | None
    form: Hashable
    shape: Hashable

    @classmethod
    def of(cls, family: Collation, inputs: Sequence[ForwardInput], lengths: Lengths | None) -> _Work:
        """Pads the texts of forward inputs that are sorted by the lengths of their texts."""
        padded = inputs if lengths is None else [family.pad_text(one, lengths.padded) for one in inputs]
        form = _form(inputs[0])
        setting = (lengths is not None, torch.get_num_threads(), torch.is_grad_enabled())
        return cls(inputs, padded, lengths, form, (form, family.collate_key(padded[0]), *setting))

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.inputs)

    @property
    def kind(self) -> Hashable:
        """The kind of the forward: forwards of one kind are analyzed once."""
        return self.shape, self.count

    def samples(self, batched: ForwardInput) -> Samples:
        """Returns the samples of a collated forward input."""
        return _samples(batched, self.count, self.lengths)


class SharedForwards:
    """Runs several samples in one forward where every sample keeps its bits, and one by one where that is not certain.

    Args:
        family: Collates forward inputs and splits outputs.
        agree: Tells whether all ranks that share a forward vote yes; None if there is one rank. Either all of them run the
            samples together or all run them one by one; otherwise some would wait for the others in a collective.
        with_programs: Whether forwards may be written down as programs. Nothing but weights may change in a transformer then.
    """

    def __init__(self, family: Collation, agree: Callable[[bool], bool] | None = None, *, with_programs: bool = False) -> None:
        self._family, self._agree, self._with_programs = family, agree, with_programs
        self._known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()

    def outputs(self, transformer: Transformer, forward_inputs: Sequence[ForwardInput]) -> list[Output]:
        """Returns one output per forward input; the inputs must have equal keys, but for the lengths of their texts."""
        if len(forward_inputs) == 1 or torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled():
            return self._family.run_in_turn(transformer, forward_inputs)
        rows = [self._family.num_text_rows(one) for one in forward_inputs]
        if len(set(rows)) == 1:
            return self._shared(transformer, forward_inputs, None)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        lengths = Lengths(tuple(rows[index] for index in order), padded_length(max(rows)))
        found = self._shared(transformer, [forward_inputs[index] for index in order], lengths)
        outputs = dict(zip(order, found, strict=True))
        return [outputs[index] for index in range(len(rows))]

    def _shared(
        self, transformer: Transformer, forward_inputs: Sequence[ForwardInput], lengths: Lengths | None
    ) -> list[Output]:
        """Returns one output per forward input, of inputs in the order of their lengths if they have several."""
        work = _Work.of(self._family, forward_inputs, lengths)
        known = self._known.setdefault(transformer, _Known(Programs() if self._with_programs else None))
        analyses = known.of(work.kind)
        if analyses is None:
            return self._family.run_in_turn(transformer, forward_inputs)
        random_state = torch.get_rng_state()
        output, notes = self._repeat(transformer, known.programs, analyses, work), None
        unseen = known.unseen(work)
        reason = None if output is None else self._compare(transformer, work, output, unseen)
        if output is None:
            looked_at = set(range(work.count) if work.form not in known.forms else (*unseen, work.count - 1))
            output, notes, reason = self._analyse(transformer, work, sorted(looked_at))
            if reason is None and torch.is_grad_enabled():
                # Nothing was kept for a backward through the analysis.
                output = self._repeat(transformer, known.programs, [notes], work)
                reason = None if output is not None else "the model calls other functions at each forward"
        if not torch.equal(torch.get_rng_state(), random_state):
            torch.set_rng_state(random_state)
            reason = reason or "the model draws random numbers"
        # Ranks vote on an analysis. They need no vote on a repetition: they voted on its analysis, and random draws are the
        # same on all of them.
        if reason is not None or notes is not None:
            if not (self._agree or bool)(reason is None):
                known.give_up(work.kind, reason or "another rank cannot share it")
                return self._family.run_in_turn(transformer, forward_inputs)
            assert notes is not None
            known.add(work, notes)
        known.saw(work)
        assert output is not None
        return self._family.uncollate(output, work.count)

    def _repeat(
        self, transformer: Transformer, programs: Programs | None, analyses: Sequence[Notes], work: _Work
    ) -> Output | None:
        """Computes the output in the way of one of the analyses; None if the model calls other functions now."""
        for notes in analyses:
            collate = partial(self._family.collate, work.padded)
            try:
                if programs is not None and not torch.is_grad_enabled():
                    return programs.forward(notes, transformer, collate, work.samples)
                batched = collate()
                return repeat(notes, transformer, batched, work.samples(batched))
            except (DivergedError, CannotMergeError):
                continue
        return None

    def _analyse(self, transformer: Transformer, work: _Work, looked_at: Sequence[int]) -> tuple[Output, Notes, str | None]:
        """Returns the output, the notes, and the reason why the output cannot be used, or None.

        The output is compared with these samples run alone.
        """
        # These run before the analysis, so that tables which the model makes at its first forward exist.
        with keeping_nothing():
            alone = [self._family.run_in_turn(transformer, [work.inputs[index]])[0] for index in looked_at]
        batched = self._family.collate(work.padded)
        analysis = Analysis(work.samples(batched), goes_on=self._agree is not None)
        try:
            with keeping_nothing():
                output, notes = analysis.forward(transformer, batched, work.inputs)
        except CannotMergeError as error:
            return [], Notes(()), str(error)
        reason = None if analysis.failure is None else str(analysis.failure)
        return output, notes, reason or self._difference(work, output, looked_at, alone)

    def _compare(self, transformer: Transformer, work: _Work, output: Output, looked_at: Sequence[int]) -> str | None:
        """Compares a repeated forward with these samples run alone."""
        with keeping_nothing():
            alone = [self._family.run_in_turn(transformer, [work.inputs[index]])[0] for index in looked_at]
        return self._difference(work, output, looked_at, alone)

    def _difference(self, work: _Work, output: Output, looked_at: Sequence[int], alone: Sequence[Output]) -> str | None:
        """Returns why the samples' outputs have other bits than alone; None if they have not."""
        found = self._family.uncollate(list(output) if isinstance(output, list) else output, work.count)
        is_exact = all(same_outputs(found[index], one) for index, one in zip(looked_at, alone, strict=True))
        return None if is_exact else "the model computes with the length of its batch, or of its padded texts"


def _samples(batched: ForwardInput, count: int, lengths: Lengths | None) -> Samples:
    """Finds the samples with the same conditioning: equal numbers in every argument that has one number per entry.

    On a GPU every sample counts as different, since reading the numbers would wait for the device.
    """
    numbers = [value for value in batched.values() if isinstance(value, Tensor) and value.ndim == 1]
    if any(value.device.type != "cpu" for value in numbers):
        return Samples.of(range(count), lengths)
    columns = [[tuple(part) for part in value.view(count, -1).tolist()] for value in numbers]
    keys = list(zip(*columns, strict=True)) if columns else list(range(count))
    return Samples.of([keys.index(key) for key in keys], lengths)


def _form(forward_input: ForwardInput) -> Any:
    """Returns the numbers of dimensions and dtypes of the tensors in a forward input, and the types of its other values."""

    def of_value(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.ndim, value.dtype
        if isinstance(value, list):
            return tuple(map(of_value, value))
        return type(value)

    return tuple((name, of_value(value)) for name, value in forward_input.items())
