"""The real code at real width on a fake CUDA device: nothing waits, nothing is elsewhere, and nothing costs more than recorded.

`make test` takes two blocks of each model and the group of 16 at 1024 x 1024; `make proofs` all blocks and every layout. The
budget is the record of the last `python -m benchmarks.rehearsal`; a change that makes a step cost more is made on purpose.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rehearsal import tables
from benchmarks.rehearsal.__main__ import FULL, GROUP, QUICK
from benchmarks.rehearsal.device import CUDA, NoFakeDeviceError, fake_cuda
from benchmarks.rehearsal.figures import RECORDED, Case, measure, read_recorded
from benchmarks.rehearsal.meter import DeviceFaultError, Meter
from benchmarks.rehearsal.models import MODELS
from benchmarks.rehearsal.waits import WAITS
from tests.docs.blocks import ROOT
from tests.processors import load_without_torchvision

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor is deprecated")

# Billions of the transformer, as the models' cards say: Qwen-Image "20B", Z-Image "6B", Stable Diffusion 3.5 "8.1 billion" and
# "2.5 billion".
TRANSFORMERS = {"Qwen-Image": 20.4, "Z-Image": 6.15, "SD3.5 large": 8.1, "SD3.5 medium": 2.5}
# Stable Diffusion's table of positions is counted in the published numbers, and is no parameter: side x side x width.
TABLES = {"SD3.5 large": 192 * 192 * 2432, "SD3.5 medium": 384 * 384 * 1536}
# Of the text encoders: Qwen2.5-VL "8.29B", Qwen3-4B "4.0B", CLIP L 0.123, CLIP G 0.695 and T5-XXL's encoder 4.76. The VAE, with
# which they are counted, has 0.13 at most.
ENCODERS = {"Qwen-Image": 8.29, "Z-Image": 4.0, "SD3.5 large": 5.58, "SD3.5 medium": 5.58}
# What may be above the record: an allocation that another version of a library makes.
MEMORY = 1.01
MOST = ("kernels", "plain_kernels", "gathered")
MOST_BYTES = ("rolling", "decode", "updating", "asleep", "recorded", "moved")


def rows(cases: list[Case], *marks: pytest.MarkDecorator) -> list[Any]:
    return [
        pytest.param(case, id=f"{case.model}-{case.layers or 'all'}-{case.size}-{case.batch}-{case.layout}", marks=marks)
        for case in cases
    ]


# `make test` has one of each layout: a group on one rank, and the first rank of the others.
ALONE, OTHERS = ([case for case in QUICK if (case.layout == "1") is is_alone] for is_alone in (True, False))
FIRST = [case for case in ALONE if case.size == 1024][:1] + OTHERS[::4]


@pytest.mark.parametrize(
    "case",
    [*rows(FIRST), *rows([case for case in QUICK if case not in FIRST], pytest.mark.slow), *rows(FULL, pytest.mark.proof)],
)
def test_a_life_on_the_device_costs_no_more_than_recorded(case: Case, tmp_path: Path) -> None:
    load_without_torchvision()
    try:
        found = measure(case, tmp_path / "checkpoint")
    except NoFakeDeviceError as error:
        pytest.skip(f"no rehearsal: {error}")
    budget = read_recorded()[case]
    above = [name for name in MOST if getattr(found, name) > getattr(budget, name)]
    above += [name for name in MOST_BYTES if getattr(found, name) > MEMORY * getattr(budget, name)]
    assert not above, f"{above} of {found} are above those of {budget}: python -m benchmarks.rehearsal records new ones"
    assert "step" not in found.waits
    if case.layout == "1":
        assert found.flops == pytest.approx(found.expected_flops, rel=0.02)


def test_the_host_may_not_wait_in_a_step() -> None:
    assert "step" not in WAITS
    assert all(reason for places in WAITS.values() for reason in places.values())


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_page_shows_what_was_recorded(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    name, lines = tables.PAGES[page]
    assert tables.page_with(text, name, list(lines(read_recorded()))) == text


def test_every_case_is_recorded() -> None:
    assert list(read_recorded()) == [*QUICK, *FULL]
    assert json.loads(RECORDED.read_text())


@pytest.mark.parametrize("model", [model.name for model in MODELS])
def test_the_recorded_models_have_the_published_numbers_of_parameters(model: str) -> None:
    one = read_recorded()[Case(model=model, layers=None, size=1024, batch=GROUP, layout="1")]
    table = TABLES.get(model, 0)
    assert (one.parameters + table) / 1e9 == pytest.approx(TRANSFORMERS[model], rel=0.02)
    # Two bytes each.
    assert ENCODERS[model] * 0.98 < one.others / 2e9 - table / 1e9 < ENCODERS[model] * 1.02 + 0.13


@pytest.fixture
def meter() -> Any:
    try:
        with fake_cuda() as fake, fake, Meter(fake) as found:
            yield found
    except NoFakeDeviceError as error:
        pytest.skip(f"no rehearsal: {error}")


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x: torch.zeros(2).to(CUDA, non_blocking=True),
        lambda x: x * torch.tensor(2.0),
        lambda x: x[[0, 1]],
    ],
    ids=["item", "bool", "cpu", "equal", "mask", "list", "unpinned", "scalar of the CPU", "index of the CPU"],
)
def test_a_fault_is_seen(meter: Meter, fault: Any) -> None:
    x = torch.zeros(4, device=CUDA)
    with pytest.raises(DeviceFaultError), meter.during("step"):
        fault(x)


def test_copies_that_nobody_waits_for_are_no_fault(meter: Meter) -> None:
    with meter.during("step"):
        arrived = torch.ones(2).pin_memory().to(CUDA, non_blocking=True)
        assert arrived.device == CUDA
        assert torch.equal(arrived.to("cpu", non_blocking=True), torch.zeros(2))
        # Numbers of the host are real.
        assert torch.ones(2).sum().item() == 2


def test_kernels_bytes_and_products_are_counted(meter: Meter) -> None:
    with meter.during("step") as count:
        x, weight = torch.zeros(8, 32, device=CUDA), torch.zeros(16, 32, device=CUDA)
        made = count.kernels
        y = torch.nn.functional.linear(x, weight)
    assert y.shape == (8, 16) and count.kernels == made + 1
    assert count.flops == 2 * 8 * 32 * 16
    assert count.peak == 4 * (8 * 32 + 16 * 32 + 8 * 16) == meter.live
    del x, weight, y
    assert meter.live == 0
