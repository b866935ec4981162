"""`flowroll bench serve` and its file; runs against real servers are in tests/serving/test_loadgen.py."""

from pathlib import Path
from typing import Any

import pytest
from tests.scripted import scripted_server
from tests.unit.cli.invoking import assert_one_line_error, run_cli

SAMPLE = (200, {"x-flowroll-timing": "denoise;dur=250.0"}, [{"generated_output": 1}])


@pytest.fixture
def flags(tmp_path: Path) -> list[Any]:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    return ["--prompts", tmp_path / "prompts.txt", "--concurrency", 1, "--num-requests", 1, "--warmup", 0]


def test_a_file_in_no_folder_is_refused_before_the_run(flags: list[Any], tmp_path: Path) -> None:
    asked: list[Any] = []
    with scripted_server([SAMPLE], asked) as url:
        result = run_cli("bench", "serve", "--url", url, *flags, "--json", tmp_path / "missing/x.json")
    assert_one_line_error(result, "--json must lie in a folder that exists")
    assert not asked


def test_the_figures_are_shown_even_where_they_cannot_be_written(flags: list[Any]) -> None:
    with scripted_server([SAMPLE], []) as url:
        result = run_cli("bench", "serve", "--url", url, *flags, "--json", "/dev/full")
    assert result.exit_code == 1 and "No space left" in result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["completed", "1"] in rows and ["denoise", "p99", "0.250", "s"] in rows


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--sizes", "512x512,64", "sizes must be WxH separated by commas, got '64'; write 512x512."),
        ("--steps", "1,x", "steps must be integers separated by commas, got '1,x'; write 1,4."),
        ("--group-sizes", "", "group_sizes must be integers separated by commas, got ''; write 1,4."),
    ],
)
def test_a_list_that_is_none_is_refused(flags: list[Any], flag: str, value: str, message: str) -> None:
    assert_one_line_error(run_cli("bench", "serve", "--url", "http://127.0.0.1:9", *flags, flag, value), message)
