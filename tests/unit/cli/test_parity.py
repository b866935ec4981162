import json

import pytest
from tests.unit.cli.invoking import assert_one_line_error, run_cli
from tests.unit.parity.reports import EQUAL, OFF, make_layout, make_mode, make_report

from flowroll.parity import run
from flowroll.sampling.dynamics import DYNAMICS

SMALL = ("--size", 64, "--steps", 2)


@pytest.fixture
def no_process(monkeypatch):
    """An engine that is started fails the test."""

    def refuse(*arguments, **options):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "Engine", refuse)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layouts", "sp2,up2"), "a layout must be a product of spN, tpN and cfg2, got 'up2'"),
        (("--layouts", "cfg3"), "a layout must be a product of spN, tpN and cfg2, got 'cfg3'"),
        (("--layouts", ""), "a layout must be a product of spN, tpN and cfg2, got ''"),
        (("--layouts", "sp2xtp2,tp2xsp2"), "layouts must name each one once, got sp2xtp2 twice; remove one."),
        (("--layouts", "tp7"), "tp must"),
        (("--layouts", "sp4096"), "sp must leave 64 of the largest image"),
        (("--modes", "sde,ddim"), f"modes must be one of {', '.join(DYNAMICS)}, got 'ddim'; choose one of these."),
        (("--modes", "dance,dance_sde"), "modes must name each one once, got dance twice; remove one."),
        (("--modes", "ode,ode"), "modes must name each one once, got ode twice; remove one."),
        (("--size", "64x"), "size must be WIDTHxHEIGHT or one number of pixels, got '64x'; write e.g. 1024x768 or 1024."),
        (("--size", "100x64"), "width must be a multiple of 16 for qwen_image, got 100; use 96 or 112."),
        (("--size", "64x100"), "height must be a multiple of 16 for qwen_image, got 100; use 96 or 112."),
        (("--size", 0), "width must be an integer >= 1, got 0"),
        (("--steps", 0), "num_inference_steps must be an integer >= 1, got 0"),
        (("--steps", 2000), "num_inference_steps must ask for at most 1000 steps, got 2000"),
        (("--seed", -1), "seed must be >= 0, got -1"),
        (("--num-outputs", 0), "num_outputs_per_prompt must be an integer >= 1, got 0"),
        (("--noise-level", 2), "noise_level must be 0 or from 0.0001 to below 2 for cps, got 2"),
        (("--noise-level", 10, "--modes", "sde", "--steps", 50), "noise_level must keep the trajectory within float32, got 10"),
        (("--rollout-noise-level", 2), "noise_level must be 0 or from 0.0001 to below 2 for cps, got 2"),
        (("--noise-level", 1, "--rollout-noise-level", 1), "rollout_noise_level must be given once, got noise_level beside it"),
        (("--guidance-scale", -1), "guidance_scale must be a number from 0 to 1000, got -1"),
        (("--threads", 0), "threads must be at least 1, got 0; use 1."),
        (("--rank-timeout-s", 0), "rank_timeout_s must be a number of seconds above 0, got 0; use e.g. 60."),
        (("--rank-timeout-s", "nan"), "rank_timeout_s must be a number of seconds above 0, got nan; use e.g. 60."),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got tpu"),
        (("--device", "cuda:99"), "device must be on this machine, got cuda:99"),
        (("--variant", "turbo"), "variant must be one of base, shapes for qwen_image, got turbo"),
    ],
)
def test_a_bad_value_is_one_clear_line_before_any_process(words, message, no_process, qwen_checkpoint, tmp_path):
    result = run_cli("parity", qwen_checkpoint, *SMALL, "--device", "cpu", *words, "--out", tmp_path / "out.md")
    assert_one_line_error(result, message)
    assert not (tmp_path / "out.md").exists()


def test_a_folder_that_is_no_checkpoint_is_one_clear_line(no_process, tmp_path):
    assert_one_line_error(run_cli("parity", tmp_path / "nowhere"), "must be a diffusers checkpoint folder")


def test_an_unknown_dtype_is_a_usage_error(no_process, qwen_checkpoint):
    assert run_cli("parity", qwen_checkpoint, "--dtype", "float16").exit_code == 2


@pytest.fixture
def finished_with(monkeypatch, qwen_checkpoint, tmp_path):
    """The command, where the run finds these layouts; and the plan that the run got."""

    def finish(*layouts, words=()):
        plans = []

        def run_parity(plan, on_layout):
            plans.append(plan)
            for layout in layouts:
                on_layout(layout)
            return make_report(*layouts)

        monkeypatch.setattr(run, "run_parity", run_parity)
        return run_cli("parity", qwen_checkpoint, *SMALL, *words, "--out", tmp_path / "report.md"), plans[0]

    return finish


def test_an_exact_run_ends_with_status_0_and_names_its_file(finished_with, tmp_path):
    result, _ = finished_with(make_layout("sp2", make_mode("sde", image=EQUAL)))
    assert result.exit_code == 0, result.output
    assert "**Exact: 1 of 1 layouts** (sp2)." in result.stdout and f"report: {tmp_path / 'report.md'}" in result.stdout
    assert result.stderr == "sp2 exact\n"
    assert (tmp_path / "report.md").read_text().startswith("# Parity of tiny, float32: exact")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_json_is_written_on_demand(finished_with, tmp_path):
    file = tmp_path / "deep" / "report.json"
    result, _ = finished_with(make_layout("sp2", make_mode("sde", image=EQUAL)), words=("--json", file))
    assert result.exit_code == 0 and json.loads(file.read_text())["is_exact"] is True


def test_a_tensor_that_is_not_exact_ends_with_status_1(finished_with, tmp_path):
    healthy, broken = make_layout("sp2", make_mode("sde", image=EQUAL)), make_layout("tp2", make_mode("sde", image=OFF))
    result, _ = finished_with(healthy, broken)
    assert result.exit_code == 1
    assert result.stderr == "sp2 exact\ntp2 not exact\n"
    assert "**Not exact: tp2.** 1 of 1 differ: `image` (sde)." in result.stdout
    assert (tmp_path / "report.md").is_file()


def test_a_layout_that_failed_ends_with_status_1_and_shows_why(finished_with):
    result, _ = finished_with(make_layout("sp2", error="rank 1 must live."))
    assert result.exit_code == 1
    assert "sp2 failed: rank 1 must live." in result.stderr


def test_every_flag_reaches_the_plan(finished_with):
    words = (
        *("--layouts", "sp3,sp2xcfg2", "--modes", "ode,cps", "--prompt", "a red fox", "--seed", 5, "--num-outputs", 2),
        *("--noise-level", 0.25, "--size", "96x64", "--steps", 4, "--guidance-scale", 3, "--dtype", "bfloat16"),
        *("--device", "cpu", "--threads", 2, "--rank-timeout-s", 9, "--variant", "base"),
    )
    _, plan = finished_with(words=words)
    assert [layout.name for layout in plan.layouts] == ["sp3", "sp2xcfg2"]
    assert list(plan.requests) == ["ode", "cps"]
    assert (plan.dtype, plan.device, plan.num_threads, plan.rank_timeout_s, plan.variant) == ("bfloat16", "cpu", 2, 9, "base")
    for mode, params in plan.requests.items():
        assert (params.sde_type, params.prompt, params.seed, params.num_outputs_per_prompt) == (mode, "a red fox", 5, 2)
        assert (params.noise_level, params.width, params.height, params.num_inference_steps) == (0.25, 96, 64, 4)
        assert params.guidance_scale == 3
        assert params.debug_mode and params.return_denoising_env and params.return_dit_trajectory


def test_the_noise_level_has_the_name_that_it_has_everywhere(finished_with):
    _, plan = finished_with(words=("--rollout-noise-level", 0.25))
    assert [params.rollout_noise_level for params in plan.requests.values()] == [0.25, 0.25, 0.25]


def test_what_is_left_open_is_the_familys_and_the_published_comparisons(finished_with):
    _, plan = finished_with()
    assert [layout.name for layout in plan.layouts] == ["sp2", "cfg2", "tp2"]
    assert list(plan.requests) == ["sde", "cps", "ode"]
    assert plan.request.guidance.scale == 4
    params = plan.requests["sde"]
    assert params.prompt.startswith("A fluffy silver-gray cat") and (params.seed, params.noise_level) == (42, 0.5)
