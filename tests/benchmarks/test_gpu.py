"""The script for a GPU, tried out on the CPU with tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import run
from benchmarks.gpu.report import Report

ROOT = Path(__file__).parents[2]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def command(folder: Path, *flags: str) -> dict[str, dict[str, Any]]:
    script = ROOT / "benchmarks" / "gpu" / "run.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["sh", str(script), "--out", str(folder), "--device", "cpu", "--tiny", *flags], check=True, env=environment)
    return {path.stem: read(path) for path in folder.glob("*.json")}


def test_all_stages_together_have_less_than_nine_minutes() -> None:
    assert sum(run.LIMITS.values()) < 9 * 60
    assert all(callable(run.stage_of(name)) for name in run.LIMITS)


def test_a_stage_runs_on_a_cpu_and_tells_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWROLL_CACHE_DIR", str(tmp_path))
    run.run_stage("machine", tmp_path, "cpu", is_tiny=True)
    found = read(tmp_path / "machine.json")
    assert found["state"] == "done" and not found["errors"]
    assert {"host", "kernels", "bfloat16 products"} <= {one["what"] for one in found["results"]}


def test_a_report_keeps_what_was_found_before_an_error(tmp_path: Path) -> None:
    report = Report(tmp_path / "one.json", "one", 60)
    report.add("first", ms=1.5)
    assert read(report.path)["state"] == "running"
    with report.trying("second"):
        raise MemoryError("none left\nmore lines")
    report.skip("third", "there is none")
    report.end()
    found = read(report.path)
    assert found["results"] == [{"what": "first", "ms": 1.5}]
    assert found["skipped"] == [{"what": "third", "why": "there is none"}]
    assert found["state"] == "failed" and found["errors"][0]["error"].endswith("none left")


def test_a_stage_that_takes_too_long_is_ended_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "z_image.json").write_text(json.dumps({"state": "done", "results": [], "skipped": [], "errors": []}))
    monkeypatch.setattr(run, "LIMITS", {"machine": 0.02, "z_image": 60})
    monkeypatch.setattr(run, "ALL", run.LIMITS)
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path), "--device", "cpu", "--tiny"])
    monkeypatch.setenv("FLOWROLL_CACHE_DIR", str(tmp_path))
    run.main()
    assert read(tmp_path / "machine.json")["state"] == "out of time"
    shown = capsys.readouterr().out
    assert "out of time" in shown
    # It was done, so it was left alone.
    assert "z_image        done" in shown


@pytest.mark.proof
def test_every_stage_runs_with_tiny_sizes(tmp_path: Path) -> None:
    found = command(tmp_path)
    assert found.keys() == run.LIMITS.keys()
    for name, report in found.items():
        assert report["state"] == "done", (name, report["errors"])
        assert report["results"]
    assert all(one["is_exact"] for one in found["promises"]["results"])
    skipped = {one["what"]: one["why"] for one in found["qwen_image"]["skipped"]}
    assert "graphs" in skipped["qwen_image, exact, graphs"]
    # Nothing is done again, but what is named.
    stamps = {name: (tmp_path / f"{name}.json").stat().st_mtime_ns for name in run.LIMITS}
    command(tmp_path, "--again", "machine")
    assert [name for name, stamp in stamps.items() if (tmp_path / f"{name}.json").stat().st_mtime_ns != stamp] == ["machine"]
