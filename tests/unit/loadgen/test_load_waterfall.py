"""Traces as waterfalls: order, depth, unaccounted time, broken files, and what `thaw trace` shows of them."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from rich.console import Console

from infra.settings import PathSettings, Settings
from infra.telemetry import JsonLinesExporter, Tracer
from loadgen.waterfall import Span, assemble, cells, covered_ns, read_spans, traces
from thaw.trace import draw, trace

MS = 1_000_000
BASE = 1_700_000_000_000_000_000


def span(name, start_ms, end_ms, span_id="", parent="", trace_id="a" * 32, component="scaler", **attributes):
    return Span(trace_id, span_id or name, name, BASE + int(start_ms * MS), BASE + int(end_ms * MS), parent, component, attributes)


STORY = [
    span("ready", 9, 11, parent="start", component="agent"),
    span("request", 0, 12, component="loadgen", function="index", mode="restore"),
    span("receive", 1, 3, parent="start"),
    span("start", 1, 11, parent="request", start_mode="restore"),
    span("criu.restore", 3, 8, parent="start", component="agent"),
    span("prefetch", 4, 6, parent="criu.restore", component="agent"),
    span("first_response", 11, 12, parent="request", component="loadgen"),
]


def test_parents_come_before_their_children_and_siblings_in_time():
    found = assemble(STORY)
    assert [(row.span.name, row.depth) for row in found.rows] == [
        ("request", 0),
        ("start", 1),
        ("receive", 2),
        ("criu.restore", 2),
        ("prefetch", 3),
        ("ready", 2),
        ("first_response", 1),
    ]
    assert (found.function, found.mode, found.total_ns) == ("index", "restore", 12 * MS)


def test_unaccounted_is_the_time_in_which_nothing_without_children_ran():
    # Leaves cover 1-3, 4-6, 9-11 and 11-12 of 12 ms.
    assert assemble(STORY).unaccounted_ns == 5 * MS


def test_a_trace_of_a_start_that_no_request_asked_for_spans_what_there_is():
    found = assemble([span("start", 5, 9), span("sandbox", 5, 7, parent="start"), span("ready", 7, 9, parent="start")])
    assert (found.start_ns, found.total_ns, found.unaccounted_ns) == (BASE + 5 * MS, 4 * MS, 0)


def test_a_span_whose_parent_was_never_written_stands_at_the_top():
    found = assemble([span("lost", 1, 2, parent="nowhere"), span("request", 0, 3)])
    assert [(row.span.name, row.depth) for row in found.rows] == [("request", 0), ("lost", 0)]


SPANS = st.lists(
    st.builds(
        lambda n, start, length, parent: span(f"s{n}", start, start + length, span_id=f"{n}", parent=f"{parent}"),
        st.integers(0, 12),
        st.integers(0, 50),
        st.integers(0, 50),
        st.integers(0, 14),
    ),
    min_size=1,
    max_size=20,
)


@given(SPANS)
def test_any_set_of_spans_is_shown_once_each_even_with_parents_in_circles(spans):
    found = assemble(spans)
    assert sorted(row.span.span_id for row in found.rows) == sorted({item.span_id for item in spans})
    assert 0 <= found.unaccounted_ns <= found.total_ns
    for row in found.rows:
        first, length = cells(row.span, found.start_ns, found.end_ns, 40)
        assert 0 <= first < 40
        assert 1 <= length <= 40 - first


@given(SPANS)
def test_covered_time_is_counted_once(spans):
    ticks = {tick for item in spans for tick in range((item.start_ns - BASE) // MS, (item.end_ns - BASE) // MS)}
    assert covered_ns(spans, BASE, BASE + 200 * MS) == len(ticks) * MS


def test_a_bar_lies_where_its_time_is():
    assert cells(span("x", 0, 10), BASE, BASE + 10 * MS, 20) == (0, 20)
    assert cells(span("x", 5, 10), BASE, BASE + 10 * MS, 20) == (10, 10)
    assert cells(span("x", 10, 10), BASE, BASE + 10 * MS, 20) == (19, 1)


def test_what_the_tracer_writes_is_read_back(tmp_path):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(JsonLinesExporter(tmp_path / "loadgen.jsonl", "loadgen")))
    tracer = Tracer(provider)
    opened = tracer.begin("request", "", BASE, {"function": "echo", "row": 3})
    tracer.span("http", opened.traceparent, BASE + MS, BASE + 2 * MS, {"status": 200})
    opened.end(BASE + 3 * MS, {"mode": "warm"})
    tracer.close()
    (found,) = traces(read_spans(tmp_path))
    assert [(row.span.name, row.depth, row.span.component) for row in found.rows] == [
        ("request", 0, "loadgen"),
        ("http", 1, "loadgen"),
    ]
    assert (found.function, found.mode, found.unaccounted_ns) == ("echo", "warm", 2 * MS)


def line(item):
    return json.dumps(
        {
            "trace_id": item.trace_id,
            "span_id": item.span_id,
            "parent_id": item.parent_id,
            "name": item.name,
            "component": item.component,
            "start_ns": item.start_ns,
            "end_ns": item.end_ns,
            "attributes": item.attributes,
        }
    )


@pytest.fixture
def settings(tmp_path):
    other = [dataclasses.replace(assemble([span("request", 100, 130, trace_id="ab" * 16, function="echo", mode="cold")]))]
    directory = tmp_path / "traces"
    directory.mkdir()
    (directory / "scaler.jsonl").write_text("\n".join(map(line, STORY)) + "\n")
    broken = "\n".join([line(other[0].rows[0].span), "not json", "{}", '{"trace_id": 3}', '{"trace_id": "cut of'])
    (directory / "loadgen.jsonl").write_text(broken)
    (directory / "agent.jsonl").write_bytes(b"\xff\xfe\n")
    return dataclasses.replace(Settings(), paths=PathSettings(cache_dir=tmp_path, state_dir=tmp_path))


def run(settings, *arguments):
    return CliRunner().invoke(trace, arguments, obj=settings, env={"COLUMNS": "120"})


def test_damaged_lines_are_passed_over(settings):
    assert len(traces(read_spans(settings.paths.state_dir / "traces"))) == 2


def test_without_an_id_traces_are_listed(settings):
    result = run(settings)
    assert result.exit_code == 0
    assert "index" in result.output
    assert "echo" in result.output
    assert "42%" in result.output  # 5 of 12 ms
    assert "echo" not in run(settings, "--function", "index").output
    assert "index" not in run(settings, "--mode", "cold").output


def test_the_beginning_of_an_id_draws_a_waterfall(settings):
    result = run(settings, "aaaa")
    assert result.exit_code == 0
    for name in ("request", "criu.restore", "prefetch", "first_response", "unaccounted"):
        assert name in result.output
    assert "█" in result.output
    assert "5.00" in result.output


def test_the_slowest_are_drawn_slowest_first(settings):
    result = run(settings, "--slowest", "2")
    assert result.output.index("ab" * 16) < result.output.index("a" * 32)
    assert result.output.count("unaccounted") == 2
    assert run(settings, "--slowest", "1").output.count("unaccounted") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("ffff",), "no trace begins with ffff"), (("a",), "2 traces begin with a"), (("--function", "nope"), "no such traces")],
)
def test_what_is_not_there_is_a_clear_error(settings, arguments, message):
    result = run(settings, *arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_no_trace_at_all_is_a_clear_error(tmp_path):
    empty = dataclasses.replace(Settings(), paths=PathSettings(cache_dir=tmp_path, state_dir=tmp_path))
    assert "no such traces" in run(empty).output


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_waterfall_fits_its_terminal(width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    draw(console, assemble(STORY))
    assert all(len(text.rstrip()) <= width for text in console.export_text().splitlines())
