"""N ranks == 1 rank: the layout of the transformer changes no bit, with any number of requests in flight."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.proofs.cases import FAMILIES, Case, cases
from tests.proofs.conftest import AloneOf, RanksOf
from tests.proofs.doors import assert_same_samples, skip_where_refused, together

from flowroll.engine import Engine
from flowroll.engine.runner import rank_group
from flowroll.errors import InvalidRequestError
from flowroll.exact import questions
from flowroll.types import Layout

TWO_RANKS = ("sp2", "cfg2", "tp2")
LARGER = next(case for case in cases(layout="sp2xcfg2") if case.shape == "small")
FIRST_FAMILIES = FAMILIES[:4]


def is_slow(case: Case) -> bool:
    """Whether a case is left to `make proofs`.

    Starting ranks takes long: `make test` has the first families on one layout of two ranks each, and one case of one larger
    layout.
    """
    if case.layout in TWO_RANKS:
        if case.family not in FIRST_FAMILIES:
            return True
        return case.layout != TWO_RANKS[FAMILIES.index(case.family) % len(TWO_RANKS)]
    return case != LARGER


RankCase = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if is_slow(case) else []) for case in cases(layout="!single")],
)


@RankCase
def test_every_sample_has_the_bits_that_it_has_alone_on_one_rank(case: Case, ranks_of: RanksOf, alone_of: AloneOf) -> None:
    engine = ranks_of(case.family, case.dtype, case.layout)
    before = dict(engine.received_bytes)
    answers = together(engine, case.requests)
    for request, answer in zip(case.requests, answers, strict=True):
        assert_same_samples(answer, alone_of(case.family, case.dtype, request))
    assert_shared_out(case, engine, before)


def assert_shared_out(case: Case, engine: Engine, before: Mapping[str, int]) -> None:
    """Something was received on every axis that had work to share, and a rank holds its part of the weights.

    Rows are shared from 64 a rank on, which "small" has for two ranks, and without guidance there are no branches to share.
    """
    layout = engine.info.layout
    shares_rows = layout.sp == 2 or (layout.sp > 2 and not case.shape.startswith("small"))
    scales = [request.get("true_cfg_scale", request["guidance_scale"]) for request in case.requests]
    shares_branches = layout.cfg_parallel and any(scales)
    shared = {"sp": shares_rows, "tp": layout.tp > 1, "cfg": shares_branches}
    moved = {axis for axis, count in engine.received_bytes.items() if count > before.get(axis, 0)}
    assert moved >= {axis for axis, is_shared in shared.items() if is_shared}
    whole = engine.info.parameters * getattr(torch, case.dtype).itemsize
    # The embeddings around the blocks stay whole, and in models this small they are a large part.
    assert engine.info.transformer_bytes < 0.85 * whole if layout.tp > 1 else engine.info.transformer_bytes == whole


def test_a_row_is_skipped_where_the_engine_refuses_its_layout_and_nowhere_else(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, of = checkpoints["z_image"], {"dtype": "bfloat16", "device": "cpu"}
    with pytest.raises(InvalidRequestError):
        skip_where_refused(folder, layout=Layout(tp=7), **of)
    monkeypatch.setattr(questions, "product_keeps_bits_by_columns", lambda *_: False)
    # Another test may have a process group in this process; the engine refuses its layout before it makes one.
    monkeypatch.setattr(rank_group, "check_alone", lambda: None)
    skip_where_refused(folder, layout=Layout(cfg_parallel=True), **of)
    with pytest.raises(InvalidRequestError) as refused:
        Engine(folder, layout=Layout(tp=2), **of)
    with pytest.raises(pytest.skip.Exception) as skipped:
        skip_where_refused(folder, layout=Layout(tp=2), **of)
    assert skipped.value.msg == refused.value.message
    assert "parts have the bits of the whole" in refused.value.message
