"""Pickled tensors: what a trainer sends comes through to the bit; whatever else is in a stream is refused and not run."""

import builtins
import copyreg
import functools
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pickling import FlattenedTensorMetadata, flattened, own_segments, pickled, trainer
from torch import Tensor, nn

from flowroll.errors import ForbiddenError, InvalidRequestError, MalformedRequestError
from flowroll.wire.pickled import named_tensors
from flowroll.wire.sent_tensors import SharedStorage, cuda_tensor, shared_storage

TENSORS = {
    "a": torch.arange(7.0),
    "b": torch.randn(3, 5).to(torch.bfloat16),
    "c": torch.randn(2, 3, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
}


@pytest.fixture(autouse=True)
def as_a_trainer() -> Iterator[None]:
    with trainer():
        yield


def received(data: bytes, *, is_flattened: bool = False) -> dict[str, Tensor]:
    found, sent = {}, named_tensors(data, module="transformer", flattened=is_flattened)
    for name, tensor in sent.pairs:
        found[name] = torch.full(tensor.shape, 9, dtype=tensor.dtype)
        tensor.copy_to(found[name])
    sent.release()
    sent.release()  # once for the owner all the same
    return found


def assert_same(found: dict[str, Tensor], sent: dict[str, Tensor]) -> None:
    assert found.keys() == sent.keys()
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["pairs", "dict", "parameters", "bytes", "older", "other module"])
def test_what_a_trainer_sends_comes_through_to_the_bit(kind: str) -> None:
    sent = dict(TENSORS)
    if kind == "pairs":
        assert_same(received(pickled(list(sent.items()))), sent)
    elif kind == "dict":
        assert_same(received(pickled(sent)), sent)
    elif kind == "parameters":
        assert_same(received(pickled([(name, nn.Parameter(tensor)) for name, tensor in sent.items()])), sent)
    elif kind == "bytes":
        assert_same(received(pickled(flattened(sent)), is_flattened=True), sent)
    elif kind == "older":
        sent = {name: tensor.to(torch.bfloat16) for name, tensor in sent.items()}
        assert_same(received(pickled(flattened(sent, as_bytes=False)), is_flattened=True), sent)
    else:
        with trainer("miles.backends.weight_sync.tensor_bucket"):
            assert_same(received(pickled(flattened(sent)), is_flattened=True), sent)


def test_views_are_read_as_views() -> None:
    base = torch.arange(24.0).view(4, 6)
    views = {"t": base.t(), "rows": base[1:3], "columns": base[:, 2:5], "steps": base[::2, ::3], "wide": base[0].expand(3, 6)}
    assert_same(received(pickled(list(views.items()))), views)


def test_a_sender_gets_its_memory_back() -> None:
    before = own_segments()
    tensor = torch.arange(100.0)
    data = pickled([("a", tensor), ("b", tensor[5:])])
    assert len(own_segments() - before) == 1
    received(data)
    assert len(own_segments() - before) == 1  # it is the sender's still
    del tensor
    assert own_segments() <= before


@pytest.mark.parametrize("kind", ["a call", "an item", "no tensor", "a bucket", "nobody wants it"])
def test_a_sender_gets_its_memory_back_from_a_stream_that_is_refused(kind: str) -> None:
    before = own_segments()
    tensor = torch.arange(100.0)
    others: dict[str, object] = {"a call": ("b", _Reduced(os.getpid)), "an item": 3, "no tensor": ("b", 3)}
    data = pickled([("a", tensor), others.get(kind, ("b", tensor[5:]))])
    if kind == "nobody wants it":
        named_tensors(data, module="transformer", flattened=False).release()
    else:
        with pytest.raises((ForbiddenError, MalformedRequestError)):
            named_tensors(data, module="transformer", flattened=kind == "a bucket")
    assert len(own_segments() - before) == 1
    del tensor
    assert own_segments() <= before


class _Reduced:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class _Persistent(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, bytearray) else None


def _persistent(protocol: int) -> bytes:
    buffer = io.BytesIO()
    _Persistent(buffer, protocol=protocol).dump([("a", bytearray(b"x"))])
    return buffer.getvalue()


def _stack_global(module: str, name: str, tail: bytes = b")R.") -> bytes:
    def word(text: str) -> bytes:
        return b"\x8c" + bytes([len(text)]) + text.encode()

    return b"\x80\x04" + word(module) + word(name) + b"\x93" + tail


MARK = "{marker}"
# Of the instructions and globals that a tensor needs, but used as none does.
UNFIT = {
    *("a huge number", "bytes of 8 EiB", "text of 8 EiB", "a call of a dtype", "a call of a class"),
    *("a new object of a class", "a new object of metadata with arguments"),
}


def _hostile(marker: str) -> dict[str, bytes]:
    touch = f"touch {marker}"
    reductions = "torch.multiprocessing.reductions"
    protocols = {
        f"os.system, protocol {protocol}": pickle.dumps(_Reduced(os.system, touch), protocol=protocol) for protocol in range(6)
    }
    inner = pickle.dumps(_Reduced(os.system, touch))
    return protocols | {
        "eval": pickle.dumps(_Reduced(builtins.eval, f"open({marker!r}, 'w')")),
        "exec": pickle.dumps(_Reduced(builtins.exec, f"open({marker!r}, 'w')")),
        "getattr": _stack_global("builtins", "getattr"),
        "a dotted name": _stack_global("torch", "os.system", b"\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R."),
        "a dotted name under what is known": _stack_global(reductions, "os.system"),
        "a known name elsewhere": _stack_global("os", "rebuild_tensor"),
        "a dtype's name elsewhere": _stack_global("os", "float32"),
        "torch.load": pickle.dumps(_Reduced(torch.load, marker)),
        "storage bytes": pickle.dumps([("a", torch.ones(2))], protocol=4),
        "nested": pickle.dumps(_Reduced(pickle.loads, inner)),
        "partial": pickle.dumps(functools.partial(os.system, touch)),
        "copyreg": pickle.dumps(_Reduced(copyreg._reconstructor, object, object, None)),
        "copyreg, protocol 0": b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.",
        "instance": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "a registered extension": b"\x80\x02\x82\x01.",
        "a persistent id": _persistent(4),
        "a persistent id as text": b"Pstorage\n.",
        "a socket": pickle.dumps(_Reduced(__import__("socket").create_connection, ("127.0.0.1", 1))),
        "a call of a dtype": _stack_global("torch", "float32"),
        "a call of a class": _stack_global("torch", "Tensor"),
        "a new object of a class": _stack_global("torch", "Tensor", b")\x81."),
        "a new object of metadata with arguments": _stack_global("x", "FlattenedTensorMetadata", b"K\x01\x85\x81."),
        "a method of what is known": _stack_global(reductions, "rebuild_tensor.__globals__"),
        "a huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "bytes of 8 EiB": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b".",
        "text of 8 EiB": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
        "a class that is none": b"\x80\x02c" + reductions.encode() + b"\nrebuild_storage_empty\nN\x85R.",
        "a set": pickle.dumps({1, 2}),
        "a float": pickle.dumps([1.5]),
    }


@pytest.mark.parametrize("kind", _hostile(MARK))
def test_whatever_else_is_in_a_stream_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "run"
    for is_flattened in (False, True):
        with pytest.raises((ForbiddenError, MalformedRequestError)) as refused:
            named_tensors(_hostile(str(marker))[kind], module="transformer", flattened=is_flattened)
        assert kind in UNFIT or isinstance(refused.value, ForbiddenError), refused.value
    assert not marker.exists()


@pytest.mark.parametrize(
    ("kind", "data"),
    {
        "nothing": b"",
        "no end": b"\x80\x04]",
        "an empty stack": b"\x80\x04.",
        "two values": b"\x80\x04]].",
        "no mark": b"\x80\x04]e.",
        "a mark as a value": b"\x80\x04(.",
        "an item of nothing": b"\x80\x04a.",
        "an unknown memo": b"\x80\x04h\x05.",
        "a huge memo": b"\x80\x04]r\xff\xff\xff\xffK\x01.",
        "unknown bytes": b"\x80\x04\xff.",
        "keys that are no text": b"\x80\x04}K\x01K\x02s.",
        "an odd number of items": b"\x80\x04}(K\x01u.",
        "attributes of a function": b"\x80\x04" + _stack_global("torch", "Size", b"}\x8c\x01xK\x01sb.")[2:],
        "attributes of a dtype": b"\x80\x04" + _stack_global("torch", "float32", b"}b.")[2:],
        "attributes by a pair": b"\x80\x04" + _stack_global("x", "FlattenedTensorMetadata", b")\x81N}\x86b.")[2:],
        "pairs that are none": pickled([("a", 1)]),
        "a tensor alone": b"\x80\x04K\x01.",
        "a deep list": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "a list of itself": b"\x80\x04]\x94h\x00a.",
        "a name that is none": b"\x80\x04K\x01K\x02\x93.",
    }.items(),
)
def test_a_broken_stream_is_refused(kind: str, data: bytes) -> None:
    for is_flattened in (False, True):
        with pytest.raises(ForbiddenError if "attributes" in kind else MalformedRequestError):
            named_tensors(data, module="transformer", flattened=is_flattened)


@pytest.mark.parametrize("filler", [b"]", b"\x94", b"h\x00", b"("], ids=["lists", "memo", "stack", "marks"])
def test_a_stream_has_so_many_instructions(filler: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(count: int, words: str) -> None:
        # PROTO, a list and its memo are the first three.
        with pytest.raises(MalformedRequestError, match=words):
            named_tensors(b"\x80\x02]\x94" + filler * (count - 3), module="transformer", flattened=False)

    if filler == b"\x94":
        send(500_001, "more than 500000 instructions")
    monkeypatch.setattr("flowroll.wire.pickled._MOST_INSTRUCTIONS", 1000)
    send(1000, "pickle exhausted")
    send(1001, "more than 1000 instructions")
    with pytest.raises(MalformedRequestError, match="huge place in the memo"):
        named_tensors(b"\x80\x02]r" + struct.pack("<I", 1000) + b".", module="transformer", flattened=False)


def test_five_thousand_tensors_of_their_own_take_neither_too_many_instructions_nor_descriptors() -> None:
    tensors = {f"transformer_blocks.{place}.attn.to_q.weight": torch.full((2,), float(place)) for place in range(5000)}
    data = pickled(list(tensors.items()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
    try:
        assert_same(received(data), tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(received(pickled(flattened(tensors)), is_flattened=True)) == 5000


BOMBS = {
    "bytes of 4 GiB": b"\x80\x04B\xff\xff\xff\xff.",
    "text of 4 GiB": b"\x80\x04X\xff\xff\xff\xff.",
    "a bytearray of 8 GiB": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",
    "a frame of a TiB": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"].",
    "a place in the memo": b"\x80\x04]r\xff\xff\xff\x7f.",
    "a segment of a TiB": b"\x80\x04]" + b"ctorch.multiprocessing.reductions\nrebuild_storage_filename\n"
    b"(ctorch.storage\nUntypedStorage\nC\x00C\x0c/torch_1_1_1\x8a\x06" + (2**40).to_bytes(6, "little") + b"tRa.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_a_stream_takes_in_memory_is_bounded_by_its_length(kind: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((ForbiddenError, MalformedRequestError)):
            named_tensors(BOMBS[kind], module="transformer", flattened=False)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


_EMPTY_STORAGE = b"\x80\x02]ctorch.multiprocessing.reductions\nrebuild_storage_empty\n)"
# A tuple in a tuple, and so on; and one whose parts are the same tuple, forty times over: 2^40 to whoever walks through it.
_DEEP, _DOUBLED = b"\x85" * 200_000, b"q\x01h\x01\x86" * 40
_METADATA = b"\x80\x02cx\nFlattenedTensorMetadata\n)\x81"
NESTED = {
    "deep, as a class": _EMPTY_STORAGE + _DEEP + b"\x85R.",
    "doubled, as a class": _EMPTY_STORAGE + _DOUBLED + b"\x85R.",
    "deep, as arguments of metadata": b"\x80\x02]cx\nFlattenedTensorMetadata\n)" + _DEEP + b"\x81.",
    "doubled, as a pair": b"\x80\x02])" + _DOUBLED + b"a.",
    "doubled, as pairs": b"\x80\x02)" + _DOUBLED + b".",
    "doubled, as a key": b"\x80\x02})" + _DOUBLED + b"Ns.",
    "doubled, as one key of several": b"\x80\x02}()" + _DOUBLED + b"Nu.",
    "doubled, as a name": b"\x80\x02])" + _DOUBLED + b"N\x86a.",
    "doubled, as a function": b"\x80\x02)" + _DOUBLED + b")R.",
    "doubled, as a module": b"\x80\x04)" + _DOUBLED + b"X\x01\x00\x00\x00x\x93.",
    "doubled, as a number of elements": b"\x80\x02ctorch\nSize\n)" + _DOUBLED + b"\x85R.",
    "metadata of metadata": _METADATA
    + b"}X\x01\x00\x00\x00x"
    + (b"cx\nFlattenedTensorMetadata\n)\x81}X\x01\x00\x00\x00x") * 20_000
    + b"N"
    + b"sb" * 20_001
    + b".",
}


@pytest.mark.slow
def test_nested_values_are_refused_by_a_process_that_lives_on() -> None:
    """In a process of its own: unguarded, some of these end it, and the others never end."""
    script = (
        "import sys, pickle\n"
        "from flowroll.errors import ForbiddenError, MalformedRequestError\n"
        "from flowroll.wire.pickled import named_tensors\n"
        "for kind, data in pickle.load(sys.stdin.buffer).items():\n"
        "    for flattened in (False, True):\n"
        "        try:\n"
        "            named_tensors(data, module='transformer', flattened=flattened)\n"
        "        except (ForbiddenError, MalformedRequestError):\n"
        "            print(kind, flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(NESTED), capture_output=True, timeout=300)
    assert run.stdout.decode().splitlines() == [kind for kind in NESTED for _ in range(2)], (run.returncode, run.stderr)


def _sent(offset: object = 0, size: object = (2,), stride: object = (1,), edit: Callable[[bytes], bytes] = bytes) -> bytes:
    """The stream of one float32 tensor of six elements, with another offset, size and stride, or other bytes."""
    tensor = torch.arange(6.0)
    _sent.kept = tensor  # type: ignore[attr-defined]  # its segment lives as long
    from torch.multiprocessing import reductions

    rebuild, (kind, storage, _) = reductions.reduce_tensor(tensor)
    return edit(pickled([("a", _Reduced(rebuild, kind, storage, (offset, size, stride, False)))]))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (5, (2,), (1,)),
        (0, (7,), (1,)),
        (0, (2, 2), (5, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2,), (1, 1)),
        (2**62, (1,), (1,)),
        (0, (2**62,), (1,)),
        (0, (2,), (2**62,)),
        (0, (2**40, 2**40), (0, 0)),
        (True, (2,), (1,)),
        (0, (2.0,), (1,)),
        (0, [2], (1,)),
        (0, (1,) * 20, (1,) * 20),
        ("0", (2,), (1,)),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(offset: object, size: object, stride: object) -> None:
    assert list(received(_sent(2, (2, 2), (2, 1)))["a"].flatten()) == [2, 3, 4, 5]
    with pytest.raises((MalformedRequestError, ForbiddenError)):
        named_tensors(_sent(offset, size, stride), module="transformer", flattened=False)


@pytest.mark.parametrize(
    "name",
    [
        b"/etc/passwd",
        b"../../etc/passwd",
        b"/torch_1_1_1/../../etc/passwd",
        b"torch_1_1_1",
        b"/torch_1_1_1\n",
        b"/torch_1_1_1\0",
        b"/torch_1_1_x",
        "/torch_1_1_1",
        b"/sem.torch_1_1_1",
        b"",
        None,
    ],
)
def test_a_segment_is_one_of_torchs_and_nothing_else(name: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        shared_storage(name, 8, torch.uint8)


def test_a_segment_is_a_regular_file_as_long_as_is_said(tmp_path: Path) -> None:
    name = f"torch_{os.getpid()}_1_999999"
    path = Path("/dev/shm") / name
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1000))
    try:
        path.symlink_to(secret)
        with pytest.raises(ValueError, match="must be there"):
            SharedStorage(f"/{name}".encode(), 8)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ValueError, match="must be this user's"):
            SharedStorage(f"/{name}".encode(), 8)
        path.unlink()
        path.write_bytes(bytes(64 + 8))
        with pytest.raises(ValueError, match="as long as is said"):
            SharedStorage(f"/{name}".encode(), 9)
        storage = SharedStorage(f"/{name}".encode(), 8)
        storage.read_into(torch.empty(8, dtype=torch.uint8), 0)
        with pytest.raises(ValueError, match="must stay while it is read"):
            storage.read_into(torch.empty(8, dtype=torch.uint8), 1)
        os.truncate(path, 70)
        with pytest.raises(ValueError, match="as long as is said"):
            storage.read_into(torch.empty(8, dtype=torch.uint8), 0)
        path.unlink()
        path.symlink_to(secret)
        with pytest.raises(ValueError, match="must be there"):
            storage.read_into(torch.empty(8, dtype=torch.uint8), 0)
    finally:
        path.unlink()


def _bucket(**changes: object) -> bytes:
    state = {"name": "a", "shape": (2,), "dtype": torch.float32, "start_idx": 0, "end_idx": 8, "numel": 8} | changes
    flat = torch.zeros(16, dtype=torch.uint8)
    _bucket.kept = flat  # type: ignore[attr-defined]
    metadata = FlattenedTensorMetadata("", torch.Size(()), torch.float32, 0, 0, 0)
    metadata.__dict__.clear()
    metadata.__dict__.update(state)
    return pickled({"flattened_tensor": flat, "metadata": [metadata]})


@pytest.mark.parametrize(
    "changes",
    [
        {"end_idx": 24, "shape": (6,), "numel": 24},
        {"start_idx": -8, "end_idx": 0},
        {"start_idx": 8, "end_idx": 0, "numel": -8},
        {"start_idx": 8, "end_idx": 0, "numel": 8},
        {"end_idx": 12, "numel": 12},
        {"shape": (3,)},
        {"numel": 2},
        {"shape": (-1,)},
        {"dtype": "float33"},
        {"dtype": "torch.nn"},
        {"name": 3},
        {"more": 3},
        {"start_idx": False},
    ],
)
def test_metadata_that_does_not_fit_its_bucket_is_refused(changes: dict[str, object]) -> None:
    assert torch.equal(received(_bucket(), is_flattened=True)["a"], torch.zeros(2))
    with pytest.raises(MalformedRequestError):
        named_tensors(_bucket(**changes), module="transformer", flattened=True)


def test_file_descriptors_are_refused_with_the_remedy() -> None:
    with trainer(strategy="file_descriptor"):
        tensor = torch.ones(3)
        data = pickled([("a", tensor)])
    with pytest.raises(ForbiddenError, match=r'set_sharing_strategy\("file_system"\)'):
        named_tensors(data, module="transformer", flattened=False)


CUDA = {
    "size": (2,),
    "stride": (1,),
    "offset": 0,
    "dtype": torch.float32,
    "device": 0,
    "handle": b"\x02c" + bytes(64),
    "storage_bytes": 512,
    "storage_offset": 0,
    "requires_grad": False,
    "counter_name": b"/torch_1_2_3",
    "counter_offset": 0,
    "event_handle": bytes(64),
    "event_sync_required": True,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": (129,)}, "lie in its storage"),
        ({"offset": 127}, "lie in its storage"),
        ({"handle": b"\x02e" + bytes(64)}, "switch expandable segments off"),
        ({"handle": bytes(63)}, "cudaMalloc"),
        ({"handle": "x" * 64}, "bytes"),
        ({"handle": None}, "bytes"),
        ({"event_handle": bytes(63)}, "CUDA's"),
        ({"counter_name": b"/etc/passwd"}, "torch's"),
        ({"storage_offset": -1}, "natural"),
        ({"counter_offset": "0"}, "natural"),
        ({"counter_offset": 10_000}, "a counter must lie in its segment"),
        ({"device": 99}, "this machine's"),
        ({"device": "GPU-1"}, "this machine's"),
    ],
)
def test_a_handle_of_a_gpu_is_checked_before_it_is_opened(change: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        cuda_tensor(**{**CUDA, **change})


def test_a_counter_of_a_gpu_is_in_a_segment_of_torchs_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without GPUs takes the handle as far as torch's own function."""
    opened: list[tuple[object, ...]] = []

    def rebuild(*arguments: object) -> Tensor:
        opened.append(arguments)
        return torch.zeros(512, dtype=torch.uint8)

    monkeypatch.setattr("flowroll.wire.sent_tensors._cuda_device", lambda device: 0)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)
    name = f"torch_{os.getpid()}_1_999998"
    path, handle = Path("/dev/shm") / name, {**CUDA, "counter_name": f"/{name}".encode(), "counter_offset": 9999}
    try:
        with pytest.raises(ValueError, match="must be there"):
            cuda_tensor(**handle)
        path.write_bytes(bytes(64 + 80_000 - 1))
        with pytest.raises(ValueError, match="as long as is said"):
            cuda_tensor(**handle)
        assert not opened
        path.write_bytes(bytes(64 + 80_000))
        assert cuda_tensor(**handle).shape == (2,) and len(opened) == 1
    finally:
        path.unlink(missing_ok=True)


def _mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(changed))
        other = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                changed[place] ^= 1 << rng.randrange(8)
            case 2:
                del changed[place : place + rng.randrange(1, 8)]
            case 3:
                changed[place:place] = changed[other : other + rng.randrange(1, 40)]
            case 4:
                changed[place:place] = rng.choice(pickletools.opcodes).code.encode("latin1")
    return bytes(changed)


def test_a_damaged_stream_is_refused_or_names_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    # Or the first stream that is read to its end would take the segment away from the others.
    monkeypatch.setattr(SharedStorage, "release", lambda self: None)
    rng = random.Random(0)
    kept = [flattened(TENSORS), {"transformer": flattened(TENSORS)}, list(TENSORS.items())]
    # Without the frame, whose length would give most of the changes away.
    streams = [data[:2] + data[11:] for data in map(pickled, kept)]
    endings = Counter[str]()
    sizes = {tensor.nbytes for tensor in TENSORS.values()} | {kept[0]["flattened_tensor"].nbytes}  # type: ignore[call-overload]
    for _ in range(6000):
        place = rng.randrange(len(streams))
        try:
            sent = named_tensors(_mutated(streams[place], rng), module="transformer", flattened=place < 2)
        except (ForbiddenError, MalformedRequestError, InvalidRequestError) as error:
            endings[type(error).__name__] += 1
        else:
            endings["read"] += 1
            for _, tensor in sent.pairs:
                storage = tensor.source
                room = storage.nbytes if isinstance(storage, SharedStorage) else 0
                span = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True))
                if torch.Size(tensor.shape).numel():
                    assert tensor.start >= 0 and tensor.start + span * tensor.dtype.itemsize <= room <= max(sizes)
    assert min(endings[kind] for kind in ("read", "ForbiddenError", "MalformedRequestError")) > 50, endings
