"""Attention of own rows over everybody's keys: each row with the bits of the whole sequence, whatever the lengths."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowroll.parallel.attention import attend_own_rows, widen_mask, with_dispatch
from flowroll.parallel.shards import Shard, shard_rows

PREFIXES = (0, 5, 20, 33, 66)
# Whole sequences that end in blocks of 0 to 4 rows, of 32, 64 and 256 rows a block.
TOTALS = (128, 156, 161, 191, 193, 256, 257, 319, 320, 323, 512, 769, 771, 1056, 1089)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """As diffusers calls it: heads behind rows."""
    rows = [tensor.permute(0, 2, 1, 3) for tensor in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=attn_mask).permute(0, 2, 1, 3)


def own_part(tensor: Tensor, prefix: int, shard: Shard) -> Tensor:
    start = prefix + shard.start
    return torch.cat((tensor[:, :prefix], tensor[:, start : start + shard.size]), dim=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_the_bits_of_the_whole_sequence(dtype: torch.dtype, masked: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    try:
        for total in TOTALS if threads == 1 else TOTALS[::3]:
            for prefix in PREFIXES:
                shape = (2 if masked else 1, prefix + total, 2, 16)
                query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
                mask = torch.arange(shape[1])[None, None, None] < torch.tensor([shape[1], shape[1] - 7])[:, None, None, None]
                options: dict[str, Any] = {"attn_mask": mask} if masked else {}
                whole = attend(query, key, value, **options)
                for ranks in (2, 3, 4):
                    for index in range(ranks):
                        if shard := shard_rows(total, index, ranks):
                            own = attend_own_rows(attend, own_part(query, prefix, shard), key, value, shard, **options)
                            assert torch.equal(own, own_part(whole, prefix, shard)), (total, prefix, ranks, index)
    finally:
        torch.set_num_threads(before)


def test_a_mask_over_own_keys_covers_all_keys() -> None:
    rows = Shard((3, 4), 1)
    own = torch.tensor([[True, False, True, True, True, True]])
    assert widen_mask(own, rows, 9).tolist() == [[True, False] + [True] * 7]
    whole = torch.zeros(1, 9, dtype=torch.bool)
    assert widen_mask(whole, rows, 9) is whole


def dispatch_attention_fn(value: int) -> int:
    return value + 1


class Processor:
    """Calls the function of that name, as diffusers' processors do."""

    def __init__(self) -> None:
        self.state = 5

    def __call__(self, value: int, *, twice: bool = True) -> int:
        return dispatch_attention_fn(value) * (2 if twice else 1) + self.state


def test_a_processor_keeps_its_code_and_state_and_gets_another_dispatch() -> None:
    own = Processor()
    other = with_dispatch(own, lambda dispatch: lambda value: dispatch(value) + 100)
    assert isinstance(other, Processor) and other is not own
    assert own(1) == 9
    assert other(1) == 209
    assert other(1, twice=False) == 107


def test_a_processor_that_dispatches_otherwise_is_refused() -> None:
    with pytest.raises(LookupError, match="SimpleNamespace does not call dispatch_attention_fn"):
        with_dispatch(type("SimpleNamespace", (SimpleNamespace,), {"__call__": lambda self: None})(), lambda dispatch: dispatch)
