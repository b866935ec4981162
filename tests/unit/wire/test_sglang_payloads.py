"""Payloads that SGLang 0.5.23 made (tests/data/sglang_push): the oracle for what a bucket's numbers mean."""

import base64
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pickling import flattened, own_segments, pickled, trainer
from torch import Tensor

from flowroll.errors import InvalidRequestError, MalformedRequestError
from flowroll.families.checksums import typed_tensor_checksum
from flowroll.wire.pickled import named_tensors

FOLDER = Path(__file__).parents[2] / "data" / "sglang_push"
KINDS = ["float32", "bfloat16", "mixed"]


def recorded(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record, and the tensors that were put into its bucket."""
    record = json.loads((FOLDER / f"{kind}.json").read_text())
    tensors = {}
    for meta in record["metadata"]:
        dtype = getattr(torch, meta["dtype"].removeprefix("torch."))
        count = torch.Size(meta["shape"]).numel()
        tensors[meta["name"]] = ((torch.arange(count, dtype=torch.float64) - 1.25) * 0.375).reshape(meta["shape"]).to(dtype)
    return record, tensors


@contextmanager
def segment(data: bytes, like: str) -> Iterator[bytes]:
    """A segment like torch's with this data, under a name with other digits than this one."""
    name = re.sub(r"[0-9]", lambda _: random.choice("0123456789"), like)
    path = Path("/dev/shm") / name[1:]
    with path.open("xb") as file:
        file.write(bytes(64) + data)
    try:
        yield name.encode()
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def replayed(kind: str) -> Iterator[tuple[bytes, dict[str, Tensor]]]:
    """A recorded pickle, over a segment that is there, and its tensors."""
    record, tensors = recorded(kind)
    with segment(base64.b64decode(record["flattened_tensor"]), record["segment"]) as name:
        yield base64.b64decode(record["pickle"]).replace(record["segment"].encode(), name), tensors


def received(data: bytes, *, is_flattened: bool = True, module: str = "transformer") -> dict[str, Tensor]:
    found, sent = {}, named_tensors(data, module=module, flattened=is_flattened)
    for name, tensor in sent.pairs:
        found[name] = torch.full(tensor.shape, 9, dtype=tensor.dtype)
        tensor.copy_to(found[name])
    sent.release()
    return found


def assert_same(found: dict[str, Tensor], sent: dict[str, Tensor]) -> None:
    assert found.keys() == sent.keys()
    for name, tensor in sent.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_sglang_made_comes_through_to_the_bit(kind: str) -> None:
    with replayed(kind) as (data, tensors):
        assert_same(received(data), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_our_trainer_of_the_tests_makes_what_sglang_makes(kind: str) -> None:
    record, tensors = recorded(kind)
    bucket = flattened(tensors)
    assert bucket["flattened_tensor"].dtype == torch.uint8
    assert bucket["flattened_tensor"].numpy().tobytes() == base64.b64decode(record["flattened_tensor"])
    made = [{**vars(metadata), "shape": list(metadata.shape), "dtype": str(metadata.dtype)} for metadata in bucket["metadata"]]
    assert made == record["metadata"]
    with trainer(), replayed(kind) as (data, _):
        # But for the names of the segment and of the manager's socket, which differ from process to process.
        assert len(pickled({"transformer": bucket})) - len(data) in range(-8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_of_the_checker_are_sglangs(kind: str) -> None:
    record, tensors = recorded(kind)
    assert {name: typed_tensor_checksum(tensor) for name, tensor in tensors.items()} == record["sha256"]


FLOATS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(5.0).to(torch.bfloat16),
    "c": torch.arange(3.0, dtype=torch.float64),
    "d": torch.tensor(2.5, dtype=torch.float16),
}


@pytest.mark.parametrize("key", [None, "transformer", "vae"])
@pytest.mark.parametrize("form", ["bucket", "list", "tuple", "mapping"])
def test_a_payload_may_be_keyed_by_its_module_or_bare(form: str, key: str | None) -> None:
    with trainer():
        pairs = list(FLOATS.items())
        bare: Any = {"bucket": flattened(FLOATS), "list": pairs, "tuple": tuple(pairs), "mapping": FLOATS}[form]
        data = pickled(bare if key is None else {key: bare})
        assert_same(received(data, is_flattened=form == "bucket", module=key or "vae"), FLOATS)


def test_a_payload_for_another_module_or_for_several_is_refused_and_released() -> None:
    segments = own_segments()
    with trainer():
        bucket = flattened(FLOATS)
        for value in ({"vae": bucket}, {"transformer": bucket, "vae": bucket}, {"vae": bucket, "transformer": bucket}):
            data = pickled(value)
            with pytest.raises(InvalidRequestError, match=r"tensors of transformer, .*target_modules") as refused:
                named_tensors(data, module="transformer", flattened=True)
            assert refused.value.field == "serialized_named_tensors"
        for value in ({}, {"transformer": {}}, {"transformer": {"transformer": bucket}}, {"transformer": list(FLOATS.items())}):
            with pytest.raises(MalformedRequestError):
                named_tensors(pickled(value), module="transformer", flattened=True)
        del bucket, value
    assert own_segments() <= segments


@pytest.mark.parametrize("dtype", ["torch.float32", "float32"])
def test_metadata_may_name_its_dtype_and_list_its_shape(dtype: str) -> None:
    with trainer():
        bucket = flattened({"a": FLOATS["a"]})
        bucket["metadata"][0].dtype, bucket["metadata"][0].shape = dtype, (2, 3)
        assert_same(received(pickled({"transformer": bucket})), {"a": FLOATS["a"]})
