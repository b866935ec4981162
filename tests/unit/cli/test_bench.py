"""`flowroll bench serve` and its file; a real run is in tests/serving/test_loadgen.py."""

from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll.cli import bench
from flowroll.loadgen.report import LoadReport


@pytest.fixture
def command(tmp_path: Path) -> list[Any]:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    flags = ["--prompts", tmp_path / "prompts.txt", "--concurrency", 1, "--num-requests", 1]
    return ["bench", "serve", "--url", "http://127.0.0.1:9", *flags]


def test_a_file_in_no_folder_is_refused_before_the_run(
    command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[object] = []
    monkeypatch.setattr(bench, "_run", lambda *given: runs.append(given))
    assert_one_line_error(run_cli(*command, "--json", tmp_path / "missing/x.json"), "--json must lie in a folder that exists")
    assert not runs


def test_the_figures_are_shown_even_where_they_cannot_be_written(
    command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    counts = dict.fromkeys(("sent", "completed", "rejected", "failed", "rejections"), 0)
    report = LoadReport(seconds=1.0, **counts, errors={}, latency_s={}, stages_s={}, per_second={})
    monkeypatch.setattr(bench, "_run", lambda *given: report)
    shown: list[object] = []
    monkeypatch.setattr(bench, "print_whole", shown.append)
    monkeypatch.setattr(Path, "write_text", refuse)
    result = run_cli(*command, "--json", tmp_path / "x.json")
    assert result.exit_code == 1 and "disk is full" in result.stderr
    assert len(shown) == 1
