"""Shared forwards as programs: the functions of torch that a forward calls, without the Python code of the model.

A function mode, and the Python code of a model's modules, take a quarter of the time of a small model on a CPU. A forward of
one kind, with arguments of the same shapes, calls the same functions with the same numbers and flags, if no number of a tensor
is read on the way. So what `Repetition` computes is written down as a program, which calls the very same functions on the very
same operands. It fails closed: a function that may read numbers, or that is not known, ends the recording; two recordings of
two forwards have to be equal, and the program's output has to have the bits of the forward; and a program is not used for a
model whose modules, hooks or parameters are other objects than when it was recorded. Weights may change: a program refers to
the parameters, and not to their data.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flowroll.exact.layout import same_outputs
from flowroll.exact.mode import Getter, Notes, Repetition, repeat
from flowroll.exact.recordable import computes_nothing, fault_of, holds_tensor
from flowroll.exact.ways import Samples
from flowroll.families import ForwardInput, Output

_log = logging.getLogger(__name__)

# How many programs are kept for a transformer; the least recently used go first. One of a large model takes a few MB.
_PROGRAMS = 32
# A forward is written down after it was repeated so often, and given up after so many recordings that differ.
_SEEN, _RECORDINGS = 1, 4

# Where a tensor's variable is kept: an attribute of the tensor, so that it goes when the tensor goes.
_VARIABLE = "_flowroll_variable"


class NotRecordedError(Exception):
    """A forward cannot be written down as a program."""


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """The calls of a forward, as the source of a Python function.

    Attributes:
        source: The function `run(batched, samples)`; it calls `c0`, `c1`, ..., and passes them as arguments.
        constants: What these names stand for: functions, ways, parameters, tables, and what is no plain number.
        modules: The modules of the transformer, which a program does not keep alive.
        structure: What the modules were made of; see `_structure`.
        run: The function.
    """

    source: str
    constants: tuple[Any, ...]
    modules: tuple[weakref.ref[nn.Module], ...]
    structure: tuple[Any, ...]
    run: Callable[[ForwardInput, Samples], Output]

    @classmethod
    def of(cls, source: str, constants: Sequence[Any], transformer: nn.Module) -> Program:
        """Compiles the source."""
        names: dict[str, Any] = {f"c{index}": constant for index, constant in enumerate(constants)}
        exec(compile(source, "<the program of a forward>", "exec"), names)
        modules = tuple(transformer.modules())
        return cls(source, tuple(constants), tuple(map(weakref.ref, modules)), _structure(modules), names["run"])

    def fits(self) -> bool:
        """Tells whether the transformer still consists of the same modules, hooks and parameters."""
        modules = [module for module in (reference() for reference in self.modules) if module is not None]
        return len(modules) == len(self.modules) and _structure(modules) == self.structure

    def equals(self, other: Program) -> bool:
        """Tells whether another program does the same, on the same objects."""
        return (
            self.source == other.source
            and self.structure == other.structure
            and len(self.constants) == len(other.constants)
            and all(map(_same, self.constants, other.constants))
        )


@dataclass(slots=True)
class _Candidate:
    """What is known about forwards with arguments of one signature.

    Attributes:
        notes: The analysis that they repeat.
        num_seen: How many were repeated without a recording.
        num_recorded: How many were recorded.
        program: The last recording.
        is_confirmed: Whether the program may be used.
    """

    notes: Notes
    num_seen: int = 0
    num_recorded: int = 0
    program: Program | None = None
    is_confirmed: bool = False


@dataclass(slots=True)
class Programs:
    """Repeats the analyzed forwards of one transformer, by their programs where there are some."""

    _candidates: OrderedDict[Hashable, _Candidate] = field(default_factory=OrderedDict)

    def forward(
        self, notes: Notes, transformer: Any, collate: Callable[[], ForwardInput], samples_of: Callable[[ForwardInput], Samples]
    ) -> Output:
        """Returns the output of a forward.

        Args:
            notes: The analysis of the kind of forward.
            transformer: The model.
            collate: Makes the collated forward input; it may be called twice.
            samples_of: Returns the samples of a collated forward input.

        Raises:
            DivergedError: The model calls other functions than in the analysis.
        """
        batched = collate()
        samples = samples_of(batched)
        candidate = self._candidate(notes, batched) if isinstance(transformer, nn.Module) else None
        if candidate is None or candidate.num_recorded == _RECORDINGS:
            return repeat(notes, transformer, batched, samples)
        program = candidate.program
        if program is not None and not program.fits():
            candidate.program, candidate.is_confirmed, candidate.num_seen = None, False, 0
        elif program is not None and candidate.is_confirmed:
            return program.run(batched, samples)
        if candidate.num_seen < _SEEN:
            candidate.num_seen += 1
            return repeat(notes, transformer, batched, samples)
        recording = Recording(notes, samples, batched)
        output: Output = recording.forward(transformer, batched)
        self._judge(candidate, recording, transformer, output, collate, samples)
        return output

    def _candidate(self, notes: Notes, batched: ForwardInput) -> _Candidate | None:
        try:
            key = (id(notes), _signature(batched))
        except NotRecordedError:
            return None
        if key not in self._candidates:
            self._candidates[key] = _Candidate(notes)
            if len(self._candidates) > _PROGRAMS:
                self._candidates.popitem(last=False)
        self._candidates.move_to_end(key)
        return self._candidates[key]

    def _judge(
        self,
        candidate: _Candidate,
        recording: Recording,
        transformer: nn.Module,
        output: Output,
        collate: Callable[[], ForwardInput],
        samples: Samples,
    ) -> None:
        """Keeps a recording; the second of two equal ones is used from now on, if it gives the output of the forward."""
        candidate.num_recorded += 1
        try:
            found = recording.program(transformer, output)
        except NotRecordedError as reason:
            _log.info("forwards of one shape run the model's Python code, since they cannot be written down: %s", reason)
            candidate.program, candidate.num_recorded = None, _RECORDINGS
            return
        if candidate.program is not None and candidate.program.equals(found):
            candidate.is_confirmed = same_outputs(found.run(collate(), samples), output)
            candidate.num_recorded = 0 if candidate.is_confirmed else _RECORDINGS
        candidate.program = found


class Recording(Repetition):
    """Computes a forward as `Repetition` does, and writes down its calls.

    Args:
        notes: The notes of the analysis.
        samples: The samples that share the forward.
        batched: The collated forward input.
    """

    def __init__(self, notes: Notes, samples: Samples, batched: ForwardInput) -> None:
        super().__init__(notes, samples)
        # Marks the variables of this recording; tensors may outlive it.
        self._token = object()
        self._lines: list[str] = []
        self._constants: list[Any] = []
        self._names: dict[int, str] = {}
        # The line in which each variable is used last.
        self._last_use: list[int] = []
        self._reason = "functions without a rule" if notes.without_rule else None
        for name, value in batched.items():
            if isinstance(value, Tensor):
                if self._variable(value) is not None:
                    self._reason = "two arguments are one tensor"
                self._lines.append(f"{self._new(value)} = batched[{name!r}]")
            entries = value if isinstance(value, list) else ()
            if any(map(holds_tensor, entries or (value,))):
                self._reason = "tensors lie deeper in an argument than in a list"
            for index, entry in enumerate(entries):
                if isinstance(entry, Tensor):
                    # Samples may share a tensor in this forward and not in the next one: each entry is a variable of its own.
                    value[index] = entry.detach()
                    self._lines.append(f"{self._new(value[index])} = batched[{name!r}][{index}]")

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self._reason is not None:
            return super().__torch_function__(func, types, args, kwargs)
        # Written before the call: a function that writes into its argument may return it.
        given = self._arguments(args), {name: self._text(value) for name, value in (kwargs or {}).items()}
        way = None if type(func) is Getter else self.way
        result = super().__torch_function__(func, types, args, kwargs)
        self._write(func, way, given, result, args, kwargs or {})
        return result

    def program(self, transformer: nn.Module, output: Output) -> Program:
        """Returns the program of the forward that was recorded.

        Raises:
            NotRecordedError: It cannot be written down.
        """
        if self._reason is not None:
            raise NotRecordedError(self._reason)
        if any(map(_has_own_code, transformer.modules())):
            raise NotRecordedError("a module has hooks, which may do more than compute")
        found = self._text(output)
        lines = list(self._lines)
        for variable, line in enumerate(self._last_use):
            if line < len(lines):
                # A variable is dropped after its last use, as it is in the model's own code.
                lines[line] += f"; v{variable} = None"
        body = "\n".join(f"    {line}" for line in (*lines, f"return {found}"))
        return Program.of(f"def run(batched, samples):\n{body}\n", self._constants, transformer)

    def _write(
        self,
        func: Any,
        way: Any,
        given: tuple[list[str], dict[str, str]],
        result: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Writes a call down, if it computes something; ends the recording where it may have read numbers."""
        if computes_nothing(func, result):
            return
        self._reason = fault_of(func, args, kwargs, result)
        target, (positional, by_name) = self._target(result, args), given
        if way is None:
            call = f"{self._constant(func)}({', '.join([*positional, *(f'{name}={text}' for name, text in by_name.items())])})"
        else:
            named_ = ", ".join(f"{name!r}: {text}" for name, text in by_name.items())
            call = f"{self._constant(way)}(samples, {self._constant(func)}, {_tuple(positional)}, {{{named_}}})"
        self._lines.append(f"{target}{call}")

    def _target(self, result: Any, args: tuple[Any, ...]) -> str:
        """Returns the left side of an assignment; nothing for a tensor that has a name already."""
        if isinstance(result, Tensor):
            is_known = self._variable(result) is not None or any(result is one for one in args)
            return "" if is_known else f"{self._new(result)} = "
        if isinstance(result, tuple | list):
            if not all(isinstance(one, Tensor) and self._variable(one) is None for one in result):
                self._reason = "a function returns other things than new tensors"
                return ""
            return "".join(f"{self._new(one)}, " for one in result) + "= "
        return ""

    def _arguments(self, args: Sequence[Any]) -> list[str]:
        return [self._text(one) for one in args]

    def _text(self, value: Any) -> str:
        """Returns an argument's text."""
        if isinstance(value, Tensor):
            variable = self._variable(value)
            if variable is None:
                return self._constant(value)
            self._last_use[variable] = len(self._lines)
            return f"v{variable}"
        if type(value) in (tuple, list):
            texts = self._arguments(value)
            return _tuple(texts) if type(value) is tuple else f"[{', '.join(texts)}]"
        if type(value) in (bool, int, str, type(None)):
            return repr(value)
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        if id(value) not in self._names:
            self._names[id(value)] = f"c{len(self._constants)}"
            self._constants.append(value)
        return self._names[id(value)]

    def _variable(self, tensor: Tensor) -> int | None:
        token, variable = getattr(tensor, _VARIABLE, (None, None))
        return variable if token is self._token else None

    def _new(self, tensor: Tensor) -> str:
        setattr(tensor, _VARIABLE, (self._token, len(self._last_use)))
        self._last_use.append(len(self._lines))
        return f"v{len(self._last_use) - 1}"


def _has_own_code(module: nn.Module) -> bool:
    """Tells whether a module runs more than the forward of its class: hooks, or a forward of its own."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or "forward" in module.__dict__


def _structure(modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Returns what decides which functions the modules call on which parameters; their data may change."""
    return tuple(
        (
            module.training,
            *map(id, module._modules.values()),
            *map(id, module._parameters.values()),
            *map(id, module._buffers.values()),
            _has_own_code(module),
        )
        for module in modules
    )


def _signature(value: Any) -> Hashable:
    """Returns what decides, beside the modules, which functions a forward calls.

    Raises:
        NotRecordedError: An argument is an object of which nothing is known.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, _signature(one)) for name, one in value.items())
    if isinstance(value, list | tuple):
        return type(value), *map(_signature, value)
    if value is None or type(value) in (bool, int, float, str):
        return type(value), value
    raise NotRecordedError(f"an argument is a {type(value).__name__}")


def _same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, Tensor) and type(one) is type(other) and bool(one == other))


def _tuple(texts: Sequence[str]) -> str:
    return f"({', '.join(texts)},)" if texts else "()"
