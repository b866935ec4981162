"""Attention of own rows over everybody's keys: each row with the bits of the whole sequence, whatever the lengths."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowroll.parallel.attention import attend_own_rows, has_last_queries, widen_mask, with_attention
from flowroll.parallel.shards import Shard, shard_rows

PREFIXES = (0, 5, 20, 33, 66)
# Whole sequences that end in blocks of 0 to 4 rows, of 32, 64 and 256 rows a block.
TOTALS = (128, 156, 161, 191, 193, 256, 257, 319, 320, 323, 512, 769, 771, 1056, 1089)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """As diffusers calls it: heads behind rows."""
    rows = [tensor.permute(0, 2, 1, 3) for tensor in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=attn_mask).permute(0, 2, 1, 3)


def own_part(tensor: Tensor, others: int, shard: Shard, *, in_front: bool) -> Tensor:
    start = shard.start + (0 if in_front else others)
    own = tensor[:, start : start + shard.size]
    return torch.cat((own, tensor[:, shard.total :]) if in_front else (tensor[:, :others], own), dim=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("masked", "in_front"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_the_bits_of_the_whole_sequence(dtype: torch.dtype, masked: bool, in_front: bool, threads: int) -> None:
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
                            part = own_part(query, prefix, shard, in_front=in_front)
                            has_end = has_last_queries(shard, part.shape[1], in_front=in_front)
                            own = attend_own_rows(attend, part, key, value, has_end=has_end, **options)
                            expected = own_part(whole, prefix, shard, in_front=in_front)
                            assert torch.equal(own, expected), (total, prefix, ranks, index)
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
    other = with_attention(own, lambda dispatch: lambda value: dispatch(value) + 100)
    assert isinstance(other, Processor) and other is not own
    assert own(1) == 9
    assert other(1) == 209
    assert other(1, twice=False) == 107


def test_a_processor_that_dispatches_otherwise_is_refused() -> None:
    with pytest.raises(LookupError, match=r"SimpleNamespace calls neither dispatch_attention_fn nor F\.scaled"):
        with_attention(
            type("SimpleNamespace", (SimpleNamespace,), {"__call__": lambda self: None})(), lambda dispatch: dispatch
        )


class OlderProcessor:
    """Calls torch's attention with heads before rows, as diffusers' older processors do."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        return F.silu(attended)


def test_a_processor_of_torchs_attention_gets_another_one_of_rows_before_heads() -> None:
    seen = []

    def wrap(attention: Any) -> Any:
        def attend_and_add(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            seen.append((tuple(query.shape), options))
            return attention(query, key, value, **options) + 1

        return attend_and_add

    tensors = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    expected = F.silu(F.scaled_dot_product_attention(*tensors) + 1)
    assert torch.equal(with_attention(OlderProcessor(), wrap)(*tensors), expected)
    assert seen == [((1, 5, 2, 4), {"dropout_p": 0.0, "is_causal": False})]
