"""The safetensors header: no sender makes reading it slow, and nothing in it is passed over."""

import json
import time

import pytest
import safetensors.torch
import torch

from flowroll.errors import WeightsRejectedError
from flowroll.wire.safetensors import BlobError, StoredTensor, TensorStream, read_header, safetensors_prefix

ENTRY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def header(*names: str) -> bytes:
    return ("{" + ",".join(f"{json.dumps(name)}:{ENTRY}" for name in names) + "}").encode()


def test_a_header_is_read_as_the_library_writes_it_and_written_as_the_library_reads_it() -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "ä": torch.arange(5, dtype=torch.int16), "none": torch.empty(0, 4)}
    data = safetensors.torch.save(tensors, metadata={"b": "no tensor"})
    length = int.from_bytes(data[:8], "little")
    found = {one.name: one for one in read_header(data[8 : 8 + length])}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert data[found[name].start : found[name].stop] == tensor.numpy().tobytes()
    body = safetensors_prefix(tensors) + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    for name, tensor in safetensors.torch.load(body).items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    ("raw", "words"),
    {
        "one name, again and again": (header(*["a"] * 30_000), "a is there twice"),
        "every name twice": (header(*map(str, range(20_000)), *map(str, range(20_000))), "0 is there twice"),
        "a shape of a million dimensions": (
            ENTRY.join(['{"a":', "}"]).replace("[0]", "[" + "9223372036854775807," * 1_000_000 + "0]").encode(),
            "F32 data of a does not fill shape",
        ),
        "a number of a million digits": (ENTRY.join(['{"a":', "}"]).replace("[0]", f"[{'9' * 1_000_000}]").encode(), ""),
        "a product of huge numbers": (
            ENTRY.join(['{"a":', "}"]).replace("[0]", "[" + ",".join(["9" * 4000] * 64) + "]").encode(),
            "",
        ),
        "lists in lists": (b"[" * 1_000_000, ""),
    }.values(),
    ids=["one name", "every name", "dimensions", "digits", "product", "lists"],
)
def test_the_time_that_a_bad_header_takes_is_linear_in_its_length(raw: bytes, words: str) -> None:
    """A header of 96 KB in which one name repeated took 4 s, one of 4.8 MB hours."""
    started_s = time.thread_time()
    with pytest.raises(BlobError) as refused:
        read_header(raw)
    # Quadratic would be minutes.
    assert time.thread_time() - started_s < 10
    assert words in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"3",
        b'"a"',
        b'["a"]',
        header("a").decode().encode("utf-16"),
        b'{"a":3}',
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"U64","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_what_is_no_header_is_refused(raw: bytes) -> None:
    with pytest.raises(BlobError):
        read_header(raw)


def test_a_stream_refuses_a_long_header_before_it_is_here() -> None:
    def begin(stored: list[StoredTensor]) -> list[torch.Tensor]:
        raise AssertionError("it began")

    with pytest.raises(WeightsRejectedError, match="broken header"):
        TensorStream(begin).feed((16 * 2**20 + 1).to_bytes(8, "little"))
    stream = TensorStream(begin)
    stream.feed((16 * 2**20).to_bytes(8, "little"))
    with pytest.raises(WeightsRejectedError, match="no whole header"):
        stream.finish()
