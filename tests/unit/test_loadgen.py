"""The load generator's plan, reading of answers and report, which need no server."""

import json
from dataclasses import replace
from itertools import islice

import msgspec
import pytest

from flowroll.errors import InvalidRequestError
from flowroll.loadgen.answer import UNKNOWN, error_code, sample_counter, stages_of
from flowroll.loadgen.plan import DRAWN, Load, Mix, arrivals, requests, values_of, warmup_requests
from flowroll.loadgen.report import Outcome, Tally, percentile

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


def test_all_that_is_drawn_or_given_is_sent_and_nothing_else() -> None:
    mix = replace(MIX, fixed={"return_dit_trajectory": True, "noise_level": 0.7})
    sent = values_of(next(requests(mix)), mix)
    assert set(sent) == {*DRAWN, "return_dit_trajectory", "noise_level"}
    assert sent["return_dit_trajectory"] is True and None not in sent.values()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": ()},
        {"prompts": ("a", "b" * 100_001)},
        {"steps": (4, 0)},
        {"group_sizes": (0,)},
        # Allowed for sde, not for cps.
        {"fixed": {"noise_level": 2.0}},
    ],
)
def test_a_mix_is_refused_for_one_request_that_it_could_draw(fields: dict) -> None:
    with pytest.raises(InvalidRequestError):
        replace(MIX, **fields)


def test_arrivals_come_at_the_rate() -> None:
    times = list(islice(arrivals(4.0, 0), 4000))
    assert times == sorted(times) and 900 < times[-1] < 1100


def test_percentiles_are_nearest_ranks() -> None:
    ten = [float(value) for value in range(1, 11)]
    assert [percentile(ten, percent) for percent in (1, 50, 90, 99, 100)] == [1.0, 5.0, 9.0, 10.0, 10.0]
    assert percentile([3.0], 50) == 3.0


def test_a_report_by_hand() -> None:
    tally = Tally()
    for outcome in (
        Outcome(status=200, code="ok", latency_s=4.0, samples=2, steps=6, received_bytes=70, stages={"queue": 3.0}),
        Outcome(status=200, code="ok", latency_s=1.0, samples=1, steps=3, received_bytes=20, rejections=1),
        Outcome(status=429, code="queue_full", latency_s=9.0, received_bytes=10, rejections=2),
        Outcome(status=500, code="engine_error", latency_s=9.0),
        Outcome(status=None, code="ConnectError", latency_s=9.0),
    ):
        tally.add(outcome)
    report = tally.report(2.0)
    assert (report.sent, report.completed, report.rejected, report.failed, report.rejections) == (5, 2, 1, 2, 3)
    assert report.errors == {"500 engine_error": 1, "429 queue_full": 1, "no answer ConnectError": 1}
    assert report.latency_s == {"p50": 1.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert report.stages_s == {"queue": {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0}}
    assert report.per_second == {"requests": 1.0, "samples": 1.5, "steps": 4.5, "bytes": 50.0}


def test_a_report_of_nothing_has_no_latency() -> None:
    report = Tally().report(0.0)
    assert (report.sent, report.latency_s, report.stages_s, report.per_second["bytes"]) == (0, {}, {}, 0.0)


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 16])
@pytest.mark.parametrize("count", [0, 1, 3, 20, 70_000])
def test_samples_are_counted_as_an_answer_passes_by(count: int, piece_bytes: int) -> None:
    # A prompt that looks like the key, and one that is it.
    sample = {"prompt": '"generated_output":', "generated_output": {"data": "generated_output"}}
    answer = [sample] * count if count < 100 else [0] * count
    bodies = {"application/msgpack": msgspec.msgpack.encode(answer)}
    if count < 100:
        bodies["application/json; charset=utf-8"] = json.dumps(answer, indent=1).encode()
    for content_type, body in bodies.items():
        counter = sample_counter(content_type)
        for start in range(0, len(body), piece_bytes):
            counter.add(body[start : start + piece_bytes])
        assert counter.total() == count


@pytest.mark.parametrize(
    ("content_type", "body"), [("text/html", b'"generated_output":'), ("application/msgpack", b"\x81\xa1")]
)
def test_what_is_no_list_of_samples_has_none(content_type: str, body: bytes) -> None:
    counter = sample_counter(content_type)
    counter.add(body)
    assert counter.total() == 0


def test_stages_are_read_where_a_server_tells_them() -> None:
    assert stages_of("queue;dur=250.0, encode;desc=x;dur=8") == {"queue": 0.25, "encode": 0.008}
    assert stages_of("") == stages_of("queue;dur=nan, x;dur=-1, y, ;;=,") == {}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error": {"code": "queue_full", "message": "m"}}', "queue_full"),
        (b'{"detail": "x"}', UNKNOWN),
        (b'{"error": "x"}', UNKNOWN),
        (b"<html>", UNKNOWN),
        (b"[" * 100_000, UNKNOWN),
        (b"\xff", UNKNOWN),
        (b"", UNKNOWN),
    ],
)
def test_the_code_of_an_error_is_read_from_any_body(body: bytes, code: str) -> None:
    assert error_code(body) == code


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rate": 1.0},
        {"rate": 1.0, "concurrency": 1, "num_requests": 1},
        {"rate": 0.0, "num_requests": 1},
        {"rate": 1.0, "num_requests": 1, "max_in_flight": 0},
    ],
)
def test_a_load_that_cannot_be_sent_is_refused(fields: dict) -> None:
    with pytest.raises(InvalidRequestError):
        Load(**fields)
