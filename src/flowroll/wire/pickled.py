"""Named tensors in a pickle, as SGLang's trainers send them, decoded without executing anything.

This is no `pickle.Unpickler` with a filter: it is a machine of its own that knows the two dozen instructions of which such a
stream consists and refuses every other. A global is a pair of words until it is looked up in the table below, whose entries are
functions of this package that check each argument; nothing is imported, no object is called, and no attribute is set on
anything but a record that was made for this stream.

What is trusted all the same, which is why it is off unless the server was started with `--allow-pickle-weights`: the sender may
name any shared-memory segment that torch made for the same user, which is read, and its count of users lowered by one, as
torch's own receiver does; and it may hand over CUDA IPC handles, of which the driver, not flowroll, knows how much memory is
behind them. It cannot name a file, a socket, a process or code.

Formats: a list of (name, tensor); a dict of tensors by name; `load_format` "flattened_bucket":
{"flattened_tensor": tensor, "metadata": [FlattenedTensorMetadata(name, shape, dtype, start_idx, end_idx, numel)]}.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch

from flowroll.errors import ForbiddenError, MalformedRequestError
from flowroll.wire.sent_tensors import SentTensor, SharedStorage, cuda_tensor, empty_storage, rebuilt_tensor, shared_storage

FIELD = "serialized_named_tensors"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
_METADATA_FIELDS = frozenset({"name", "shape", "dtype", "start_idx", "end_idx", "numel"})


@dataclass(frozen=True, slots=True)
class _Global:
    """Two words of the stream. Nothing was looked up."""

    module: str
    name: str


@dataclass(slots=True)
class _Metadata:
    """What the stream says of one tensor of a bucket; not checked yet."""

    state: dict[Any, Any]


_MARK: Final = object()
# 5,000 tensors take 230,000, or 150,000 in a flattened bucket. An instruction makes one value at most, and some 100 bytes; so
# this bounds time, stack, memo and depth. Values may be as deep: nothing here walks through one, and Python frees them flat.
_MOST_INSTRUCTIONS = 500_000


@dataclass(frozen=True, slots=True)
class SentTensors:
    """What a stream named.

    Attributes:
        pairs: Names and tensors.
        sources: All segments that it named, also those that no tensor is in.
    """

    pairs: list[tuple[str, SentTensor]]
    sources: list[SharedStorage]

    def release(self) -> None:
        """Lets the sender have its memory back; nothing can be copied from then on. May be called twice."""
        for source in self.sources:
            source.release()


def named_tensors(data: bytes, *, flattened: bool) -> SentTensors:
    """The tensors that a stream names. Their data is not read yet; `release` has to be called in the end.

    Whatever a refused stream had named by then is released.

    Args:
        data: The pickle.
        flattened: Whether it holds a flattened bucket.

    Raises:
        ForbiddenError: It holds an instruction or a global that no such stream has.
        MalformedRequestError: It is broken, or holds something else.
    """
    sent = SentTensors([], [])
    try:
        value = _run(data, sent.sources)
        sent.pairs.extend(_bucket(value) if flattened else _pairs(value))
        return sent
    except ForbiddenError:
        sent.release()
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        sent.release()
        reason = (str(error).splitlines() or [""])[0][:200]
        raise MalformedRequestError(
            f"{FIELD} must hold pickled named tensors, got {type(error).__name__}: {reason}; serialize them again.", field=FIELD
        ) from error


def _run(data: bytes, sources: list[SharedStorage]) -> object:
    """Runs the stream; what is left is its value. The segments that it names are added to the sources."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if count == _MOST_INSTRUCTIONS:
            raise ValueError(f"more than {_MOST_INSTRUCTIONS} instructions; send fewer tensors in one bucket")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES":
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(instruction.name[-1])
                stack[-length:] = [tuple(_top(stack, length))]
            case "TUPLE":
                stack.append(tuple(_to_mark(stack)))
            case "APPEND":
                item = stack.pop()
                _typed(stack[-1], list).append(item)
            case "APPENDS":
                items = _to_mark(stack)
                _typed(stack[-1], list).extend(items)
            case "SETITEM":
                key, item = _top(stack, 2)
                del stack[-2:]
                _typed(stack[-1], dict)[_typed(key, str)] = item
            case "SETITEMS":
                items = _to_mark(stack)
                target = _typed(stack[-1], dict)
                target.update((_typed(key, str), item) for key, item in zip(items[::2], items[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                # Picklers count from 0.
                if argument >= _MOST_INSTRUCTIONS:
                    raise ValueError("a huge place in the memo")
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, name = _top(stack, 2)
                stack[-2:] = [_global(module, name)]
            case "REDUCE":
                function, arguments = _top(stack, 2)
                result = _call(function, _typed(arguments, tuple))
                # Once each: other calls give the same storage again, as another dtype.
                if function == _BY_NAME:
                    sources.append(result.source)
                stack[-2:] = [result]
            case "NEWOBJ":
                kind, arguments = _top(stack, 2)
                stack[-2:] = [_new_metadata(kind, arguments)]
            case "BUILD":
                state = _typed(stack.pop(), dict)
                _typed(stack[-1], _Metadata).state = state
            case "STOP":
                (value,) = stack
                return value
            case other:
                _refuse(f"the instruction {other}")
    raise ValueError("no end")


def _top(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    if len(items) < count or any(item is _MARK for item in items):
        raise ValueError("too little on the stack")
    return items


def _to_mark(stack: list[Any]) -> list[Any]:
    for place in range(len(stack) - 1, -1, -1):
        if stack[place] is _MARK:
            items = stack[place + 1 :]
            del stack[place:]
            return items
    raise ValueError("no mark on the stack")


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} was expected, not {type(value).__name__}")
    return value


def _global(module: object, name: object) -> object:
    """What a global stands for: a dtype, or its words, if any table has them."""
    found = _Global(_typed(module, str), _typed(name, str))
    if module == "torch" and name in _DTYPES:
        return getattr(torch, name)
    if found in _KINDS or found in _FUNCTIONS or _is_metadata(found):
        return found
    _refuse(f"the global {found.module[:80]}.{found.name[:80]}")


def _is_metadata(found: object) -> bool:
    # Its module is the trainer's business: the class is not looked up.
    return isinstance(found, _Global) and found.name == "FlattenedTensorMetadata"


def _new_metadata(kind: object, arguments: object) -> _Metadata:
    if not _is_metadata(kind) or _typed(arguments, tuple):
        _refuse("another object than a bucket's metadata")
    return _Metadata({})


def _call(function: object, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(function, _Global) or function not in _FUNCTIONS:
        _refuse("a call of something else than a rebuilding function")
    return _FUNCTIONS[function](*arguments)


def _refuse(what: str) -> NoReturn:
    raise ForbiddenError(
        f"{FIELD} must hold nothing but tensors on GPUs or in shared memory by file name, got {what}; send a safetensors body, "
        'or call torch.multiprocessing.set_sharing_strategy("file_system") before it is serialized.',
        field=FIELD,
    )


def _size(numbers: object) -> tuple[int, ...]:
    return tuple(_typed(number, int) for number in _typed(numbers, tuple))


def _tensor(kind: object, storage: object, metadata: object) -> SentTensor:
    offset, size, stride, _ = _typed(metadata, tuple)
    _check_kind(kind)
    return rebuilt_tensor(storage, offset, size, stride)


def _cuda_tensor(kind: object, size: object, stride: object, offset: object, storage_kind: object, *rest: object) -> SentTensor:
    _check_kind(kind)
    _check_kind(storage_kind)
    return cuda_tensor(size, stride, offset, *rest)


def _check_kind(kind: object) -> None:
    # Nothing else of the stream's is hashed: of nested tuples that would be a recursion in C, or take 2^40 steps.
    if not isinstance(kind, _Global) or kind not in _KINDS:
        _refuse("a tensor of an unknown class")


def _storage_by_name(kind: object, manager: object, name: object, size: object, dtype: object = torch.uint8) -> object:
    # The manager is a socket of the sender's, to which torch's own receiver would connect.
    _check_kind(kind)
    return shared_storage(name, size, dtype)


def _typed_storage(storage: object, dtype: object) -> object:
    return storage.typed(dtype)  # type: ignore[attr-defined]  # or an AttributeError, as for anything else in the wrong place


def _empty(kind: object) -> object:
    _check_kind(kind)
    return empty_storage()


_REDUCTIONS = "torch.multiprocessing.reductions"
_BY_NAME = _Global(_REDUCTIONS, "rebuild_storage_filename")
# Classes that are only named.
_KINDS = frozenset(
    {
        _Global("torch", "Tensor"),
        _Global("torch._tensor", "Tensor"),
        _Global("torch.nn.parameter", "Parameter"),
        _Global("torch.storage", "UntypedStorage"),
        _Global("torch.storage", "TypedStorage"),
        _Global("torch", "UntypedStorage"),
    }
)
_FUNCTIONS: dict[_Global, Callable[..., object]] = {
    _Global("torch", "Size"): _size,
    _Global(_REDUCTIONS, "rebuild_tensor"): _tensor,
    _Global(_REDUCTIONS, "rebuild_typed_storage"): _typed_storage,
    _BY_NAME: _storage_by_name,
    _Global(_REDUCTIONS, "rebuild_storage_empty"): _empty,
    _Global(_REDUCTIONS, "rebuild_cuda_tensor"): _cuda_tensor,
    # The same, with the device by its UUID.
    _Global("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"): _cuda_tensor,
    _Global("sglang.srt.patch_torch", "_rebuild_cuda_tensor_modified"): _cuda_tensor,
}


def _pairs(value: object) -> list[tuple[str, SentTensor]]:
    if type(value) is dict:
        value = list(value.items())
    pairs = [_typed(pair, tuple) for pair in _typed(value, list)]
    return [(_typed(name, str), _typed(tensor, SentTensor)) for name, tensor in pairs]


def _bucket(value: object) -> list[tuple[str, SentTensor]]:
    bucket = _typed(value, dict)
    if bucket.keys() != {"flattened_tensor", "metadata"}:
        raise ValueError("a flattened bucket has a flattened_tensor and metadata")
    flat = _typed(bucket["flattened_tensor"], SentTensor)
    found: Sequence[Any] = _typed(bucket["metadata"], list)
    return [_part(flat, _typed(item, _Metadata).state) for item in found]


def _part(flat: SentTensor, state: dict[Any, Any]) -> tuple[str, SentTensor]:
    if state.keys() != _METADATA_FIELDS:
        raise ValueError("metadata has other fields")
    shape = _typed(state["shape"], tuple)
    part = flat.part(state["start_idx"], state["end_idx"], shape, state["dtype"])
    if _typed(state["numel"], int) != part.numel:
        raise ValueError("numel is not the shape's")
    return _typed(state["name"], str), part
