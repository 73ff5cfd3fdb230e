"""Requests as spans of OpenTelemetry. Imported only where tracing is on."""

import os
from collections.abc import Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sidelight.errors import SidelightError
from sidelight.server.metrics import scores
from sidelight.server.observe import Trace

Attributes = dict[str, str | int | Sequence[str] | Sequence[float]]


class OtelSink:
    """Makes one span of each request, as a child of the caller's.

    The span is made when the request is over, with the times at which it began and ended: until
    then, nothing of OpenTelemetry runs.
    """

    def __init__(self, provider: TracerProvider):
        self._tracer = provider.get_tracer("sidelight")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, trace: Trace) -> None:
        # Only this header: tracestate and baggage are a client's own text.
        caller = {} if trace.traceparent is None else {"traceparent": trace.traceparent}
        span = self._tracer.start_span(
            f"{trace.method} {trace.route}",
            context=self._propagator.extract(caller),
            kind=SpanKind.SERVER,
            start_time=trace.start_ns,
            attributes=attributes(trace),
        )
        if trace.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def attributes(trace: Trace) -> Attributes:
    """The span's attributes, by OpenTelemetry's names where it has some.

    Those of a probe are lists with one entry per verdict: a request may have several texts.
    """
    found: Attributes = {
        "http.request.method": trace.method,
        "http.route": trace.route,
        "http.response.status_code": trace.status,
        "sidelight.request_id": trace.request_id,
    }
    if trace.model is not None:
        found["gen_ai.request.model"] = trace.model
        found["gen_ai.usage.input_tokens"] = trace.prompt_tokens
        found["gen_ai.usage.output_tokens"] = trace.completion_tokens
        found["sidelight.probes"] = list(dict.fromkeys(d.rule.name for d in trace.decisions))
    words: dict[str, list[str]] = {}
    numbers: dict[str, list[float]] = {}
    for decision in trace.decisions:
        name = f"sidelight.probe.{decision.rule.name}"
        words.setdefault(f"{name}.outcome", []).append(decision.outcome)
        words.setdefault(f"{name}.action", []).append(decision.action)
        if decision.verdict is not None:
            for label, score in scores(decision.rule.probe, decision.verdict).items():
                numbers.setdefault(f"{name}.score.{label}", []).append(score)
    return {**found, **words, **numbers}


def otlp_sink() -> OtelSink:
    """Sends spans to where OpenTelemetry's environment variables say, in the background.

    Raises:
        SidelightError: They ask for gRPC.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if os.environ.get(name, "http/protobuf") != "http/protobuf":
            raise SidelightError(
                f"{name} is '{os.environ[name]}', but spans are sent as 'http/protobuf' only. Set "
                "it to 'http/protobuf', and the endpoint to the collector's HTTP port (4318)."
            )
    is_named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if is_named else {"service.name": "sidelight"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelSink(provider)
