"""Running a plan, with processes that need no model."""

import shlex
import sys
from pathlib import Path

import pytest

from flowroll.errors import EngineError
from flowroll.parity.plan import ParityOptions, plan_parity
from flowroll.parity.run import run_parity

LAYOUTS = "sp2,tp2,tp4,cfg2xtp2,cfg2,sp3"
FAKE = (sys.executable, str(Path(__file__).with_name("fake_child.py")))


@pytest.fixture(scope="module")
def make_plan(qwen_checkpoint):
    def make(layouts, modes="sde"):
        options = ParityOptions(
            model=qwen_checkpoint,
            layouts=layouts,
            modes=modes,
            prompt="a fox --fast",
            seed=3,
            size="64",
            steps=2,
            threads=1,
            device="cpu",
        )
        return plan_parity(options)

    return make


@pytest.fixture(scope="module")
def finished(make_plan, tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("parity"), {}

    def look(layout):
        seen[layout.layout] = [path.name for path in folder.glob(".rollouts-*/*")]

    plan = make_plan(LAYOUTS, "sde,ode")
    report = run_parity(plan, folder, on_layout=look, command=FAKE)
    return report, seen, folder


@pytest.fixture
def layout_of(finished):
    return lambda name: next(layout for layout in finished[0].layouts if layout.layout == name)


def test_every_layout_is_in_the_report_in_its_order(finished):
    report, seen, _ = finished
    assert [layout.layout for layout in report.layouts] == list(seen) == LAYOUTS.split(",")
    assert report.is_exact is False


def test_a_healthy_layout_is_exact_beside_broken_ones(layout_of):
    sp2 = layout_of("sp2")
    assert sp2.is_exact and [mode.mode for mode in sp2.modes] == ["sde", "ode"]
    # Two steps of one sample.
    assert sp2.modes[0].received_bytes_per_step == {"sp": 300.0, "cfg": 40.0, "tp": 0.0}
    assert sp2.transformer_bytes == 10


def test_a_killed_process_is_an_error_that_names_the_signal(layout_of):
    tp2 = layout_of("tp2")
    assert tp2.error == "the layout's process must end with every mode done, got its end by signal 9"
    assert tp2.modes == () and not tp2.is_exact


def test_a_process_that_ends_early_is_an_error_with_its_last_words_and_no_folders(layout_of):
    assert layout_of("tp4").error.endswith("got its end with status 1; its last words: no memory left in cuda.cu")


def test_what_a_process_says_of_its_end_goes_before_how_it_ended(layout_of):
    assert layout_of("cfg2xtp2").error == "rank 1 must live, see rank.py."


def test_a_difference_is_found_where_it_is(layout_of):
    cfg2 = layout_of("cfg2")
    assert not cfg2.is_exact and cfg2.error is None
    assert [[tensor.name for tensor in mode.differing] for mode in cfg2.modes] == [["image"], ["image"]]


def test_a_torn_file_keeps_the_modes_before_it(layout_of):
    sp3 = layout_of("sp3")
    assert [mode.mode for mode in sp3.modes] == ["sde"]
    assert sp3.error.startswith("path must be a whole rollout file, got ode-seed-3.safetensors")


def test_an_axis_without_traffic_is_idle(layout_of):
    assert layout_of("sp3").idle_axes == ("sp",)
    assert layout_of("sp2").idle_axes == ()


def test_the_rollouts_of_a_layout_are_gone_once_it_is_compared(finished):
    assert list(finished[1].values()) == [["one-rank"]] * len(finished[1])


def test_nothing_is_left_but_the_result(finished):
    assert list(finished[2].iterdir()) == []


def test_the_report_repeats_the_run_and_names_no_folder(finished, qwen_checkpoint):
    report = finished[0]
    assert report.model == qwen_checkpoint.name
    words = shlex.split(report.command.replace("\\\n", ""))
    assert words[:7] == ["flowroll", "parity", qwen_checkpoint.name, "--layouts", LAYOUTS, "--modes", "sde,ode"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert (flags["--prompt"], flags["--seed"], flags["--size"], flags["--steps"]) == ("a fox --fast", "3", "64x64", "2")
    assert (flags["--guidance-scale"], flags["--dtype"], flags["--threads"]) == ("4", "float32", "1")
    assert str(qwen_checkpoint.parent) not in str(report)
    assert report.configuration["guidance"] == "cfg_norm_rescale, scale 4"


def test_without_one_rank_there_is_nothing_to_compare(make_plan, tmp_path):
    with pytest.raises(EngineError, match=r"one rank must run before .* compared with it, got: .* status 7"):
        run_parity(make_plan("sp2"), tmp_path, command=(sys.executable, "-c", "raise SystemExit(7)"))
