"""Logs and traces: set up once per process, used only at the edges.

In: start records, span times and log calls. Out: one JSON object per line on standard error (logs) and in
``state_dir/traces/<component>.jsonl`` (spans), and OTLP when an endpoint is set. The planner and the restore sequence hold no
spans: they return phases, and the edge that reports them calls :meth:`Tracer.span` with their times.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

from opentelemetry import trace as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from infra.settings import Settings

Attribute = str | int | float | bool
_log_fields: ContextVar[Mapping[str, str]] = ContextVar("log_fields", default=MappingProxyType({}))
_PROPAGATOR = TraceContextTextMapPropagator()


@contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Add fields (function, node, command, trace) to every log line of the body, across awaits."""
    token = _log_fields.set({**_log_fields.get(), **fields})
    try:
        yield
    finally:
        _log_fields.reset(token)


class JsonFormatter(logging.Formatter):
    """One log record as one JSON line."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        """Render time (s since the epoch), level, component, logger, message, context fields and traceback."""
        line = {
            "time": round(record.created, 6),
            "level": record.levelname,
            "component": self._component,
            "logger": record.name,
            "message": record.getMessage(),
            **_log_fields.get(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class JsonLinesExporter(SpanExporter):
    """Appends spans to a file, one JSON object each, whole lines only so that a reader may follow."""

    def __init__(self, path: Path, component: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._component = component
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write ``spans``."""
        text = "".join(json.dumps(span_line(span, self._component)) + "\n" for span in spans)
        with self._lock:
            os.write(self._file, text.encode())
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def span_line(span: ReadableSpan, component: str) -> dict[str, object]:
    """The JSON form of one span; :mod:`loadgen.report` and ``thaw trace`` read it."""
    context = span.get_span_context()
    return {
        "trace_id": format(context.trace_id, "032x") if context else "",
        "span_id": format(context.span_id, "016x") if context else "",
        "parent_id": format(span.parent.span_id, "016x") if span.parent else "",
        "name": span.name,
        "component": component,
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
    }


class Tracer:
    """Makes spans from times that were measured elsewhere.

    Contexts are W3C ``traceparent`` strings everywhere, so that a context is plain data in Kafka headers, commands and records.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("thaw")

    def begin(self, name: str, parent: str, start_ns: int, attributes: Mapping[str, Attribute] | None = None) -> OpenSpan:
        """Start a span that :meth:`OpenSpan.end` ends; ``parent`` may be empty (a new trace) or malformed (the same)."""
        context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
        span = self._tracer.start_span(name, context=context, start_time=start_ns, attributes=attributes)
        return OpenSpan(span)

    def span(self, name: str, parent: str, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None) -> str:
        """Record a finished span and return its traceparent."""
        opened = self.begin(name, parent, start_ns, attributes)
        opened.end(end_ns)
        return opened.traceparent

    def close(self) -> None:
        """Write out what is buffered."""
        self._provider.shutdown()


class OpenSpan:
    """A span that has begun."""

    def __init__(self, span: otel.Span) -> None:
        self._span = span
        self.traceparent = traceparent(span.get_span_context())

    def end(self, end_ns: int, attributes: Mapping[str, Attribute] | None = None, error: str = "") -> None:
        """Finish at ``end_ns``; ``error`` marks the span as failed with that description."""
        if attributes:
            self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_status(otel.Status(otel.StatusCode.ERROR, error))
        self._span.end(end_time=end_ns)


def traceparent(context: SpanContext) -> str:
    """The W3C header of a span context."""
    flags = int(context.trace_flags) | TraceFlags.SAMPLED
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"


def trace_id(parent: str) -> str:
    """The 32 hex digits of the trace in a traceparent, or empty."""
    parts = parent.split("-")
    return parts[1] if len(parts) >= 3 and len(parts[1]) == 32 else ""


def configure(component: str, settings: Settings, *, traces_dir: Path | None = None) -> Tracer:
    """Set up logging for the process and return its tracer.

    Args:
        component: ``agent``, ``scaler``, ``loadgen``; names the log lines and the span file.
        settings: log level, state folder, OTLP endpoint.
        traces_dir: other folder for the span file.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.telemetry.log_level.upper())
    for noisy in ("botocore", "boto3", "urllib3", "aiokafka", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    directory = traces_dir or settings.paths.state_dir / "traces"
    provider = TracerProvider(resource=Resource.create({"service.name": f"thaw-{component}"}))
    provider.add_span_processor(SimpleSpanProcessor(JsonLinesExporter(directory / f"{component}.jsonl", component)))
    if settings.telemetry.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        endpoint = settings.telemetry.otlp_endpoint.rstrip("/") + "/v1/traces"
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracer(provider)
