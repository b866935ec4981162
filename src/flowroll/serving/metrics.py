"""Prometheus metrics of one app, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from flowroll.engine.batching import LoadStats, Stretch
from flowroll.engine.plan import RequestPlan
from flowroll.engine.worker import EngineWorker, RequestKind

# From a probe's milliseconds to a group of large images.
_SECONDS_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_OCCUPANCY_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)


class WorkerCollector(Collector):
    """Reads the worker at every scrape, all of its numbers from the same moment, so that they balance."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        # What happens to answers after their requests have ended.
        self.answer_s: dict[str, float] = {"serialise": 0.0, "send": 0.0}

    def collect(self) -> Iterator[Metric]:
        """Queue, running requests and samples, batches, stages, and how every accepted request ended."""
        load = self._worker.load()
        stats = load.requests
        yield GaugeMetricFamily("flowroll_queue_depth", "Accepted requests that wait.", stats.pending)
        yield GaugeMetricFamily("flowroll_running_requests", "Requests that the engine runs now.", stats.running)
        yield CounterMetricFamily("flowroll_accepted_requests", "Requests that entered the queue.", stats.accepted)
        yield GaugeMetricFamily("flowroll_queue_age_seconds", "Age of the request that waits longest.", load.oldest_waiting_s)
        yield GaugeMetricFamily("flowroll_running_samples", "Samples from noise to picture.", load.running_samples)
        yield GaugeMetricFamily("flowroll_is_paused", "1 while new requests are refused.", int(load.is_paused))
        yield GaugeMetricFamily(
            "flowroll_is_holding", "1 while no sample starts until a push of weights is complete.", int(load.is_holding)
        )
        asleep = int(self._worker.engine.is_asleep)
        yield GaugeMetricFamily("flowroll_is_asleep", "1 while the memory of the weights is released.", asleep)
        yield CounterMetricFamily("flowroll_steps", "Denoising steps of all samples, also of those that failed.", load.steps)
        yield self._occupancy(load)
        yield self._stages(load)
        failures = CounterMetricFamily("flowroll_failed_requests", "Requests that ended in an error.", labels=["code"])
        for code, count in sorted(load.failures.items()):
            failures.add_metric([code], count)
        yield failures
        ended = CounterMetricFamily("flowroll_ended_requests", "Accepted requests that ended.", labels=["outcome"])
        ended.add_metric(["completed"], stats.completed)
        ended.add_metric(["failed"], stats.failed)
        yield ended
        scores = self._worker.score_stats()
        text = "Requests for scores, which are in no other family."
        yield CounterMetricFamily("flowroll_accepted_score_requests", text, scores.accepted)
        yield GaugeMetricFamily("flowroll_open_score_requests", "Of these, those that wait or are scored.", scores.pending)
        ended = CounterMetricFamily("flowroll_ended_score_requests", "Of these, those that ended.", labels=["outcome"])
        ended.add_metric(["completed"], scores.completed)
        ended.add_metric(["failed"], scores.failed)
        yield ended
        version = {"version": self._worker.engine.weight_version}
        yield InfoMetricFamily("flowroll_weights", "Version of the weights in memory.", version)

    @staticmethod
    def _occupancy(load: LoadStats) -> Metric:
        """Forwards by the number of samples in them, as a histogram."""
        buckets = [
            (f"{edge:g}", float(sum(count for size, count in load.batches.items() if size <= edge)))
            for edge in _OCCUPANCY_EDGES
        ]
        total = float(sum(load.batches.values()))
        name, text = "flowroll_batch_samples", "Samples in a shared forward."
        return HistogramMetricFamily(name, text, buckets=[*buckets, ("+Inf", total)], sum_value=load.steps)

    def _stages(self, load: LoadStats) -> Metric:
        stages = CounterMetricFamily("flowroll_stage_seconds", "Seconds of ended requests, by stage.", labels=["stage"])
        for stage, seconds in (*load.stage_s.items(), *self.answer_s.items()):
            stages.add_metric([stage], seconds)
        return stages


class Metrics:
    """What the server counts.

    Args:
        worker: Read at every scrape.

    Attributes:
        registry: Holds all of it.
        requests: HTTP requests by route and status code.
        errors: Answers that are an error, by its code.
        request_seconds: From the request's first byte to the answer's last, by route.
        response_bytes: Of answer bodies, by route.
        samples: Finished samples, by kind.
        denoising_steps: Steps of finished samples, by kind.
        sde_steps: Steps of finished samples that have a log-prob.
        weight_updates: Updates of weights and adapters, by outcome.
        weight_pushes: Pushes of weights bucket by bucket, by how they ended.
        weight_pause_seconds: For which no request could run because weights or adapters were exchanged.
        scored_steps: Recorded steps that were scored again.
    """

    def __init__(self, worker: EngineWorker) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        ProcessCollector(registry=own)
        PlatformCollector(registry=own)
        self._collector = WorkerCollector(worker)
        own.register(self._collector)
        self.requests = Counter("flowroll_requests", "HTTP requests.", ["route", "code"], registry=own)
        self.errors = Counter("flowroll_errors", "Answers that are an error.", ["code"], registry=own)
        self.request_seconds = Histogram(
            "flowroll_request_seconds", "Seconds per HTTP request.", ["route"], buckets=_SECONDS_BUCKETS, registry=own
        )
        self.response_bytes = Counter("flowroll_response_bytes", "Bytes of answer bodies.", ["route"], registry=own)
        self.samples = Counter("flowroll_samples", "Finished samples.", ["kind"], registry=own)
        self.denoising_steps = Counter("flowroll_denoising_steps", "Steps of finished samples.", ["kind"], registry=own)
        self.sde_steps = Counter("flowroll_sde_steps", "Stochastic steps of finished samples.", registry=own)
        self.weight_updates = Counter("flowroll_weight_updates", "Updates of weights and adapters.", ["outcome"], registry=own)
        text = "Pushes of weights bucket by bucket: completed, or why the rest was not waited for."
        self.weight_pushes = Counter("flowroll_weight_pushes", text, ["outcome"], registry=own)
        self.weight_pause_seconds = Counter(
            "flowroll_weight_pause_seconds", "Seconds for which no request ran because of an update.", registry=own
        )
        self.scored_steps = Counter("flowroll_scored_steps", "Recorded steps that were scored again.", registry=own)

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

    def observe_stages(self, stretches: Iterable[Stretch]) -> None:
        """Counts the time that an answer took after its request had ended; on the event loop."""
        for stretch in stretches:
            if stretch.stage in self._collector.answer_s:
                self._collector.answer_s[stretch.stage] += stretch.seconds

    def observe_result(self, plan: RequestPlan, kind: RequestKind) -> None:
        """Counts the samples of a request that ended in a result."""
        samples = len(plan.seeds)
        self.samples.labels(kind).inc(samples)
        self.denoising_steps.labels(kind).inc(samples * plan.schedule.num_steps)
        stochastic = sum(transition.is_stochastic for transition in plan.transitions or ())
        self.sde_steps.inc(samples * stochastic)
