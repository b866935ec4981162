"""Named tensors in a pickle, as SGLang's trainers send them.

A stream is read twice. First its instructions are scanned: anything that a pickled tensor does not need is refused, and so are
values of the wrong kind and streams that are too long, before a single object is made. Then Python's unpickler reads it, and
finds no other globals than those listed here: functions of this package that check each argument, in the place of torch's.

What is trusted all the same, which is why it is off unless the server was started with `--allow-pickle-weights`: the sender may
name any shared-memory segment that torch made for the same user, which is read, and its count of users lowered by one, as
torch's own receiver does; and it may hand over CUDA IPC handles, of which the driver, not flowroll, knows how much memory is
behind them. It cannot name a file, a socket, a process or code.

A stream holds one payload: a bucket, `{"flattened_tensor": tensor, "metadata": [FlattenedTensorMetadata]}`, or a list of
(name, tensor) pairs; or one payload for each module, by the module's name. Offsets and sizes of a bucket count elements of its
flattened tensor, which in SGLang 0.5.23 are bytes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import torch
from typing_extensions import override

from flowroll.errors import ForbiddenError, InvalidRequestError, MalformedRequestError
from flowroll.wire.sent_tensors import SentTensor, SharedStorage, checked_numbers, cuda_tensor, empty_storage, shared_storage

FIELD = "serialized_named_tensors"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
_METADATA_FIELDS = frozenset({"name", "shape", "dtype", "start_idx", "end_idx", "numel"})
_BUCKET_FIELDS = frozenset({"flattened_tensor", "metadata"})
# 5,000 tensors take 230,000, or 150,000 in a flattened bucket. An instruction makes one value at most, of some 100 bytes; so
# this bounds time, stack, memo and depth.
_MOST_INSTRUCTIONS = 500_000
_INSTRUCTIONS = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
        *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT"),
        *("LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
    }
)
# What an instruction takes and makes, where Python's own table does not say it closely enough. Keys are texts alone: to hash a
# nested tuple could take for ever. Attributes are set on nothing but new objects, of which metadata is the one kind.
_TAKES = {
    "SETITEM": ["dict", "str", "any"],
    "REDUCE": ["global", "tuple"],
    "NEWOBJ": ["global", "tuple"],
    "BUILD": ["object", "dict"],
}
_MAKERS = ("REDUCE", "NEWOBJ", "BUILD")
_MAKES = {"GLOBAL": "global", "STACK_GLOBAL": "global", "NEWOBJ": "object", "BUILD": "object"}


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
    """The tensors that a stream names. Their data is not read yet; `release` has to be called in the end.

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
        _scan(data)
        value = _payload(_Unpickler(data, sent.sources).load(), module)
        sent.pairs.extend(_bucket(value) if flattened else _pairs(value))
        for other in unread:
            _scan(other)
            _Unpickler(other, sent.sources, opens_gpus=False).load()
        return sent
    except (ForbiddenError, InvalidRequestError):
        sent.release()
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RuntimeError,
        EOFError,
        pickle.PickleError,
    ) as error:
        sent.release()
        reason = (str(error).splitlines() or [""])[0][:200]
        raise MalformedRequestError(
            f"{FIELD} must hold pickled named tensors, got {type(error).__name__}: {reason}; serialize them again.", field=FIELD
        ) from error


def _scan(data: bytes) -> None:
    """Refuses streams that do or take more than a pickled tensor does; nothing is made of them.

    It keeps the kind of each value that would be on the stack or in the memo.
    """
    stack: list[str] = []
    memo: dict[int, str] = {}
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        name: str = instruction.name
        if count == _MOST_INSTRUCTIONS:
            raise ValueError(f"more than {_MOST_INSTRUCTIONS} instructions; send fewer tensors in one bucket")
        if name not in _INSTRUCTIONS:
            _refuse(f"the instruction {name}")
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            # Picklers count from 0; Python makes room up to the place.
            place = len(memo) if name == "MEMOIZE" else argument
            if place >= _MOST_INSTRUCTIONS:
                raise ValueError("a huge place in the memo")
            memo[place] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            _take(stack, name, _TAKES.get(name) or [kind.name for kind in instruction.stack_before])
            stack.extend(_MAKES.get(name, kind.name) for kind in instruction.stack_after)
    if stack:
        raise ValueError("more than one value")


def _take(stack: list[str], name: str, expected: list[str]) -> None:
    """Takes off the stack what an instruction needs."""
    if expected[-1:] == ["stackslice"]:
        place = len(stack) - 1
        while stack[place] != "mark":
            place -= 1
            if place < 0:
                raise ValueError("no mark on the stack")
        items, expected = stack[place + 1 :], expected[:-2]
        del stack[place:]
        if name == "SETITEMS" and (len(items) % 2 or any(kind != "str" for kind in items[::2])):
            raise TypeError("a dictionary must have texts as its keys")
    start = len(stack) - len(expected)
    if start < 0 or "mark" in stack[start:]:
        raise ValueError("too little on the stack")
    for kind, found in zip(expected, stack[start:], strict=True):
        if kind in ("any", found):
            continue
        if name in _MAKERS:
            _refuse(f"the instruction {name} on something else than tensors need")
        raise TypeError(f"{name} needs a {kind}, not a {found}")
    del stack[start:]


class _Unpickler(pickle.Unpickler):
    """Knows no other global than those below."""

    def __init__(self, data: bytes, sources: list[SharedStorage], *, opens_gpus: bool = True) -> None:
        super().__init__(io.BytesIO(data))
        self._sources, self._opens_gpus = sources, opens_gpus

    @override
    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        # Its module is the trainer's business: the class is not looked up.
        if name == "FlattenedTensorMetadata":
            return _Metadata
        if (module, name) in _CLASSES:
            return _CLASS
        if (module, name) == (_REDUCTIONS, "rebuild_storage_filename"):
            return self._storage_by_name
        if (module, name) in _FUNCTIONS:
            found = _FUNCTIONS[module, name]
            return found if self._opens_gpus or found is not _cuda_tensor else _unopened
        _refuse(f"the global {module[:80]}.{name[:80]}")

    def _storage_by_name(self, kind: object, manager: object, *arguments: Any) -> SentTensor:
        # The manager is a socket of the sender's, to which torch's own receiver would connect.
        _check_class(kind)
        storage = shared_storage(*arguments)
        assert isinstance(storage.source, SharedStorage)
        self._sources.append(storage.source)
        return storage


class _Metadata:
    """What the stream says of one tensor of a bucket; not checked yet."""


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


def _check_class(kind: object) -> None:
    if kind is not _CLASS:
        _refuse("a tensor of an unknown class")


def _size(numbers: object) -> tuple[int, ...]:
    return checked_numbers(numbers)


def _tensor(kind: object, storage: object, metadata: object) -> SentTensor:
    _check_class(kind)
    offset, size, stride, _ = _typed(metadata, tuple)
    (first,) = checked_numbers((offset,))
    found: SentTensor = _typed(storage, SentTensor).view(first, checked_numbers(size), checked_numbers(stride))
    return found


def _cuda_tensor(kind: object, size: object, stride: object, offset: object, storage_kind: object, *rest: Any) -> SentTensor:
    _check_class(kind)
    _check_class(storage_kind)
    return cuda_tensor(size, stride, offset, *rest)


def _unopened(*_: object) -> SentTensor:
    return empty_storage()


def _typed_storage(storage: object, dtype: object) -> SentTensor:
    found: SentTensor = _typed(storage, SentTensor).as_dtype(dtype)
    return found


def _empty(kind: object) -> SentTensor:
    _check_class(kind)
    return empty_storage()


_REDUCTIONS = "torch.multiprocessing.reductions"
# Classes that are only named: in their place stands one object that is none.
_CLASS: Final = object()
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
_FUNCTIONS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("torch", "Size"): _size,
    (_REDUCTIONS, "rebuild_tensor"): _tensor,
    (_REDUCTIONS, "rebuild_typed_storage"): _typed_storage,
    (_REDUCTIONS, "rebuild_storage_empty"): _empty,
    (_REDUCTIONS, "rebuild_cuda_tensor"): _cuda_tensor,
    # The same, with the device by its UUID.
    ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"): _cuda_tensor,
    ("sglang.srt.patch_torch", "_rebuild_cuda_tensor_modified"): _cuda_tensor,
}


def _payload(value: object, module: str) -> object:
    """What the stream holds for the one module: all of it, if it is not keyed by module."""
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
