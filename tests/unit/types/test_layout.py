import pytest

from flowroll.errors import InvalidRequestError
from flowroll.types import Layout


@pytest.mark.parametrize(
    ("name", "layout", "ranks"),
    [
        ("single", Layout(), 1),
        ("sp3", Layout(sp=3), 3),
        ("cfg2", Layout(cfg_parallel=True), 2),
        ("tp2", Layout(tp=2), 2),
        ("sp2xcfg2", Layout(sp=2, cfg_parallel=True), 4),
        ("sp2xcfg2xtp4", Layout(sp=2, cfg_parallel=True, tp=4), 16),
    ],
)
def test_a_layout_has_a_name_that_reads_back(name: str, layout: Layout, ranks: int) -> None:
    assert layout.name == name
    assert Layout.parse(name) == layout
    assert layout.num_ranks == ranks


def test_factors_may_come_in_any_order() -> None:
    assert Layout.parse("tp2xsp4") == Layout(sp=4, tp=2)


@pytest.mark.parametrize("name", ["", "sp", "sp2x", "sp2xsp2", "cfg3", "cfg2cfg2", "dp2", "sp-2", "sp2.0", "2"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="a layout must be a product of spN, tpN and cfg2"):
        Layout.parse(name)


@pytest.mark.parametrize("values", [{"sp": 0}, {"tp": -1}, {"sp": True}])
def test_degrees_below_one_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match="must be an integer >= 1"):
        Layout(**values)


def test_sp0_by_name_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="sp must be an integer >= 1, got 0"):
        Layout.parse("sp0")
