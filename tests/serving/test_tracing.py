"""Spans of requests, with the SDK's in-memory exporter, and over OTLP from a real server."""

import itertools
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.serving.servers import SMALL, WAIT_S, Gate, HookedEngine, ServerProcess, until

from flowroll.engine.service import EngineService, InProcessEngine
from flowroll.serving import ServerConfig, create_app, launch, serve, tracing
from flowroll.serving.tracing import Tracing

ROLLOUT = "/rollout/generate"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = ["queue", "encode", "queue", "denoise", "decode", "serialise", "send"]


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Iterator[HookedEngine]:
    with HookedEngine(z_image_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: HookedEngine) -> Iterator[EngineService]:
    with EngineService(engine, max_queue=0) as service:
        yield service


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def client(service: EngineService, provider: TracerProvider) -> Iterator[httpx.Client]:
    with serving_spans(service, Tracing(provider)) as client:
        yield client


@contextmanager
def serving_spans(service: EngineService, made: Tracing | None) -> Iterator[httpx.Client]:
    app = create_app(InProcessEngine(service), ServerConfig(model="x"), tracing=made)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
        yield client
    server.should_exit = True
    thread.join(WAIT_S)


def spans_of(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The request's span, which ends last, and its children in their order."""
    until(lambda: any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()))
    *children, root = exporter.get_finished_spans()
    return root, sorted(children, key=lambda span: span.start_time)


def test_an_answer_is_a_span_with_a_child_for_every_span_of_its_time(
    client: httpx.Client, exporter: InMemorySpanExporter
) -> None:
    answer = client.post(ROLLOUT, json={**SMALL, "prompt": "a secret garden", "request_id": "step 3"})
    root, children = spans_of(exporter)
    assert (root.name, root.kind, root.parent) == (f"POST {ROLLOUT}", SpanKind.SERVER, None)
    assert dict(root.attributes) == {
        "http.request.method": "POST",
        "http.route": ROLLOUT,
        "http.response.status_code": 200,
        "http.response.body.size": len(answer.content),
        "flowroll.request_id": "step 3",
    }
    assert [span.name for span in children] == STAGES
    assert {span.parent.span_id for span in children} == {root.context.span_id}
    assert root.start_time <= children[0].start_time and children[-1].end_time <= root.end_time
    for before, after in itertools.pairwise(children[:5]):
        assert before.end_time == after.start_time
    assert "secret" not in "".join(span.to_json() for span in [root, *children])


def test_a_traceparent_is_continued_and_its_wish_not_to_be_sampled_is_followed(
    client: httpx.Client, exporter: InMemorySpanExporter
) -> None:
    client.post(ROLLOUT, json=SMALL, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    client.post(ROLLOUT, json=SMALL, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    root, children = spans_of(exporter)
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT
    assert {span.context.trace_id for span in children} == {root.context.trace_id}
    assert len(children) == len(STAGES)


def test_errors_name_their_code_and_only_those_of_the_server_are_the_spans_own(
    client: httpx.Client, exporter: InMemorySpanExporter, engine: HookedEngine
) -> None:
    client.post(ROLLOUT, json={**SMALL, "steps": 3}, headers={"traceparent": "not one"})
    refused, children = spans_of(exporter)
    assert refused.attributes["error.type"] == "invalid_request" and refused.status.status_code is StatusCode.UNSET
    assert refused.parent is None and children == []
    exporter.clear()

    def fail(plan: object) -> None:
        raise RuntimeError("no device")

    engine.hook = fail
    try:
        client.post(ROLLOUT, json=SMALL)
    finally:
        engine.hook = HookedEngine.hook
    failed, children = spans_of(exporter)
    assert failed.attributes["error.type"] == "engine_error" and failed.status.status_code is StatusCode.ERROR
    # Only the stages that it reached.
    assert [span.name for span in children] == ["queue", "encode", "send"]


def test_a_client_that_goes_away_leaves_a_span(
    client: httpx.Client, exporter: InMemorySpanExporter, engine: HookedEngine
) -> None:
    engine.hook = gate = Gate()
    try:
        with pytest.raises(httpx.ReadTimeout):
            client.post(ROLLOUT, json=SMALL, timeout=httpx.Timeout(WAIT_S, read=0.3))
        root, _ = spans_of(exporter)
    finally:
        gate.opened.set()
        engine.hook = HookedEngine.hook
    assert (root.attributes["http.response.status_code"], root.attributes["error.type"]) == (499, "cancelled")


def test_what_is_polled_leaves_no_span(client: httpx.Client, exporter: InMemorySpanExporter) -> None:
    for path in ("/health", "/metrics", "/server_info"):
        client.get(path)
    client.get("/v1/models")
    root, _ = spans_of(exporter)
    assert root.name == "GET /v1/models"


def test_the_process_s_own_provider_is_used_and_the_web_framework_adds_nothing(
    service: EngineService, provider: TracerProvider, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    with serving_spans(service, None) as client:
        client.post("/generate", json=SMALL)
    root, children = spans_of(exporter)
    assert root.name == "POST /generate" and [span.name for span in children] == STAGES


def test_without_a_provider_of_the_sdk_there_is_no_tracing() -> None:
    assert tracing.current_tracing() is None


def test_without_the_sdk_there_is_no_tracing_and_an_endpoint_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setattr(launch, "configure_logging", lambda *_: None)
    assert tracing.current_tracing() is None
    with pytest.raises(SystemExit, match=r"pip install 'flowroll\[otel\]'\.$"):
        serve(ServerConfig(model="/none", otlp_endpoint="http://127.0.0.1:1"))


def test_a_server_sends_its_spans_by_otlp_those_left_at_the_end_too_with_their_id_in_the_json_log(
    z_image_checkpoint: Path, tmp_path: Path
) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
    options = {"model": str(z_image_checkpoint), "otlp_endpoint": url, "log_format": "json"}
    try:
        with ServerProcess(tmp_path / "log", **options) as server, server.client() as client:
            client.post("/generate", json={**SMALL, "request_id": "traced"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
            client.get("/server_info")
            server.stop(signal.SIGTERM)
            assert server.process.wait(WAIT_S) == 0
        entries = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        (answered,) = [entry for entry in entries if entry["logger"] == "flowroll.access"]
        assert (answered["path"], answered["request_id"], answered["trace_id"]) == ("/generate", "traced", TRACE)
        assert entries[-1]["message"] == "stopped"
    finally:
        collector.shutdown()
        collector.server_close()
    (path, body), *_ = received
    assert path == "/v1/traces"
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert any(pair.value.string_value == "flowroll" for pair in resource.resource.attributes)
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert names.count("POST /generate") == 1 and set(STAGES) < set(names)
