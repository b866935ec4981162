"""The load generator's plan and report, which need no server."""

from dataclasses import replace
from itertools import islice

import pytest

from flowroll.errors import InvalidRequestError
from flowroll.loadgen.plan import Load, Mix, arrivals, requests, warmup_requests
from flowroll.loadgen.report import Outcome, percentile, summarize

MIX = Mix(
    prompts=("a", "b"), sizes=((64, 64), (96, 64)), steps=(2, 3), group_sizes=(1, 2), dynamics=("sde", "cps", "ode"), seed=5
)


def test_a_seed_fixes_requests_and_arrivals() -> None:
    first = list(islice(requests(MIX), 50))
    assert first == list(islice(requests(MIX), 50))
    assert first != list(islice(requests(replace(MIX, seed=6)), 50))
    assert first != list(islice(warmup_requests(MIX), 50))
    assert list(islice(arrivals(2.0, 5), 50)) == list(islice(arrivals(2.0, 5), 50)) != list(islice(arrivals(2.0, 6), 50))


def test_every_choice_is_drawn() -> None:
    drawn = list(islice(requests(MIX), 200))
    assert {(params.width, params.height) for params in drawn} == set(MIX.sizes)
    assert {params.num_inference_steps for params in drawn} == set(MIX.steps)
    assert {params.num_outputs_per_prompt for params in drawn} == set(MIX.group_sizes)
    assert {params.sde_type for params in drawn} == set(MIX.dynamics)
    assert {params.prompt for params in drawn} == set(MIX.prompts)


def test_arrivals_come_at_the_rate() -> None:
    times = list(islice(arrivals(4.0, 0), 4000))
    assert times == sorted(times) and 900 < times[-1] < 1100


def test_percentiles_are_nearest_ranks() -> None:
    ten = [float(value) for value in range(1, 11)]
    assert [percentile(ten, percent) for percent in (1, 50, 90, 99, 100)] == [1.0, 5.0, 9.0, 10.0, 10.0]
    assert percentile([3.0], 50) == 3.0


def test_a_report_by_hand() -> None:
    outcomes = [
        Outcome(code="ok", latency_s=4.0, samples=2, steps=6),
        Outcome(code="ok", latency_s=1.0, samples=1, steps=3, rejections=1),
        Outcome(code="queue_full", latency_s=9.0, rejections=2),
        Outcome(code="engine_error", latency_s=9.0),
    ]
    report = summarize(outcomes, 2.0, 100)
    assert (report.sent, report.completed, report.rejected, report.failed, report.rejections) == (4, 2, 1, 1, 3)
    assert report.errors == {"engine_error": 1, "queue_full": 1}
    assert report.latency_s == {"p50": 1.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert report.per_second == {"requests": 1.0, "samples": 1.5, "steps": 4.5, "bytes": 50.0}


@pytest.mark.parametrize(
    "fields", [{}, {"rate": 1.0}, {"rate": 1.0, "concurrency": 1, "num_requests": 1}, {"rate": 0.0, "num_requests": 1}]
)
def test_a_load_that_cannot_be_sent_is_refused(fields: dict) -> None:
    with pytest.raises(InvalidRequestError):
        Load(**fields)
