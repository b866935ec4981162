"""The Prometheus metrics of one app, in a registry of its own."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from flowroll.engine.config import FastMode
from flowroll.engine.plan import RequestPlan
from flowroll.engine.scheduler import LoadStats, RequestCounts, StageSpan
from flowroll.engine.service import EngineStatus, RequestKind
from flowroll.exact import GraphCounts
from flowroll.serving.unsent import AnswerMemory
from flowroll.types import GeneratedImage, Number, Rollout

# From a probe's milliseconds to a group of large images.
_SECONDS_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
# Versions of the weights whose samples are counted; older ones are forgotten.
_MAX_VERSIONS = 64
_OCCUPANCY_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, math.inf)


class EngineCollector(Collector):
    """Shows what the engine has said last, all numbers from the same moment, so that they balance.

    Attributes:
        status: The engine; None: it was not asked yet.
        answer_s: Seconds by stage that answers took after their requests had ended.
    """

    def __init__(self) -> None:
        self.status: EngineStatus | None = None
        self.answer_s: dict[str, float] = {"serialise": 0.0, "send": 0.0}

    def collect(self) -> Iterator[Metric]:
        """Yields queue, running requests and samples, batches, stages, and how every accepted request ended."""
        if (status := self.status) is None:
            return
        load, scores = status.load, status.load.log_probs
        requests = load.requests
        yield GaugeMetricFamily("flowroll_queue_depth", "Accepted requests that wait.", requests.pending)
        yield GaugeMetricFamily("flowroll_running_requests", "Requests that the engine runs now.", requests.running)
        yield CounterMetricFamily("flowroll_accepted_requests", "Requests that entered the queue.", requests.accepted)
        age_s = status.oldest_waiting_s
        yield GaugeMetricFamily("flowroll_queue_age_seconds", "Age of the request that waits longest.", age_s)
        yield GaugeMetricFamily("flowroll_running_samples", "Samples from noise to picture.", load.running_samples)
        yield GaugeMetricFamily("flowroll_is_paused", "1 while new requests are refused.", int(load.is_paused))
        yield GaugeMetricFamily(
            "flowroll_is_holding", "1 while no sample starts until a push of weights is complete.", int(load.is_holding)
        )
        yield GaugeMetricFamily("flowroll_is_asleep", "1 while the memory of the weights is released.", int(status.is_asleep))
        yield CounterMetricFamily("flowroll_steps", "Denoising steps of all samples, also of those that failed.", load.steps)
        yield _occupancy(load)
        stages = (*load.stage_s.items(), *self.answer_s.items())
        yield _counter("flowroll_stage_seconds", "Seconds of ended requests, by stage.", "stage", stages)
        yield _counter("flowroll_failed_requests", "Requests that ended in an error.", "code", load.failures.items())
        yield _counter("flowroll_ended_requests", "Accepted requests that ended.", "outcome", _ended(requests))
        text = "Requests for scores, which are in no other family."
        yield CounterMetricFamily("flowroll_accepted_score_requests", text, scores.accepted)
        yield GaugeMetricFamily("flowroll_open_score_requests", "Of these, those that wait or are scored.", scores.pending)
        yield _counter("flowroll_ended_score_requests", "Of these, those that ended.", "outcome", _ended(scores))
        yield from _graphs(status.graphs)
        yield InfoMetricFamily("flowroll_weights", "Version of the weights in memory.", {"version": status.weight_version})
        text = "Number of this version in the sequence of all versions."
        yield GaugeMetricFamily("flowroll_version_number", text, status.version_number)


def _graphs(counts: GraphCounts) -> Iterator[Metric]:
    yield GaugeMetricFamily("flowroll_graphs", "Recorded forwards.", counts.recordings)
    yield GaugeMetricFamily("flowroll_graph_bytes", "Memory of recorded forwards.", counts.num_bytes)
    forwards = ("replayed", counts.hits), ("eager", counts.misses)
    yield _counter("flowroll_graph_forwards", "Forwards small enough to be recorded, by how they ran.", "way", forwards)
    text = "Recordings that were dropped or not made."
    yield _counter("flowroll_dropped_graphs", text, "reason", counts.dropped.items())


def _counter(name: str, text: str, label: str, counts: Iterable[tuple[str, Number]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts:
        family.add_metric([value], count)
    return family


def _ended(stats: RequestCounts) -> Iterable[tuple[str, int]]:
    return ("completed", stats.completed), ("failed", stats.failed)


def _occupancy(load: LoadStats) -> Metric:
    """Forwards by the number of samples in them, as a histogram."""
    buckets = [
        (str(edge) if edge < math.inf else "+Inf", float(sum(count for size, count in load.batches.items() if size <= edge)))
        for edge in _OCCUPANCY_EDGES
    ]
    name, text = "flowroll_batch_samples", "Samples in a shared forward."
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=load.steps)


class Metrics:
    """What the server counts; each metric's text says what it is.

    Args:
        engine_pid: The process of the engine, which may be another one.
        answers: The memory of answers that are not sent yet.
        fast: The engine's fast mode, whose mismatch is shown; None: the engine is exact.

    Attributes:
        registry: Holds all of it.
    """

    def __init__(self, engine_pid: int, answers: AnswerMemory, fast: FastMode | None = None) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        # e.g. flowroll_engine_process_resident_memory_bytes
        ProcessCollector(namespace="flowroll_engine", pid=lambda: engine_pid, registry=own)
        PlatformCollector(registry=own)
        self._collector = EngineCollector()
        own.register(self._collector)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flowroll_{name}", text, labels, registry=own)

        self.requests = counter("requests", "HTTP requests.", "route", "code")
        self.errors = counter("errors", "Answers that are an error.", "code")
        # From the request's first byte to the answer's last.
        self.request_seconds = Histogram(
            "flowroll_request_seconds", "Seconds per HTTP request.", ["route"], buckets=_SECONDS_BUCKETS, registry=own
        )
        self.response_bytes = counter("response_bytes", "Bytes of answer bodies.", "route")
        self.samples = counter("samples", "Finished samples.", "kind")
        self.version_samples = counter("version_samples", "Finished samples, by the version of the weights.", "version")
        self._versions: dict[str, None] = {}
        self.denoising_steps = counter("denoising_steps", "Steps of finished samples.", "kind")
        self.sde_steps = counter("sde_steps", "Stochastic steps of finished samples.")
        self.weight_updates = counter("weight_updates", "Updates of weights and adapters.", "outcome")
        self.weight_pushes = counter("weight_pushes", "Pushes of weights bucket by bucket, by how they ended.", "outcome")
        self.weight_pause_seconds = counter("weight_pause_seconds", "Seconds for which no request ran because of an update.")
        self.scored_steps = counter("scored_steps", "Recorded steps that were scored again.")
        self.dropped_requests = counter(
            "dropped_requests", "Requests whose client was gone before they entered the queue; none of the accepted ones."
        )
        for name, text in (
            ("expected", "Bytes of the answers to accepted requests that are not made yet, as far as they are foreseen."),
            ("unsent", "Bytes of answers that were made and are not sent to their end."),
        ):
            gauge = Gauge(f"flowroll_{name}_answer_bytes", text, registry=own)
            gauge.set_function(functools.partial(getattr, answers, f"{name}_bytes"))

        if fast is not None:
            text = "How far log-probs of the fast mode were from exact ones, and ratios from 1, with the weights of the start."
            mismatch = Gauge("flowroll_fast_mismatch", text, ["of", "statistic"], registry=own)
            for of, statistic in itertools.product(("log_prob", "ratio"), ("max", "mean")):
                mismatch.labels(of, statistic).set(getattr(fast.mismatch, f"{statistic}_{of}"))

    def render(self, status: EngineStatus) -> bytes:
        """Returns all metrics as Prometheus reads them, with the engine as it is now."""
        self._collector.status = status
        return generate_latest(self.registry)

    def observe_request(self, *, route: str, code: int, seconds: float, body_bytes: int, error: str | None) -> None:
        """Counts an answered HTTP request; on the event loop."""
        self.requests.labels(route, str(code)).inc()
        self.request_seconds.labels(route).observe(seconds)
        self.response_bytes.labels(route).inc(body_bytes)
        if error is not None:
            self.errors.labels(error).inc()

    def observe_refusal(self, *, code: int, error: str) -> None:
        """Counts an answer that a connection gave without the app; on the event loop."""
        self.requests.labels("connection", str(code)).inc()
        self.errors.labels(error).inc()

    def observe_stages(self, spans: Iterable[StageSpan]) -> None:
        """Counts the time that an answer took after its request had ended; on the event loop."""
        for span in spans:
            if span.stage in self._collector.answer_s:
                self._collector.answer_s[span.stage] += span.seconds

    def observe_result(self, plan: RequestPlan, kind: RequestKind, results: Sequence[Rollout | GeneratedImage]) -> None:
        """Counts the samples of a request that ended in a result; of a part of its samples, their share of its steps."""
        share = len(results) / plan.num_answers
        self.samples.labels(kind).inc(len(results))
        self.denoising_steps.labels(kind).inc(round(share * plan.num_steps_taken))
        chosen = plan.transitions or ()
        # At a fork each child draws its own noise.
        drawn = sum(plan.num_nodes(step + 1) for step in plan.steps if chosen and chosen[step].is_stochastic)
        self.sde_steps.inc(round(share * drawn))
        for result in results:
            self._versions[result.weight_version] = None
            self.version_samples.labels(result.weight_version).inc()
        while len(self._versions) > _MAX_VERSIONS:
            oldest = next(iter(self._versions))
            del self._versions[oldest]
            self.version_samples.remove(oldest)
