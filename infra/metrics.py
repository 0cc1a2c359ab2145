"""Metrics by OpenTelemetry: to a collector by OTLP, and as Prometheus's text.

In: the instruments of :class:`infra.vitals.Vitals`, read at each export. Out: :meth:`Metrics.text` for :mod:`infra.health`, and pushes to
``telemetry.otlp_endpoint`` when it is set. The SDK is imported when it is needed first: it takes longer than a scaler's whole start.

Sources: OpenTelemetry's "Prometheus and OpenMetrics Compatibility" for names; Prometheus's text format 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from infra.vitals import Vitals

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.sdk.metrics.export import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: UCUM to the word that Prometheus puts into names.
_UNITS = {"s": "seconds", "By": "bytes", "1": "ratio"}
_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_:]")


class Metrics:
    """The exporters of one process.

    Args:
        vitals: what is exported. What is registered later is not.
        otlp_endpoint: as in the settings; empty: none.
    """

    def __init__(self, vitals: Vitals, otlp_endpoint: str = "") -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader, PeriodicExportingMetricReader
        from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
        from opentelemetry.sdk.resources import Resource

        self._vitals = vitals
        self._reader = InMemoryMetricReader()
        readers: list[MetricReader] = [self._reader]
        if otlp_endpoint:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=otlp_endpoint.rstrip("/") + "/v1/metrics")))
        views = [
            View(instrument_name=name, aggregation=ExplicitBucketHistogramAggregation(item.bounds))
            for name, item in vitals.distributions.items()
        ]
        resource = Resource.create({"service.name": f"thaw-{vitals.component}", "service.instance.id": vitals.identity})
        self._provider = MeterProvider(readers, resource, shutdown_on_exit=False, views=views)
        meter = self._provider.get_meter("thaw")
        self._histograms = {name: meter.create_histogram(name, item.unit, item.description) for name, item in vitals.distributions.items()}
        first = True
        for name, item in vitals.instruments.items():
            make = meter.create_observable_counter if item.kind == "counter" else meter.create_observable_gauge
            callbacks = [self._callback(name)]
            if first:  # whoever exports asks for these
                callbacks.insert(0, self._fill)
                first = False
            make(name, callbacks, item.unit, item.description)

    def text(self) -> str:
        """Everything now, for Prometheus."""
        self._feed()
        data = self._reader.get_metrics_data()
        lines: list[str] = []
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in sorted(scope.metrics, key=lambda item: item.name):
                    lines += _rendered(metric)
        return "".join(f"{line}\n" for line in lines)

    def close(self) -> None:
        """Push what is left, and end."""
        self._feed()
        self._provider.shutdown()

    def _feed(self) -> None:
        for name, histogram in self._histograms.items():
            for value, attributes in self._vitals.distributions[name].drain():
                histogram.record(value, dict(attributes))

    def _fill(self, _: CallbackOptions) -> Iterator[Observation]:
        """Has no value of its own: the values recorded since go into this export or the next one."""
        self._feed()
        yield from ()

    def _callback(self, name: str) -> Any:
        from opentelemetry.metrics import Observation

        def read(_: CallbackOptions) -> Iterator[Observation]:
            # Looked up each time: a part that was built anew has registered itself again.
            for value, attributes in self._vitals.instruments[name].read():
                yield Observation(value, dict(attributes))

        return read


def _rendered(metric: Metric) -> Iterator[str]:
    data = metric.data
    counter = getattr(data, "is_monotonic", False)
    kind = "histogram" if hasattr(data.data_points[0] if data.data_points else None, "bucket_counts") else "counter" if counter else "gauge"
    name = prometheus_name(metric.name, metric.unit or "", counter=counter)
    if metric.description:
        yield f"# HELP {name} {_escaped(metric.description)}"
    yield f"# TYPE {name} {kind}"
    for point in data.data_points:
        labels = {str(key): str(value) for key, value in sorted((point.attributes or {}).items())}
        if kind == "histogram":
            total = 0
            for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts, strict=True):  # type: ignore[union-attr]
                total += count
                yield f"{name}_bucket{_labelled({**labels, 'le': '+Inf' if bound == float('inf') else f'{bound:g}'})} {total}"
            yield f"{name}_sum{_labelled(labels)} {point.sum!r}"  # type: ignore[union-attr]
            yield f"{name}_count{_labelled(labels)} {point.count}"  # type: ignore[union-attr]
        else:
            yield f"{name}{_labelled(labels)} {point.value!r}"  # type: ignore[union-attr]


def prometheus_name(name: str, unit: str, *, counter: bool) -> str:
    """The name of an instrument in Prometheus's text: with its unit, which is left out when it is an annotation such as ``{start}``."""
    words = _FORBIDDEN.sub("_", name)
    unit = "" if unit.startswith("{") else _UNITS.get(unit, unit)
    if unit and not words.endswith(f"_{unit}"):
        words += f"_{unit}"
    return f"{words}_total" if counter and not words.endswith("_total") else words


def _labelled(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{_FORBIDDEN.sub("_", key)}="{_escaped(value, quotes=True)}"' for key, value in labels.items()) + "}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text
