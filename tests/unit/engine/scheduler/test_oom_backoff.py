"""How many samples fit into one forward."""

import pytest
import torch

from flowroll.engine.scheduler.policy import OomBackoff, is_out_of_memory


def test_what_ran_out_of_memory_is_halved_until_it_fits_and_tried_again_after_a_while() -> None:
    room = OomBackoff()
    assert room.most("a", 16) == 16
    room.ran_out("a", 16)
    room.ran_out("a", 8)
    assert (room.most("a", 16), room.most("a", 3), room.most("b", 16)) == (4, 3, 16)
    for _ in range(63):
        room.went_well("a", 4)
        room.went_well("a", 3)  # says nothing about four
    assert room.most("a", 16) == 4
    room.went_well("a", 4)
    assert room.most("a", 16) == 8
    for _ in range(64):
        room.went_well("a", 8)
    assert room.most("a", 16) == 16 and room.most("a", 100) == 100


def test_a_second_failure_at_a_size_that_was_tried_again_counts_as_the_first() -> None:
    room = OomBackoff()
    room.ran_out("a", 16)
    for _ in range(63):
        room.went_well("a", 8)
    room.ran_out("a", 8)
    assert room.most("a", 16) == 4
    for _ in range(64):
        room.went_well("a", 4)
    assert room.most("a", 16) == 8, "of the 16 that failed first"


def test_an_odd_batch_is_halved_upwards_and_never_to_nothing() -> None:
    room = OomBackoff()
    room.ran_out("a", 3)
    assert room.most("a", 16) == 2
    room.ran_out("a", 2)
    assert room.most("a", 16) == 1


def test_a_server_that_meets_many_shapes_remembers_the_latest() -> None:
    room = OomBackoff()
    for key in range(300):
        room.ran_out(key, 8)
    assert room.most(0, 8) == 8 and room.most(299, 8) == 4
    assert len(room._learned) == 256


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("allocate memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_on_a_device_and_on_the_host(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
