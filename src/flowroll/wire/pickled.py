"""Named tensors in a pickle, as SGLang's trainers send them.

A stream is not given to Python's unpickler. `_Unpickler` does the few instructions that a pickled tensor needs, so many of them
in all, and checks the kinds of their values; it has no others, and no other globals than those listed here. In the place of
torch's functions stand functions of this package that check each argument. What a stream takes in memory is bounded by its
length and by the number of its instructions; the data of its tensors is not read here.

What is trusted all the same, which is why it is off unless the server was started with `--allow-pickle-weights`: the sender may
name any shared-memory segment that torch made for the same user, which is read, and its count of users lowered by one, as
torch's own receiver does; and it may hand over CUDA IPC handles, of which the driver, not flowroll, knows how much memory is
behind them. It cannot name a file, a socket, a process or code.

A stream holds one payload: a bucket, `{"flattened_tensor": tensor, "metadata": [FlattenedTensorMetadata]}`, or a list of
(name, tensor) pairs; or one payload for each module, by the module's name. Offsets and sizes of a bucket count elements of its
flattened tensor, which in SGLang 0.5.23 are bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import torch

from flowroll.errors import ForbiddenError, InvalidRequestError, MalformedRequestError
from flowroll.wire.sent_tensors import SentTensor, SharedStorage, checked_numbers, cuda_tensor, empty_storage, shared_storage

FIELD = "serialized_named_tensors"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
_METADATA_FIELDS = frozenset({"name", "shape", "dtype", "start_idx", "end_idx", "numel"})
_BUCKET_FIELDS = frozenset({"flattened_tensor", "metadata"})
# 5,000 tensors take 230,000, or 150,000 in a flattened bucket. An instruction makes one value at most, of some 100 bytes; so
# this bounds time, stack, memo and depth.
_MOST_INSTRUCTIONS = 500_000
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# What the instruction itself holds.
_LITERALS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1"),
        *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
    }
)


@dataclass(frozen=True, slots=True)
class SentTensors:
    """What a stream named.

    Attributes:
        pairs: Names and tensors.
        sources: All segments that it named, also those that no tensor is in.
    """

    pairs: list[tuple[str, SentTensor]] = field(default_factory=list)
    sources: list[SharedStorage] = field(default_factory=list)

    def release(self) -> None:
        """Lets the sender have its memory back; nothing can be copied from then on. May be called twice."""
        for source in self.sources:
            source.release()


def named_tensors(data: bytes, *, module: str, flattened: bool, unread: Sequence[bytes] = ()) -> SentTensors:
    """Returns the tensors that a stream names. Their data is not read yet; `release` has to be called in the end.

    Whatever a refused stream had named by then is released.

    Args:
        data: The pickle.
        module: Whose tensors it has to hold: it may be keyed by module, with this one alone, or not be keyed at all.
        flattened: Whether it holds a flattened bucket.
        unread: Streams of the same tensors, of which nothing but the segments is wanted, to release them. What they name on a
            GPU is not opened, and so not released.

    Raises:
        ForbiddenError: It holds an instruction or a global that no such stream has.
        MalformedRequestError: It is broken, or holds something else.
        InvalidRequestError: It is for other modules.
    """
    sent = SentTensors()
    try:
        value = _payload(_Unpickler(sent.sources).load(data), module)
        sent.pairs.extend(_bucket(value) if flattened else _pairs(value))
        for other in unread:
            _Unpickler(sent.sources, opens_gpus=False).load(other)
        return sent
    except (ForbiddenError, InvalidRequestError):
        sent.release()
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        sent.release()
        reason = (str(error).splitlines() or [""])[0][:200]
        raise MalformedRequestError(
            f"{FIELD} must hold pickled named tensors, got {type(error).__name__}: {reason}; serialize them again.", field=FIELD
        ) from error


@dataclass(frozen=True, slots=True)
class _Function:
    """What a stream may call.

    Attributes:
        call: Takes the arguments that are no classes.
        classes: Places of those that have to be one of torch's classes.
    """

    call: Callable[..., object]
    classes: tuple[int, ...] = ()


class _Metadata:
    """What the stream says of one tensor of a bucket; not checked yet."""


class _Unpickler:
    """Reads one stream; see the module.

    Args:
        sources: The segments that the stream names are added to these.
        opens_gpus: Whether handles of memory on a GPU are opened.
    """

    def __init__(self, sources: list[SharedStorage], *, opens_gpus: bool = True) -> None:
        self._sources, self._opens_gpus = sources, opens_gpus
        self._stack: list[Any] = []
        # What lies below each mark.
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self, data: bytes) -> object:
        """Returns the value that a stream makes."""
        instruction: Any
        argument: Any
        for count, (instruction, argument, place) in enumerate(pickletools.genops(data)):
            if count == _MOST_INSTRUCTIONS:
                raise ValueError(f"more than {_MOST_INSTRUCTIONS} instructions; send fewer tensors in one bucket")
            if instruction.name == "FRAME" and (place or 0) + argument >= len(data):
                raise ValueError("a frame must end within its stream")
            if instruction.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[instruction.name])
            elif instruction.name in _LITERALS:
                self._stack.append(argument)
            elif instruction.name in ("REDUCE", "NEWOBJ", "BUILD"):
                self._make(instruction.name)
            else:
                self._arrange(instruction.name, argument)
        if self._below or len(self._stack) != 1:
            raise ValueError("not one value")
        return self._stack[0]

    def _arrange(self, name: str, argument: Any) -> None:
        """Puts values into others, into the memo and out of it."""
        stack, memo = self._stack, self._memo
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self._since_mark()
                self._stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._since_mark()
                _typed(self._stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._since_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    # Texts alone: to hash a nested tuple could take for ever.
                    _typed(self._stack[-1], dict)[_typed(key, str)] = value
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                place = len(memo) if name == "MEMOIZE" else argument
                if place >= _MOST_INSTRUCTIONS:
                    raise ValueError("a huge place in the memo")
                memo[place] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(self._find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                word, module = stack.pop(), stack.pop()
                stack.append(self._find(_typed(module, str), _typed(word, str)))
            case _:
                _refuse(f"the instruction {name}")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _make(self, name: str) -> None:
        """Calls a function, makes an object, or sets its attributes."""
        given, subject = self._stack.pop(), self._stack.pop()
        if name == "REDUCE" and type(subject) is _Function and type(given) is tuple:
            if any(given[place : place + 1] != (_CLASS,) for place in subject.classes):
                _refuse("a tensor of an unknown class")
            self._stack.append(subject.call(*(value for value in given if value is not _CLASS)))
        elif name == "NEWOBJ" and subject is _METADATA and type(given) is tuple and not given:
            self._stack.append(_Metadata())
        elif name == "BUILD" and type(subject) is _Metadata and type(given) is dict:
            vars(subject).update(given)
            self._stack.append(subject)
        else:
            _refuse(f"the instruction {name} on something else than tensors need")

    def _find(self, module: str, name: str) -> object:
        """Returns what stands in the place of a global."""
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        # Its module is the trainer's business: the class is not looked up.
        if name == "FlattenedTensorMetadata":
            return _METADATA
        if (module, name) in _CLASSES:
            return _CLASS
        if (module, name) == (_REDUCTIONS, "rebuild_storage_filename"):
            return _Function(self._storage_by_name, (0,))
        if (module, name) in _FUNCTIONS:
            found = _FUNCTIONS[module, name]
            return found if self._opens_gpus or found is not _CUDA_TENSOR else _Function(lambda *_: empty_storage())
        _refuse(f"the global {module[:80]}.{name[:80]}")

    def _storage_by_name(self, manager: object, *arguments: Any) -> SentTensor:
        # The manager is a socket of the sender's, to which torch's own receiver would connect.
        storage = shared_storage(*arguments)
        assert isinstance(storage.source, SharedStorage)
        self._sources.append(storage.source)
        return storage


def _refuse(what: str) -> NoReturn:
    raise ForbiddenError(
        f"{FIELD} must hold nothing but tensors on GPUs or in shared memory by file name, got {what}; send a safetensors body, "
        'or call torch.multiprocessing.set_sharing_strategy("file_system") before it is serialized.',
        field=FIELD,
    )


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} was expected, not {type(value).__name__}")
    return value


def _tensor(storage: object, metadata: object) -> SentTensor:
    offset, size, stride, _ = _typed(metadata, tuple)
    (first,) = checked_numbers((offset,))
    found: SentTensor = _typed(storage, SentTensor).view(first, checked_numbers(size), checked_numbers(stride))
    return found


_REDUCTIONS = "torch.multiprocessing.reductions"
# Classes that are only named: in their place stand objects that are none.
_CLASS: Final = object()
_METADATA: Final = object()
_CLASSES = frozenset(
    {
        ("torch", "Tensor"),
        ("torch._tensor", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.storage", "UntypedStorage"),
        ("torch.storage", "TypedStorage"),
        ("torch", "UntypedStorage"),
    }
)
_CUDA_TENSOR = _Function(cuda_tensor, (0, 4))
_FUNCTIONS: Mapping[tuple[str, str], _Function] = {
    ("torch", "Size"): _Function(checked_numbers),
    (_REDUCTIONS, "rebuild_tensor"): _Function(_tensor, (0,)),
    (_REDUCTIONS, "rebuild_typed_storage"): _Function(lambda storage, dtype: _typed(storage, SentTensor).as_dtype(dtype)),
    (_REDUCTIONS, "rebuild_storage_empty"): _Function(empty_storage, (0,)),
    (_REDUCTIONS, "rebuild_cuda_tensor"): _CUDA_TENSOR,
    # The same, with the device by its UUID.
    ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"): _CUDA_TENSOR,
    ("sglang.srt.patch_torch", "_rebuild_cuda_tensor_modified"): _CUDA_TENSOR,
}


def _payload(value: object, module: str) -> object:
    """Returns what the stream holds for the one module: all of it, if it is not keyed by module."""
    if type(value) is not dict or not value or value.keys() == _BUCKET_FIELDS:
        return value
    if all(type(payload) is SentTensor for payload in value.values()):
        return value
    if list(value) != [module]:
        shown = ", ".join(name[:80] for name in list(value)[:5])
        raise InvalidRequestError(
            f"{FIELD} must hold tensors of {module}, which the request names, and of nothing else, got {shown}; send one "
            "request for each module, with its name in target_modules.",
            field=FIELD,
        )
    return value[module]


def _pairs(value: object) -> list[tuple[str, SentTensor]]:
    if type(value) is dict:
        value = list(value.items())
    if type(value) not in (list, tuple):
        raise TypeError(f"a list of (name, tensor) was expected, not {type(value).__name__}")
    pairs = [_typed(pair, tuple) for pair in value]  # type: ignore[attr-defined]  # one of the two
    return [(_typed(name, str), _typed(tensor, SentTensor)) for name, tensor in pairs]


def _bucket(value: object) -> list[tuple[str, SentTensor]]:
    bucket = _typed(value, dict)
    if bucket.keys() != _BUCKET_FIELDS:
        raise ValueError("a flattened bucket has a flattened_tensor and metadata")
    flat = _typed(bucket["flattened_tensor"], SentTensor)
    return [_part(flat, vars(_typed(item, _Metadata))) for item in _typed(bucket["metadata"], list)]


def _part(flat: SentTensor, state: dict[str, Any]) -> tuple[str, SentTensor]:
    if state.keys() != _METADATA_FIELDS:
        raise ValueError("metadata has other fields")
    first, end, count = checked_numbers((state["start_idx"], state["end_idx"], state["numel"]))
    if count != end - first:
        raise ValueError("numel must be end_idx - start_idx")
    dtype = state["dtype"]
    if type(dtype) is str and (name := dtype.removeprefix("torch.")) in _DTYPES:
        dtype = getattr(torch, name)
    return _typed(state["name"], str), flat.part(first, end, checked_numbers(state["shape"]), dtype)
