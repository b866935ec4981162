"""What `flowroll top` makes of two looks at a server; the rest of it is in tests/serving/test_top.py."""

import io
from typing import Any

import pytest
from rich.console import Console
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll.cli.dashboard import Scrape, frame

INFO: dict[str, Any] = {
    "model": "/models/Z-Image-Turbo",
    "family": "z_image",
    "variant": "turbo",
    "dtype": "bfloat16",
    "device": "cuda:0",
    "layout": {"sp": 2, "tp": 1, "cfg_parallel": True},
    "batching": {"max_running_samples": 32, "max_batch_samples": 16},
    "max_queue": 8,
    "is_paused": False,
    "is_ready": True,
    "weight_version": "17",
    "uptime_s": 3725.0,
}


def scrape(at_s: float, **values: float) -> Scrape:
    """Numbers that grow by themselves with time, and those that are given; a label is written `name__label__value`."""
    lines = []
    for name, value in values.items():
        series, *label = name.split("__")
        lines.append(f'flowroll_{series}{{{label[0]}="{label[1]}"}} {value}' if label else f"flowroll_{series} {value}")
    return Scrape.read("\n".join(["process_resident_memory_bytes 1048576000", *lines]) + "\n", at_s)


def drawn(*scrapes: Scrape, width: int = 120, silent_s: float | None = None, **info: Any) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(frame({**INFO, **info}, scrapes, width=width, silent_s=silent_s))
    return console.file.getvalue()  # type: ignore[attr-defined]


FIRST = scrape(10.0, steps_total=100, ended_requests_total__outcome__completed=4, stage_seconds_total__stage__denoise=1.0)
SECOND = scrape(
    12.0,
    steps_total=600,
    running_samples=8,
    queue_depth=3,
    queue_age_seconds=2.5,
    batch_samples_sum=600,
    batch_samples_count=60,
    ended_requests_total__outcome__completed=8,
    stage_seconds_total__stage__denoise=3.0,
    errors_total__code__queue_full=10,
)


@pytest.mark.parametrize("width", [80, 120])
def test_a_frame_shows_load_rates_stages_and_errors_and_fits_the_terminal(width: int) -> None:
    text = drawn(FIRST, SECOND, width=width)
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.replace("│", " ").split())
    for shown in (
        "Z-Image-Turbo z_image turbo · bfloat16 on cuda:0 · 4 ranks",
        "● ready",
        "running samples 8 of 32",
        "samples a forward 10.0 of 16",
        "waiting requests 3 of 8",
        "longest wait 2.5 s",
        "steps 250 ",
        "requests 2 ",
        "time by stage, last 2 s",
        "denoise 500.0 ms",
        "queue_full 10 5/s",
        "up 1 h 02 min · 8 requests done · weights 17 · 1000.0 MiB resident",
    ):
        assert shown in words, shown


def test_the_state_is_told_apart() -> None:
    assert "● paused" in drawn(FIRST, is_paused=True, is_ready=False)
    assert "● stopping" in drawn(FIRST, is_ready=False)
    assert "● no answer for 3 s" in drawn(FIRST, SECOND, silent_s=3.2)


def test_one_look_has_no_rates_yet_and_an_idle_server_divides_by_nothing() -> None:
    for text in (drawn(FIRST), drawn(FIRST, FIRST), drawn(scrape(0.0), max_queue=0)):
        assert "none so far" in text and "nan" not in text


def test_a_counter_that_a_new_server_began_anew_has_grown_by_what_it_shows() -> None:
    words = drawn(SECOND, scrape(14.0, steps_total=50))
    assert "steps 25 " in " ".join(words.split()) and "samples a forward 0.0" in " ".join(words.split())


def test_bars_and_columns_say_more_with_more() -> None:
    def bar_of(samples: int) -> str:
        (line,) = [line for line in drawn(scrape(1.0, running_samples=samples)).splitlines() if "running samples" in line]
        return line.partition("of 32")[2].split("│")[0].strip()

    assert [bar_of(samples).count("█") for samples in (0, 16, 32, 99)] == [0, 9, 18, 18]
    assert bar_of(17) == "█████████▌"
    totals = [0, 9, 9, 9.001, 13.001, 21.001]
    rows = drawn(*(scrape(float(at_s), steps_total=total) for at_s, total in enumerate(totals))).splitlines()
    assert next(row for row in rows if " steps " in row).rstrip("│ ").endswith("█ ▁▄▇")


def test_no_server_is_one_line() -> None:
    assert_one_line_error(
        run_cli("top", "--url", "http://127.0.0.1:9", "--once"), "the server at http://127.0.0.1:9 must answer"
    )
    assert_one_line_error(run_cli("top", "--url", "nothing"), "base_url must be an http or https URL")
