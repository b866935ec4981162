"""The questions that are asked at the start: real kernels answer them, and a layout whose parts differ is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowroll.engine import Engine
from flowroll.engine.runner import rank_group
from flowroll.errors import InvalidRequestError
from flowroll.exact import certificate, findings, probe, questions
from flowroll.exact.certificate import certify, check_shards
from flowroll.exact.findings import Findings
from flowroll.exact.kernels import use_exact_kernels
from flowroll.parallel import shards
from flowroll.types import Layout

CPU, FLOAT32 = torch.device("cpu"), torch.float32
SETTING = (FLOAT32, CPU, 1)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Findings]:
    """A table without answers."""
    found = Findings()
    for module in (certificate, findings):
        monkeypatch.setattr(module, "FINDINGS", found)
    yield found


class Model(nn.Module):
    """A model with one linear, one norm and one attention, as diffusers names them."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.heads, self.inner_dim = 4, width
        self.to_q = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("it was asked again")


def ask_no_more(table: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = table.answer
    monkeypatch.setattr(table, "answer", lambda question, _: answer(question, refuse))


def test_what_was_certified_is_not_asked_in_a_step(monkeypatch: pytest.MonkeyPatch, table: Findings) -> None:
    """The certificate is the probe's table."""
    model = Model()
    found = certify(model, use_exact_kernels(CPU), device=CPU, dtype=FLOAT32)
    assert 0 < found.num_merged < found.num_asked <= found.num_known
    assert found.gradients
    ask_no_more(table, monkeypatch)
    inputs = torch.randn(2, 16, 64)
    alone = torch.cat([model.to_q(inputs[:1]), model.to_q(inputs[1:])])
    assert torch.equal(probe.product(inputs, 2, model.to_q.weight, model.to_q.bias), alone)
    with pytest.raises(AssertionError, match="asked again"):
        probe.product(torch.randn(2, 17, 64), 2, model.to_q.weight, model.to_q.bias)


def test_nothing_is_asked_twice(monkeypatch: pytest.MonkeyPatch, table: Findings) -> None:
    kernels = use_exact_kernels(CPU)
    first = certify(Model(), kernels, device=CPU, dtype=FLOAT32)
    ask_no_more(table, monkeypatch)
    again = certify(Model(), kernels, device=CPU, dtype=FLOAT32)
    assert replace(again, seconds=0) == replace(first, seconds=0)
    assert len(table) == first.num_known


def test_shapes_that_take_long_are_left_to_the_first_meeting() -> None:
    few = certify(Model(), use_exact_kernels(CPU), device=CPU, dtype=FLOAT32)
    large = nn.Linear(8192, 8192, device="meta")
    assert certify(large, use_exact_kernels(CPU), device=CPU, dtype=FLOAT32).num_asked < few.num_asked


@pytest.mark.parametrize(
    ("ask", "about", "is_same"),
    [
        # Kernels of one row sum in another order than those of several.
        (questions.product_keeps_bits_by_rows, (2, 2, (64, 64, True)), False),
        (questions.product_keeps_bits_by_rows, (128, 2, (64, 64, True)), True),
        (questions.product_keeps_bits_by_columns, (64, 2, (64, 64, True)), True),
        (questions.attention_keeps_bits_by_rows, (165, 2, (4, 16)), True),
        (questions.mean_keeps_bits_by_rows, (165, 2, 64), True),
        (questions.product_keeps_bits_with_gradients, (16, (64, 64, True)), True),
        (questions.attention_keeps_bits_with_gradients, (64, (4, 16)), True),
    ],
)
def test_real_kernels_answer(
    ask: Callable[..., bool], about: tuple[Any, ...], is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if about[0] == 2:
        monkeypatch.setattr(shards, "MIN_ROWS", 1)
        monkeypatch.setattr(shards, "ROW_UNIT", 1)
    assert ask(*about, SETTING) is is_same


def test_kernels_that_change_with_gradients_are_found() -> None:
    def linear(inputs: Tensor, weight: Tensor) -> Tensor:
        return F.linear(inputs, weight) if not torch.is_grad_enabled() else F.linear(inputs[:, :1], weight).expand(-1, 4, -1)

    inputs, weight, _ = probe.cancelling_product(torch.Size((1, 4, 64)), torch.Size((64, 64)), FLOAT32, CPU)
    assert not questions._alike_with_gradients(linear, inputs, weight)
    assert questions._alike_with_gradients(F.linear, inputs, weight)


def test_means_of_few_rows_run_per_sample_where_a_kernel_sums_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels of a GPU do below 16 rows."""
    mean = Tensor.mean

    def otherwise(rows: Tensor, dim: int | None = None) -> Tensor:
        if dim is None:
            return mean(rows)
        return mean(rows if rows.shape[:-1].numel() >= 16 else rows.flip(-1), dim)

    rows = torch.randn(4, 8, 64)
    assert probe.rows_are_independent(rows, 4)
    monkeypatch.setattr(Tensor, "mean", otherwise)
    monkeypatch.setattr(findings, "FINDINGS", Findings())
    assert not probe.rows_are_independent(rows, 4)
    assert probe.rows_are_independent(torch.randn(4, 16, 64), 4)


@pytest.mark.parametrize(("layout", "axis"), [(Layout(sp=2), "sp"), (Layout(tp=2), "tp")])
def test_a_layout_whose_parts_have_other_bits_is_refused(layout: Layout, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks would agree with each other, and be wrong together."""
    check_shards(Model(), layout, ("to_q",), device=CPU, dtype=FLOAT32)
    monkeypatch.setattr(certificate, "_SCOPES", {"cpu": certificate._Scope((1, 64), (2,), 1e9, 1e9, 2**22)})
    name = "product_keeps_bits_by_rows" if axis == "sp" else "product_keeps_bits_by_columns"
    monkeypatch.setattr(questions, name, lambda *_: False)
    with pytest.raises(InvalidRequestError, match=rf"{axis} must be a degree whose parts .* use {axis}=1") as refused:
        check_shards(Model(), layout, ("to_q",), device=CPU, dtype=FLOAT32)
    assert refused.value.field == axis


def test_attention_without_the_rule_of_its_last_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind 33 rows of text every shard ends in a block of one row, which other kernels compute."""

    def plain(dispatch: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **_: bool) -> Tensor:
        return dispatch(query, key, value)

    assert questions.attention_keeps_bits_by_rows(128, 2, (4, 16), SETTING)
    monkeypatch.setattr(questions, "attend_own_rows", plain)
    assert not questions.attention_keeps_bits_by_rows(128 + 32, 2, (4, 16), SETTING)


def test_an_engine_refuses_it_before_a_process_is_started(z_image_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "RankProcesses", refuse)
    monkeypatch.setattr(questions, "mean_keeps_bits_by_rows", lambda *_: False)
    with pytest.raises(InvalidRequestError, match="sp must be a degree whose parts have the bits of the whole"):
        Engine(z_image_checkpoint, device="cpu", layout=Layout(sp=2))
