"""Running a plan, with engines that need no model."""

import shlex
from types import SimpleNamespace

import pytest
from tests.factories import make_rollout

from flowroll import SamplingParams
from flowroll.errors import EngineError, RankLostError
from flowroll.parity import run
from flowroll.parity.plan import plan_parity
from flowroll.parity.run import run_parity

LAYOUTS = "sp2,tp2,tp4,cfg2,sp3"
PARAMS = SamplingParams(prompt="a fox --fast", seed=3, width=64, height=64, num_inference_steps=2)


class FakeEngine:
    """Answers with made-up rollouts, or fails in the way of its layout."""

    def __init__(self, model, *, layout, **options):
        self.name = layout.name
        if self.name == "tp4":
            raise MemoryError("no memory left in /some/where/cuda.cu")
        self.info = SimpleNamespace(transformer_bytes=10)
        self.received_bytes = {"sp": 0, "cfg": 0, "tp": 0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def rollout(self, params):
        if self.name == "tp2" and params.sde_type == "ode":
            raise RankLostError("rank 1 must live, see /some/where/rank.py.")
        self.received_bytes |= {"sp": self.received_bytes["sp"] + (0 if self.name == "sp3" else 600)}
        rollout = make_rollout(seed=3, steps=2)
        if self.name == "cfg2":
            rollout.image[0, 0, 0, 0] += 1
        return [rollout]


@pytest.fixture(scope="module")
def plan(qwen_checkpoint):
    return plan_parity(qwen_checkpoint, PARAMS, layouts=LAYOUTS, modes="sde,ode", device="cpu", threads=1)


@pytest.fixture(scope="module")
def finished(plan):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Engine", FakeEngine)
        return run_parity(plan, on_layout=seen.append), seen


@pytest.fixture
def layout_of(finished):
    return lambda name: next(layout for layout in finished[0].layouts if layout.layout == name)


def test_every_layout_is_in_the_report_in_its_order(finished):
    report, seen = finished
    assert [layout.layout for layout in report.layouts] == [layout.layout for layout in seen] == LAYOUTS.split(",")
    assert report.is_exact is False and report.one_rank.tensors == ()


def test_a_healthy_layout_is_exact_beside_broken_ones(layout_of):
    sp2 = layout_of("sp2")
    assert sp2.is_exact and {tensor.mode for tensor in sp2.tensors} == {"sde", "ode"}
    # Two modes with two steps of one sample each.
    assert sp2.received_bytes == {"sp": 300.0, "cfg": 0.0, "tp": 0.0}
    assert sp2.transformer_bytes == 10


def test_a_layout_that_fails_keeps_the_modes_before_it_and_names_no_folder(layout_of):
    assert layout_of("tp2").error == "rank 1 must live, see rank.py."
    assert {tensor.mode for tensor in layout_of("tp2").tensors} == {"sde"}
    assert layout_of("tp4").error == "MemoryError: no memory left in cuda.cu"
    assert not layout_of("tp2").is_exact and not layout_of("tp4").is_exact


def test_a_difference_is_found_where_it_is(layout_of):
    cfg2 = layout_of("cfg2")
    assert not cfg2.is_exact and cfg2.error is None
    assert [(tensor.mode, tensor.name) for tensor in cfg2.differing] == [("sde", "image"), ("ode", "image")]


def test_an_axis_without_traffic_is_idle(layout_of):
    assert layout_of("sp3").idle_axes == ("sp",)
    assert layout_of("sp2").idle_axes == ()


def test_the_report_repeats_the_run_and_names_no_folder(finished, qwen_checkpoint):
    report = finished[0]
    words = shlex.split(report.commands["this run"].replace("\\\n", ""))
    assert words[:5] == ["flowroll", "parity", qwen_checkpoint.name, "--layouts", LAYOUTS]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert (flags["--prompt"], flags["--seed"], flags["--size"], flags["--steps"]) == ("a fox --fast", "3", "64x64", "2")
    assert (flags["--guidance-scale"], flags["--dtype"], flags["--threads"]) == ("4", "float32", "1")
    assert str(qwen_checkpoint.parent) not in str(report)
    assert report.setting["guidance"] == "cfg_norm_rescale, scale 4"


def test_a_run_with_two_scales_is_repeated_with_both(checkpoints):
    params = SamplingParams(prompt="a", seed=1, guidance_scale=2.5, true_cfg_scale=4, negative_prompt="blurry or dark")
    plan = plan_parity(checkpoints["flux"], params, layouts="cfg2", modes="ode", device="cpu", dtype="float32")
    words = shlex.split(run.command_line(plan).replace("\\\n", ""))
    for flag, value in (("guidance-scale", "2.5"), ("true-cfg-scale", "4"), ("negative-prompt", "blurry or dark")):
        assert words[words.index(f"--{flag}") + 1] == value
    assert run._setting(plan)["guidance"] == "true_cfg, scale 4; the model's own scale 2.5"


def test_the_command_for_gpus_is_there_too(finished):
    [command] = [text for what, text in finished[0].commands.items() if "GPUs" in what]
    assert "--size 1024 --variant base --dtype bfloat16 --device cuda" in command and "--threads" not in command


def test_without_one_rank_there_is_nothing_to_compare(plan, monkeypatch):
    class Broken(FakeEngine):
        def rollout(self, params):
            raise RankLostError("it broke.")

    monkeypatch.setattr(run, "Engine", Broken)
    with pytest.raises(EngineError, match=r"one rank must run before .* compared with it, got: it broke"):
        run_parity(plan, on_layout=print)
