"""Traces as waterfalls: which span lies in which, where the time went, and what nobody accounts for.

In: span lines that :mod:`infra.telemetry` wrote (``state_dir/traces/*.jsonl``). Out: :class:`Trace`, drawn in the terminal by
``thaw trace`` and in the report by :mod:`loadgen.plots`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

#: The span that the load generator roots each trace in.
ROOT = "request"


class Span(msgspec.Struct, frozen=True):
    """One span as it was written. Times are wall clock, ns since the epoch."""

    trace_id: str
    span_id: str
    name: str
    start_ns: int
    end_ns: int
    parent_id: str = ""
    component: str = ""
    attributes: dict[str, str | int | float | bool | list[str | int | float | bool]] = {}

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Row:
    """One line of a waterfall."""

    span: Span
    depth: int


@dataclass(frozen=True)
class Trace:
    """One trace.

    Attributes:
        rows: spans in the order of a waterfall: a parent before its children, siblings by their start.
        start_ns, end_ns: of the whole.
        unaccounted_ns: time of the whole in which no span without children was running.
    """

    trace_id: str
    rows: Sequence[Row]
    start_ns: int
    end_ns: int
    unaccounted_ns: int

    @property
    def total_ns(self) -> int:
        """Whole duration."""
        return self.end_ns - self.start_ns

    def attribute(self, *names: str) -> str:
        """The first of these attributes that any span has, or empty."""
        for name in names:
            for row in self.rows:
                if (value := row.span.attributes.get(name)) not in (None, ""):
                    return str(value)
        return ""

    @property
    def function(self) -> str:
        """Which function it is about."""
        return self.attribute("function")

    @property
    def mode(self) -> str:
        """How the instance that answered came to be."""
        return self.attribute("mode", "start_mode")


def read_spans(traces_dir: Path) -> Iterator[Span]:
    """Spans of every component; lines that are cut short or are no spans are passed over."""
    for path in sorted(traces_dir.glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                try:
                    yield msgspec.json.decode(line, type=Span)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # the writer may be in the middle of it, or was killed there


def traces(spans: Iterable[Span]) -> list[Trace]:
    """Group spans into traces, oldest first."""
    by_id: dict[str, list[Span]] = collections.defaultdict(list)
    for span in spans:
        by_id[span.trace_id].append(span)
    return sorted((assemble(group) for group in by_id.values()), key=lambda trace: trace.start_ns)


def assemble(spans: Sequence[Span]) -> Trace:
    """Make one trace of its spans. A span whose parent was not written stands at the top."""
    known = {span.span_id: span for span in spans}
    children: dict[str, list[Span]] = collections.defaultdict(list)
    for span in sorted(known.values(), key=lambda span: (span.start_ns, -span.end_ns)):
        orphan = span.parent_id not in known or _is_own_ancestor(span, known)
        children["" if orphan else span.parent_id].append(span)
    rows: list[Row] = []
    stack = [(span, 0) for span in reversed(children[""])]
    while stack:
        span, depth = stack.pop()
        rows.append(Row(span, depth))
        stack.extend((child, depth + 1) for child in reversed(children[span.span_id]))
    whole = next((row.span for row in rows if row.span.name == ROOT and row.depth == 0), None)
    start_ns = whole.start_ns if whole else min(span.start_ns for span in spans)
    end_ns = whole.end_ns if whole else max(span.end_ns for span in spans)
    leaves = [row.span for row in rows if not children[row.span.span_id] and row.span is not whole]
    unaccounted_ns = end_ns - start_ns - covered_ns(leaves, start_ns, end_ns)
    return Trace(rows[0].span.trace_id, rows, start_ns, end_ns, unaccounted_ns)


def covered_ns(spans: Iterable[Span], start_ns: int, end_ns: int) -> int:
    """Time between two instants in which at least one of the spans was running."""
    covered, reached = 0, start_ns
    for span in sorted(spans, key=lambda span: span.start_ns):
        begin, end = max(span.start_ns, reached), min(span.end_ns, end_ns)
        if end > begin:
            covered += end - begin
            reached = end
    return covered


def cells(span: Span, start_ns: int, end_ns: int, width: int) -> tuple[int, int]:
    """Where a span lies on a bar of ``width`` cells for the given time: first cell and number of cells, at least one."""
    total = max(1, end_ns - start_ns)
    first = min(width - 1, max(0, (span.start_ns - start_ns) * width // total))
    last = min(width, max(0, -(-(span.end_ns - start_ns) * width // total)))
    return first, max(1, last - first)


def find(all_traces: Iterable[Trace], prefix: str) -> list[Trace]:
    """Traces whose id begins with ``prefix``."""
    return [trace for trace in all_traces if trace.trace_id.startswith(prefix.lower())]


def _is_own_ancestor(span: Span, known: dict[str, Span]) -> bool:
    """Whether following the parents comes back to the span: such a trace is broken, but must not hang its reader."""
    seen = {span.span_id}
    parent = known.get(span.parent_id)
    while parent is not None:
        if parent.span_id in seen:
            return True
        seen.add(parent.span_id)
        parent = known.get(parent.parent_id)
    return False
