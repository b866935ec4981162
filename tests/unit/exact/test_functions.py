"""What `exact.functions` claims of torch's functions, and what the rules make of any others, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.unit.exact.shared import Sharing, random_inputs
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowroll.exact.functions import ELEMENTWISE, POINTWISE, named

# Odd sizes, whole vectors, and sizes at which torch divides a batch among threads but not a sample.
SHAPES = [(1, 7, 5), (1, 9, 11), (1, 16, 256), (1, 110, 256), (2, 3, 64), (1, 1, 40000)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arguments_of(function: Callable[..., Any], x: Tensor) -> tuple[Any, ...] | None:
    """Arguments that the function takes: one, two or three tensors; None where it takes none of these."""
    for arguments in ((x,), (x, x.flip(-1)), (x, x.flip(-1), x * 0.5)):
        try:
            result = function(*arguments)
        except (TypeError, RuntimeError):
            continue
        if isinstance(result, Tensor):
            return arguments
    return None


# One of each name: torch's function, the method and `torch.nn.functional` share a kernel.
FUNCTIONS = {named(one): one for one in sorted(ELEMENTWISE | POINTWISE | {torch.rsqrt, torch.square}, key=repr)}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@torch.no_grad()
def test_element_wise_functions_have_every_samples_bits(name: str, threads: int) -> None:
    function, covered = FUNCTIONS[name], 0
    for dtype in DTYPES:
        for shape in SHAPES:
            inputs = random_inputs(5, *shape, dtype=dtype)
            # Numbers, or truth values where the function takes no numbers.
            prepare = next((one for one in (lambda x: x, lambda x: x > 0) if arguments_of(function, one(inputs[0]["x"]))), None)
            if prepare is None:
                continue
            number = len(arguments_of(function, prepare(inputs[0]["x"])) or ())

            def compute(x: Tensor, prepare: Any = prepare, number: int = number) -> Tensor:
                y = prepare(x)
                return function(*(y, y.flip(-1), y)[:number])  # type: ignore[no-any-return]

            sharing = Sharing(compute)
            assert sharing.is_exact(inputs), (dtype, shape)
            assert sharing.shares(), (dtype, shape)
            covered += 1
    assert covered


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "amax": lambda x: x.amax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], torch.full(x.shape[-1:], 0.7, dtype=x.dtype)),
    "norm over other rows": lambda x: x.transpose(1, 2).mean(-1),
    "complex product": lambda x: torch.view_as_real(
        torch.complex(x.float(), x.float().flip(-1)) * torch.complex(x.float(), x.float())
    ),
}


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_reductions_of_rows_have_every_samples_bits(name: str, threads: int) -> None:
    for dtype in DTYPES:
        for shape in [*SHAPES, (1, 1, 33000), (1, 33, 1000)]:
            sharing = Sharing(ROWS[name])
            assert sharing.is_exact(random_inputs(3, *shape, dtype=dtype)), (dtype, shape)
            assert sharing.shares(), (dtype, shape)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_is_merged_only_where_it_changes_nothing(masked: bool) -> None:
    """One head, and one block of queries on two threads: whole batches have other bits, with a mask and without."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mask = torch.tensor([True, True, True, False, True]).view(1, 1, 1, 5)

        def attend(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                x, x * 0.5, x + 1, attn_mask=mask.expand(len(x), -1, -1, -1) if masked else None
            )

        inputs = random_inputs(5, 1, 1, 5, 64)
        sharing = Sharing(attend)
        assert sharing.is_exact(inputs) and sharing.shares()
        merged = attend(torch.cat([one["x"] for one in inputs]))
        if torch.equal(merged, torch.cat([attend(**one) for one in inputs])):
            pytest.skip("on this CPU the whole batch has the same bits, so nothing was shown")
    finally:
        torch.set_num_threads(before)


class AttentionBatches(TorchFunctionMode):
    """Notes how many entries every call of attention has; entered before the modes of `exact`, it sees what those compute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_with_a_mask_runs_per_sample_where_plain_attention_is_merged(masked: bool) -> None:
    """The probe asks about plain attention alone, so its answer says nothing about attention with a mask."""
    mask = torch.tensor([True, True, False, True] * 16).view(1, 1, 1, 64)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 0.5, x + 1, attn_mask=mask.expand(len(x), -1, -1, -1) if masked else None)

    inputs, sharing = random_inputs(2, 1, 4, 64, 64), Sharing(attend)
    assert sharing.is_exact(inputs) and sharing.shares()
    with AttentionBatches() as batches:
        sharing.forwards.outputs(sharing.model, inputs)
    assert batches.found == ([1, 1] if masked else [2])


SLOW: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: x @ torch.linspace(-1, 1, 60, dtype=x.dtype).view(10, 6),
    "einsum": lambda x: torch.einsum("bsd,de->bse", x, torch.linspace(-1, 1, 60, dtype=x.dtype).view(10, 6)),
    "conv1d": lambda x: F.conv1d(x, torch.linspace(-1, 1, 54, dtype=x.dtype).view(3, 6, 3)),
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(dim=1).values,
}


@pytest.mark.parametrize("name", SLOW)
@torch.no_grad()
def test_functions_that_need_each_sample_by_itself_are_still_shared(name: str) -> None:
    """The rest of the model's forward is one for all samples."""
    for dtype in DTYPES:
        sharing = Sharing(SLOW[name])
        assert sharing.is_exact(random_inputs(3, 2, 6, 10, dtype=dtype))
        assert sharing.shares()


@torch.no_grad()
def test_a_sample_that_is_computed_by_itself_lies_as_it_does_alone() -> None:
    """Products of few rows have other bits where the rows do not lie at a multiple of 16 bytes."""
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    inputs = random_inputs(8, 1, 1, 10)
    batch = torch.cat([one["x"] for one in inputs])
    sharing = Sharing(lambda x: F.linear(x, weight))
    assert sharing.is_exact(inputs) and sharing.shares()
    in_place = [F.linear(part, weight) for part in batch.split(1)]
    if all(map(torch.equal, in_place, [F.linear(part.clone(), weight) for part in batch.split(1)])):
        pytest.skip("on this CPU the address does not change a bit, so nothing was shown")


BREAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over the batch": lambda x: x - x.mean(0, keepdim=True),
    "length of the batch": lambda x: x / x.shape[0],
    "first entry": lambda x: x + x[0],
    "only the first row of a mask": lambda x: x * _mask(x, 0),
    "only the last row of a mask": lambda x: x * _mask(x, -1),
    "batch among the rows": lambda x: x.transpose(0, 1).contiguous().softmax(1).transpose(0, 1),
    "one number": lambda x: x * x.sum(),
    "a number read": lambda x: x * x.max().item(),
    "a choice by data": lambda x: x + 1 if bool((x > 2).any()) else x - 1,
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "in place through a view": lambda x: _write_through_a_view(x),
    "an output argument": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "rolled batch": lambda x: x.roll(1, 0) + x,
    "rows one by one": lambda x: torch.stack([row.tanh() for row in x]),
    "halves of the batch": lambda x: torch.cat([part * (index + 1) for index, part in enumerate(x.chunk(2))]),
    "an index of the batch": lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    "squeezed": lambda x: x.squeeze() * 2 + x,
    "scripted": lambda x: _scripted(x) * x,
}


def _mask(x: Tensor, row: int) -> Tensor:
    mask = torch.ones(x.shape[0], 1, 1)
    mask[row] = 0
    return mask


def _write_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :1].zero_()
    return y


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * x


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", BREAKING)
@torch.no_grad()
def test_what_mixes_samples_or_writes_ends_exact(name: str, rows: int) -> None:
    """Shared where a proof is at hand, alone otherwise."""
    for count in (2, 3):
        assert Sharing(BREAKING[name]).is_exact(random_inputs(count, rows, 6, 10))


@torch.no_grad()
def test_random_draws_are_not_shared_and_leave_the_generator_alone() -> None:
    """Unseen draws, that change no number, among them."""
    inputs = random_inputs(2, 1, 4, 8)
    draws: list[Callable[[Tensor], Tensor]] = [lambda x: x + 0 * torch.rand(1), lambda x: F.dropout(x, 0.5)]
    for draw in draws:
        sharing = Sharing(draw)
        torch.manual_seed(5)
        for one in inputs:
            sharing.model.compute(**one)
        drawn = torch.get_rng_state()
        for _ in range(2):
            torch.manual_seed(5)
            sharing.forwards.outputs(sharing.model, inputs)  # type: ignore[arg-type]
            assert not sharing.shares() and torch.equal(torch.get_rng_state(), drawn)


@torch.no_grad()
def test_a_function_without_a_rule_runs_per_sample_and_is_named() -> None:
    """So that a family that calls one does not become slow unseen."""
    sharing = Sharing(lambda x: torch.special.i0(x))
    assert sharing.is_exact(random_inputs(3, 1, 4, 7))
    assert [notes.without_rule for notes in sharing.analyses] == [{"special_i0"}]
    # One forward, in which the function runs three times.
    assert sharing.model.lengths[-1] == 3


@pytest.mark.parametrize(("rows", "heads"), [(1, 4), (3, 4), (5, 4), (37, 4), (911, 3)])
@torch.no_grad()
def test_a_table_that_all_heads_share_turns_every_row_alike(rows: int, heads: int, threads: int) -> None:
    """Rotary embeddings of widths that are no whole vectors: the innermost loop is one head of one row.

    Two threads part the last of these cases within a head.
    """
    table = torch.polar(torch.ones(rows, 1, 12), torch.randn(rows, 1, 12, generator=torch.Generator().manual_seed(1)))

    def turn(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * table)

    for count in (2, 5):
        sharing = Sharing(turn)
        assert sharing.is_exact(random_inputs(count, 1, rows, heads, 12, 2)) and sharing.shares()
        assert threads > 1 or [way for _, way in sharing.analyses[0].steps if way is not None] == []
