import pickle

import pytest
import torch

from flowroll.cluster.parcel import Parcel, pack
from flowroll.parallel.shared_memory import SharedMemory

VALUES = {
    "float": torch.arange(6, dtype=torch.float32).view(2, 3),
    "bfloat": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "strided": torch.arange(12, dtype=torch.int64).view(3, 4)[:, ::2],
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(True),
    "text": "beside",
}


def _sent(parcel: Parcel):
    """What arrives: the buffers beside the pickle, as Ray hands them over, which nobody may write to."""
    buffers = []
    body = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    return body, pickle.loads(body, buffers=[bytes(buffer.raw()) for buffer in buffers])


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_value_arrives_as_itself(is_shared: bool):
    _, found = _sent(Parcel(VALUES, is_shared=is_shared))
    assert found["text"] == "beside"
    for name, tensor in VALUES.items():
        if isinstance(tensor, torch.Tensor):
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name], tensor), name


def test_tensors_are_not_part_of_the_pickle():
    body, found = _sent(pack({"large": torch.ones(2**20), "same": None}))
    assert len(body) < 2**12
    assert found["large"].sum() == 2**20


def test_copies_may_be_written_to_and_the_same_tensor_stays_one():
    tensor = torch.zeros(3)
    _, (one, other) = _sent(Parcel((tensor, tensor)))
    one += 1
    assert one is other and tensor.sum() == 0


def test_shared_memory_arrives_as_shared_memory():
    memory = SharedMemory.create(5)
    memory.bytes.copy_(torch.arange(5, dtype=torch.uint8))
    _, found = _sent(Parcel([memory]))
    assert isinstance(found[0], SharedMemory) and torch.equal(found[0].bytes, memory.bytes)
