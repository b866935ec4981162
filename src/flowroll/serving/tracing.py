"""OpenTelemetry spans of requests, where the SDK is installed and a provider takes them.

A request is one span of kind server, with a child for every stage of its time. The spans are made once the request has been
answered, from the timing that is kept anyway, so that nothing is paid before. A caller's W3C `traceparent` is continued.

OpenTelemetry's own ASGI instrumentation is not used: it writes query strings and the messages of exceptions into its spans,
names them by path instead of route, and knows nothing of a client that went away (measured with version 0.66b2).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flowroll.engine.scheduler import StageSpan
from flowroll.errors import InvalidRequestError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SERVER_ERROR = 500


class Tracing:
    """Makes the spans of requests.

    Args:
        provider: The provider that takes them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("flowroll")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        name: str,
        *,
        headers: Mapping[str, str],
        start_s: float,
        spans: Sequence[StageSpan],
        attributes: Mapping[str, str | int],
    ) -> str | None:
        """Records an answered request, which ends now.

        Args:
            name: Method and route.
            headers: The request's headers, in lower case.
            start_s: When the request began, by the monotonic clock.
            spans: The stages of its time.
            attributes: The attributes of its span, by OpenTelemetry's names.

        Returns:
            The trace's id; None: the sampler, or the caller's, does not want the trace.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        # Spans have the time of the wall clock, which may be set while a request runs: it is read only once.
        end_s, end_ns = time.monotonic(), time.time_ns()

        def at(moment_s: float) -> int:
            return end_ns - round((end_s - moment_s) * 1e9)

        parent = self._propagator.extract(headers)
        span = self._tracer.start_span(name, parent, kind=SpanKind.SERVER, attributes=dict(attributes), start_time=at(start_s))
        if span.is_recording():
            inside = set_span_in_context(span)
            for stage in spans:
                self._tracer.start_span(stage.stage, inside, start_time=at(stage.start_s)).end(at(stage.end_s))
            if int(attributes["http.response.status_code"]) >= _SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)
        return f"{span.get_span_context().trace_id:032x}" if span.get_span_context().trace_flags.sampled else None


def current_tracing() -> Tracing | None:
    """Returns tracing with the process's provider, as `opentelemetry-instrument` or a host sets it; None: there is none."""
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import get_tracer_provider
    except ImportError:
        return None
    provider = get_tracer_provider()
    return Tracing(provider) if isinstance(provider, TracerProvider) else None


def otlp_provider(endpoint: str) -> TracerProvider:
    """Returns a provider that sends spans by OTLP over HTTP, in batches, on a thread of its own; `shutdown` sends the rest.

    The SDK's environment variables decide everything else, e.g. OTEL_SERVICE_NAME and OTEL_TRACES_SAMPLER.

    Raises:
        InvalidRequestError: The libraries are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        message = f"otlp_endpoint must go with the OpenTelemetry SDK, got {error}; pip install 'flowroll[otel]'."
        raise InvalidRequestError(message, field="otlp_endpoint") from None
    # The environment may name the service.
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "flowroll"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider
