"""A short soak: every promise but those about growth, which need time."""

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.soaking.books import Books, ServerCounts, imbalances
from benchmarks.soaking.watch import slope


@pytest.mark.proof
def test_a_server_keeps_its_promises_through_twenty_seconds_of_mixed_traffic(tmp_path: Path) -> None:
    out = tmp_path / "soak.md"
    flags = [
        "--minutes",
        "0.33",
        "--warm-up",
        "0.08",
        "--no-fill",
        "--check-share",
        "0.5",
        "--families",
        "z_image",
        "--out",
        str(out),
    ]
    run = subprocess.run([sys.executable, "-m", "benchmarks.soak", *flags], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "**no**" not in out.read_text() and out.with_suffix(".png").exists()


@pytest.mark.proof
def test_an_overloaded_server_works_as_much_as_before_and_serves_every_client(tmp_path: Path) -> None:
    out = tmp_path / "overload.md"
    flags = ["--minutes", "0.3", "--capacity-s", "8", "--out", str(out)]
    run = subprocess.run([sys.executable, "-m", "benchmarks.overload", *flags], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr


METRICS = """flowroll_requests_total{code="200",route="/generate"} 2.0
flowroll_requests_total{code="499",route="/rollout/generate"} 3.0
flowroll_requests_total{code="200",route="/health"} 9.0
flowroll_accepted_requests_total 4.0
flowroll_ended_requests_total{outcome="completed"} 2.0
flowroll_ended_requests_total{outcome="failed"} 2.0
flowroll_failed_requests_total{code="cancelled"} 2.0
flowroll_queue_depth 0.0
flowroll_running_requests 0.0
flowroll_running_samples 0.0
"""


def test_books_that_agree_balance_and_a_request_that_nobody_saw_end_does_not() -> None:
    books = Books(sent=5, left_waiting=2, left_sending=1)
    books.answers[200] = 2
    assert imbalances(books, ServerCounts.read(METRICS)) == []
    lost = METRICS.replace("accepted_requests_total 4.0", "accepted_requests_total 5.0")
    assert imbalances(books, ServerCounts.read(lost)) == ["accepted = completed + failed: 5 and 4"]
    books.sent += 1
    assert any("sent = answered" in line for line in imbalances(books, ServerCounts.read(METRICS)))


def test_a_slope_is_that_of_the_line_and_its_interval_holds_it() -> None:
    minutes = [index / 30 for index in range(300)]
    noise = [(index * 7919 % 101) - 50 for index in range(300)]
    found = slope(minutes, [1000 + 12 * minute + each for minute, each in zip(minutes, noise, strict=True)])
    assert found.low < 12 < found.high and found.low > 0
    flat = slope(minutes, [1000.0 + each for each in noise])
    assert flat.low < 0 < flat.high
