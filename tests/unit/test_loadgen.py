"""The load generator against a server that gives scripted answers; real servers are in tests/serving/test_loadgen.py."""

import asyncio
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import msgspec
import pytest
from tests.scripted import scripted_server

from flowroll.errors import InvalidRequestError
from flowroll.loadgen import Load, LoadReport, Mix, Outcome, run_load, summarize
from flowroll.loadgen.plan import arrivals

MIX = Mix(
    prompts=("a", "b"), sizes=((64, 64), (96, 64)), steps=(2, 3), group_sizes=(1, 2), dynamics=("sde", "cps", "ode"), seed=5
)
ONE = Mix(prompts=("a",), sizes=((64, 64),), steps=(3,), group_sizes=(1,), dynamics=("sde",))
DRAWN = {"prompt", "width", "height", "num_inference_steps", "num_outputs_per_prompt", "rollout_sde_type", "seed"}
UNAVAILABLE: tuple[int, dict[str, str], object] = (503, {}, {})


def sent_by(mix: Mix, num_requests: int, **load: Any) -> list[dict[str, Any]]:
    """The bodies that the server gets, warm-up included."""
    sent: list[dict[str, Any]] = []
    with scripted_server([UNAVAILABLE] * num_requests, sent) as url:
        asyncio.run(run_load(url, mix, Load(concurrency=1, num_requests=num_requests, **load)))
    return sent


def measured(answers: list[tuple[int, Mapping[str, str], object]], mix: Mix = ONE, **options: Any) -> LoadReport:
    """The report on these answers, one request for each."""
    with scripted_server([(status, dict(headers), body) for status, headers, body in answers], []) as url:
        return asyncio.run(run_load(url, mix, Load(concurrency=1, num_requests=len(answers)), **options))


def test_a_seed_fixes_what_is_sent_and_every_choice_is_drawn() -> None:
    sent = sent_by(MIX, 40)
    assert sent == sent_by(MIX, 40) != sent_by(replace(MIX, seed=6), 40)
    assert {(body["width"], body["height"]) for body in sent} == set(MIX.sizes)
    assert {body["num_inference_steps"] for body in sent} == set(MIX.steps)
    assert {body["num_outputs_per_prompt"] for body in sent} == set(MIX.group_sizes)
    assert {body["rollout_sde_type"] for body in sent} == set(MIX.dynamics)
    assert {body["prompt"] for body in sent} == set(MIX.prompts)
    assert len({body["seed"] for body in sent}) == 40


def test_a_warm_up_sends_other_requests_and_changes_none_of_those_that_count() -> None:
    answers, sent = [(429, {"Retry-After": "0"}, {})] * 2 + [UNAVAILABLE] * 3, list[dict[str, Any]]()
    with scripted_server(answers, sent) as url:
        report = asyncio.run(run_load(url, MIX, Load(concurrency=1, num_requests=3, warmup=2)))
    assert report.sent == report.failed == 3 and report.rejections == 0
    assert sent[2:] == sent_by(MIX, 3) and not [body for body in sent[:2] if body in sent[2:]]


def test_all_that_is_drawn_or_given_is_sent_and_nothing_else() -> None:
    (body,) = sent_by(replace(MIX, fixed={"return_dit_trajectory": True, "noise_level": 0.7}), 1)
    assert set(body) == {*DRAWN, "rollout_return_dit_trajectory", "rollout_noise_level", "rollout_debug_mode"}
    assert body["rollout_return_dit_trajectory"] is True and None not in body.values()


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


def test_arrivals_are_a_poisson_process_of_the_rate_that_a_seed_fixes() -> None:
    times = list(islice(arrivals(4.0, 0), 4000))
    assert times == list(islice(arrivals(4.0, 0), 4000)) != list(islice(arrivals(4.0, 1), 4000))
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    # The gaps of a Poisson process are exponential: their standard deviation is their mean.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05) == statistics.stdev(gaps)


def test_a_report_by_hand() -> None:
    outcomes = [
        Outcome(status=200, latency_s=4.0, samples=2, steps=6, received_bytes=70, stages={"queue": 3.0}),
        Outcome(status=200, latency_s=1.0, samples=1, steps=3, received_bytes=20, rejections=1),
        Outcome(status=429, code="queue_full", latency_s=9.0, received_bytes=10, rejections=2),
        Outcome(status=500, code="engine_error", latency_s=9.0),
        Outcome(code="ConnectError", latency_s=9.0),
    ]
    report = summarize(outcomes, 2.0)
    assert (report.sent, report.completed, report.rejected, report.failed, report.rejections) == (5, 2, 1, 2, 3)
    assert report.errors == {"500 engine_error": 1, "429 queue_full": 1, "no answer ConnectError": 1}
    assert report.latency_s == {"p50": 1.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert report.stages_s == {"queue": {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0}}
    assert report.per_second == {"requests": 1.0, "samples": 1.5, "steps": 4.5, "bytes": 50.0}


def test_percentiles_are_nearest_ranks() -> None:
    outcomes = [Outcome(status=200, latency_s=float(latency_s)) for latency_s in range(10, 0, -1)]
    assert summarize(outcomes, 1.0).latency_s == {"p50": 5.0, "p90": 9.0, "p99": 10.0, "max": 10.0}


def test_a_report_of_nothing_has_no_latency() -> None:
    report = summarize([], 0.0)
    assert (report.sent, report.latency_s, report.stages_s, report.per_second["bytes"]) == (0, {}, {}, 0.0)


@pytest.mark.parametrize("count", [1, 3, 20, 3000])
@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_samples_are_counted_as_an_answer_passes_by(count: int, wire_format: str) -> None:
    # Prompts that look like the key, in an answer of many pieces.
    sample = {"prompt": '"generated_output":', "generated_output": {"data": "generated_output" + "x" * 100}}
    if wire_format == "json":
        answer = 200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps([sample] * count, indent=1)
    else:
        answer = 200, {"Content-Type": "application/msgpack"}, msgspec.msgpack.encode([sample] * count)
    mix = replace(ONE, group_sizes=(count,))
    report = measured([answer], mix, wire_format=wire_format)
    assert report.completed == 1 and report.per_second["samples"] == pytest.approx(count * report.per_second["requests"])
    # Of the body as it is: it is not compressed on its way.
    assert report.per_second["bytes"] * report.seconds == pytest.approx(len(answer[2]))
    report = measured([answer], replace(ONE, group_sizes=(count + 1,)), wire_format=wire_format)
    assert report.errors == {"200 wrong_answer": 1} and report.per_second["samples"] == 0


@pytest.mark.parametrize(
    ("content_type", "body"), [("text/html", '"generated_output":'), ("application/msgpack", b"\x81\xa1"), ("", b"")]
)
def test_what_is_no_list_of_samples_is_a_wrong_answer(content_type: str, body: object) -> None:
    assert measured([(200, {"Content-Type": content_type}, body)]).errors == {"200 wrong_answer": 1}


@pytest.mark.parametrize(
    ("header", "stages"),
    [
        ("queue;dur=250.0, encode;desc=x;dur=8", {"queue": 0.25, "encode": 0.008}),
        ("queue;dur=nan, x;dur=-1, y, ;;=,", {}),
        ("", {}),
    ],
)
def test_stages_are_read_where_a_server_tells_them(header: str, stages: dict[str, float]) -> None:
    report = measured([(200, {"x-flowroll-timing": header}, [{"generated_output": 1}])])
    assert report.completed == 1 and {stage: figures["mean"] for stage, figures in report.stages_s.items()} == stages


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error": {"code": "engine_error", "message": "m"}}', "engine_error"),
        (b'{"detail": "x"}', "unknown"),
        (b'{"error": "x"}', "unknown"),
        (b"<html>", "unknown"),
        (b"[" * 100_000, "unknown"),
        (b"\xff", "unknown"),
        (b"", "unknown"),
    ],
)
def test_the_code_of_an_error_is_read_from_any_body(body: bytes, code: str) -> None:
    assert measured([(500, {}, body)]).errors == {f"500 {code}": 1}


@pytest.mark.parametrize("retry_after", ["0", "later"])
def test_a_rejected_request_is_sent_again_as_it_was_and_its_waits_count(retry_after: str) -> None:
    sent: list[dict[str, Any]] = []
    answers = [(429, {"Retry-After": retry_after}, {"detail": "busy"}), (200, {}, [{"generated_output": 1}])]
    with scripted_server(answers, sent) as url:
        report = asyncio.run(run_load(url, ONE, Load(concurrency=1, num_requests=1, retries=1)))
    assert sent[0] == sent[1] and (report.rejected, report.rejections) == (0, 1)
    # Without a number of seconds it waits for one second.
    waited_s = 1.0 if retry_after == "later" else 0.0
    assert report.latency_s["max"] >= waited_s
