"""The report of a measurement: one HTML file that opens anywhere, and the raw data beside it.

In: a run with restored starts and the same load with every start cold (:class:`RunData`), and what they ran on. Out:
``report.html`` with its figures inlined, and the files that every figure in it can be computed from again.
"""

from __future__ import annotations

import collections
import datetime
import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.api.records import START_MODES, StartRecord
from loadgen import plots
from loadgen.page import page, section, table, tiles
from loadgen.plots import Series
from loadgen.result import MODES, WARM, LoadResult, RequestRecord, latency

REPORT_FILE = "report.html"
_UNACCOUNTED = "unaccounted"
_LATENCY = "ms from the intended time of the request to the whole answer"


@dataclass(frozen=True)
class RunData:
    """One run of the load.

    Attributes:
        name: for file names, such as ``restored``.
        title: for headings, such as ``with checkpoints``.
        result: of :func:`loadgen.driver.run`.
        starts: of this run, from ``thaw.restores``.
        memory: MB by series: (s since the first request, MB).
        spans: files with spans to keep beside the report.
    """

    name: str
    title: str
    result: LoadResult
    starts: Sequence[StartRecord] = ()
    memory: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    spans: Sequence[Path] = ()


def write(
    out: Path,
    product: RunData,
    baseline: RunData,
    *,
    machine: Mapping[str, str],
    method: Sequence[str],
    title: str = "Thaw: restored starts against cold ones",
) -> Path:
    """Write the report and its raw data.

    Args:
        out: folder; made when it is not there.
        product: the run whose starts are restores.
        baseline: the same load with every start cold.
        machine: facts by name, such as those of :func:`loadgen.machine.facts`.
        method: how it was measured, one sentence or two per item.
        title: heading.

    Returns:
        The HTML file.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [name for run in (product, baseline) for name in _write_raw(out, run)]
    files += _write_json(out, "machine.json", dict(machine))
    files += _write_json(out, "memory.json", {run.name: {k: list(v) for k, v in run.memory.items()} for run in (product, baseline)})
    body = [
        tiles(_headline(product, baseline)),
        section(
            "How long a request waited",
            plots.cdf(_by_mode(product, baseline), _LATENCY),
            "Each curve holds the requests that were answered in one start mode; warm ones found a running instance. "
            f"The dashed curve is the run {baseline.title}: the same requests, those that waited for a cold start.",
        ),
        section(
            "The same by function",
            plots.cdfs_by_function(_by_function(product, baseline), _LATENCY),
            "Requests that waited for a restored start, and for a cold start in the other run; warm ones are left out.",
            table(*_functions_table(product, baseline)),
        ),
        *_waterfalls(product),
        section("Starts over time", plots.starts_over_time({run.title: _starts(run, baseline) for run in (product, baseline)})),
        section("Where the time of a start goes", table(*_phases_table(product, baseline)), _PHASES_NOTE),
        section("Memory over time", plots.memory_over_time({run.title: run.memory for run in (product, baseline)})),
        section("What the answers prove", table(*_tokens_table(product, baseline)), _TOKENS_NOTE),
        section("How it was measured", method),
        section("The machine", table(("", ""), list(machine.items()))),
        section("Raw data", "Every figure above follows from these files.", [f'<a href="{name}">{name}</a>' for name in files]),
    ]
    began = datetime.datetime.fromtimestamp(product.result.started_ns / 1e9, datetime.UTC)
    path = out / REPORT_FILE
    path.write_text(page(title, f"{began:%Y-%m-%d %H:%M} UTC", body), encoding="utf-8")
    return path


_PHASES_NOTE = (
    "Median ms of each phase over the starts of a mode. Phases may overlap; unaccounted is the time that none of them covers, "
    "as a phase of its own."
)
_TOKENS_NOTE = (
    "A function draws a random token when its process is first started. Restored instances of one checkpoint all answer with "
    "the token drawn before the freeze, which a freshly started process cannot know; cold instances have one each."
)


def started(run: RunData) -> list[RequestRecord]:
    """Answered requests that waited for a start."""
    return [record for record in run.result.records if record.response_ns and record.mode != WARM]


def restored(run: RunData) -> list[RequestRecord]:
    """Answered requests that waited for a start which was not cold."""
    return [record for record in started(run) if record.mode != "cold"]


def restored_starts(run: RunData) -> list[StartRecord]:
    """Starts that came up by anything but running the command, the quickest first."""
    found = [start for start in run.starts if start.outcome == "ready" and start.start_mode != "cold"]
    return sorted(found, key=lambda start: start.total_ns)


def unaccounted_share(starts: Iterable[StartRecord]) -> float:
    """Median share of a start's time that no phase covers."""
    shares = [start.unaccounted_ns / start.total_ns for start in starts if start.total_ns > 0]
    return statistics.median(shares) if shares else 0.0


def _headline(product: RunData, baseline: RunData) -> list[tuple[str, str, str]]:
    result, cold = product.result, baseline.result
    modes = collections.Counter(start.start_mode for start in product.starts if start.outcome == "ready")
    ours, theirs = latency(restored(product)), latency(started(baseline))
    return [
        (
            f"{result.answered:,} of {result.requests:,}",
            "requests answered",
            f"{result.wrong} wrong; {baseline.title}: {cold.answered:,} of {cold.requests:,}, {cold.wrong} wrong",
        ),
        (
            f"{theirs.p50_ms / ours.p50_ms:,.0f}x" if ours.n and theirs.n and ours.p50_ms else "–",
            "quicker at the median",
            f"{ours.p50_ms:,.1f} ms instead of {theirs.p50_ms:,.1f} ms, over requests that waited for a restored or for a cold start",
        ),
        (
            f"{ours.p99_ms:,.0f} ms",
            "at the 99th percentile",
            f"instead of {theirs.p99_ms:,.0f} ms; slowest {ours.max_ms:,.0f} ms instead of {theirs.max_ms:,.0f} ms",
        ),
        (
            f"{sum(modes.values())}",
            "starts",
            ", ".join(f"{modes[mode]} {mode}" for mode in START_MODES if modes[mode])
            + f"; {unaccounted_share(product.starts):.1%} of a start's time unaccounted for (median)",
        ),
    ]


def _by_mode(product: RunData, baseline: RunData) -> list[Series]:
    answered = [record for record in product.result.records if record.response_ns]
    series = [Series(mode, mode, [r.latency_ms for r in answered if r.mode == mode]) for mode in MODES]
    series.append(Series(f"{baseline.title}, cold", "baseline", [record.latency_ms for record in started(baseline)]))
    return [item for item in series if item.milliseconds]


def _by_function(product: RunData, baseline: RunData) -> dict[str, list[Series]]:
    panels: dict[str, list[Series]] = {}
    for function in sorted({record.function for record in product.result.records}):
        ours = [record.latency_ms for record in restored(product) if record.function == function]
        theirs = [record.latency_ms for record in started(baseline) if record.function == function]
        panels[function] = [Series(product.title, "restore", ours), Series(baseline.title, "baseline", theirs)]
    return panels


def _functions_table(product: RunData, baseline: RunData) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = ["function", *(f"{kind} {what}" for kind in ("restored", "cold") for what in ("n", "p50 ms", "p99 ms", "max ms"))]
    rows: list[Sequence[str]] = []
    for function in product.result.by_function:
        row = [function]
        ours, theirs = (latency(r for r in found if r.function == function) for found in (restored(product), started(baseline)))
        for found in (ours, theirs):
            row += [str(found.n), *(_figures(found.p50_ms, found.p99_ms, found.max_ms) if found.n else ("", "", ""))]
        rows.append([*row, f"{theirs.p50_ms / ours.p50_ms:,.1f}x" if ours.n and theirs.n else ""])
    return [*header, "quicker (p50)"], rows


def _waterfalls(product: RunData) -> list[str]:
    starts = restored_starts(product)
    if not starts:
        return [section("Waterfalls", "No start of this run was restored.")]
    chosen = {"The median start": starts[(len(starts) - 1) // 2], "The slowest start": starts[-1]}
    return [section(heading, plots.waterfall(start), _caption(start)) for heading, start in chosen.items()]


def _caption(start: StartRecord) -> str:
    amounts = [f"{count:,} bytes from {tier}" for tier, count in start.bytes_by_tier.items() if count]
    amounts += [f"{start.pages_prefetched:,} pages prefetched", f"{start.pages_faulted:,} faulted", f"{start.s3_gets} GETs"]
    trace = start.traceparent.split("-")[1] if start.traceparent.count("-") >= 3 else ""
    return (
        f"{start.function}, {start.start_mode}, {start.total_ns / 1e6:,.1f} ms. {', '.join(amounts)}."
        + (f" {start.fallback_reason}." if start.fallback_reason else "")
        + (f" Trace {trace}." if trace else "")
    )


def _starts(run: RunData, baseline: RunData) -> list[tuple[float, float, str]]:
    began = run.result.started_ns
    found = [
        ((start.started_ns - began) / 1e9, start.total_ns / 1e6, "baseline" if run is baseline else start.start_mode)
        for start in run.starts
        if start.outcome == "ready" and start.total_ns > 0
    ]
    return sorted(found, key=lambda item: list(plots.COLOURS).index(item[2]))


def _phases_table(product: RunData, baseline: RunData) -> tuple[Sequence[str], list[Sequence[str]]]:
    groups: dict[str, list[StartRecord]] = {
        mode: [start for start in product.starts if start.start_mode == mode and start.outcome == "ready"] for mode in START_MODES
    }
    groups[f"cold, {baseline.title}"] = [start for start in baseline.starts if start.outcome == "ready"]
    groups = {name: starts for name, starts in groups.items() if starts}
    names = _in_order(start for starts in groups.values() for start in starts)
    durations = {group: [_durations(start) for start in starts] for group, starts in groups.items()}
    rows: list[Sequence[str]] = []
    for name in (*names, _UNACCOUNTED, "whole start"):
        cells = [name]
        for found in durations.values():
            values = [each[name] for each in found if name in each]
            cells.append(_figures(statistics.median(values))[0] if values else "")
        rows.append(cells)
    return ("phase", *(f"{name} (n = {len(starts)})" for name, starts in groups.items())), rows


def _in_order(starts: Iterable[StartRecord]) -> list[str]:
    """Phase names in the order in which phases begin; one that only some starts have comes after what is before it there."""
    names: list[str] = []
    for start in starts:
        place = 0
        for phase in sorted(start.phases, key=lambda phase: phase.start_ns):
            if phase.name not in names:
                names.insert(place, phase.name)
            place = names.index(phase.name) + 1
    return names


def _durations(start: StartRecord) -> dict[str, float]:
    found: dict[str, float] = collections.defaultdict(float)
    for phase in start.phases:
        found[phase.name] += (phase.end_ns - phase.start_ns) / 1e6
    return {**found, _UNACCOUNTED: start.unaccounted_ns / 1e6, "whole start": start.total_ns / 1e6}


def _tokens_table(product: RunData, baseline: RunData) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows: list[Sequence[str]] = [
        (run.title, function, kind, str(found.instances), str(found.tokens))
        for run in (product, baseline)
        for function, kinds in run.result.tokens.items()
        for kind, found in kinds.items()
    ]
    return ("run", "function", "instances that were", "number", "different tokens"), rows


def _figures(*milliseconds: float) -> list[str]:
    return [f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in milliseconds]


def _write_raw(out: Path, run: RunData) -> list[str]:
    requests, starts = f"requests-{run.name}.jsonl", f"starts-{run.name}.jsonl"
    _write_lines(out / requests, run.result.records)
    _write_lines(out / starts, run.starts)
    names = [requests, starts, *_write_json(out, f"result-{run.name}.json", run.result.summary())]
    for source in run.spans:
        name = f"spans-{run.name}-{source.stem}.jsonl"
        shutil.copyfile(source, out / name)
        names.append(name)
    return names


def _write_lines(path: Path, items: Iterable[msgspec.Struct]) -> None:
    with path.open("wb") as file:
        file.writelines(msgspec.json.encode(item) + b"\n" for item in items)


def _write_json(out: Path, name: str, value: object) -> list[str]:
    (out / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return [name]
