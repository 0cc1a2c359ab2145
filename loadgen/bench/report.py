"""The bench's report: one HTML file that opens anywhere, the result as JSON, and every start record beside them.

In: the result of :mod:`loadgen.bench.run` and the starts it was computed from. Out: ``report.html``, ``restore.json``, ``starts.jsonl``.
"""

from __future__ import annotations

import collections
import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.api.records import StartRecord
from loadgen import plots
from loadgen.bench import goals
from loadgen.bench.figures import MODES, Measured, counted, exclusive_ms, middle_half, ratio
from loadgen.page import page, section, table, tiles
from loadgen.plots import Series

REPORT_FILE, RESULT_FILE, STARTS_FILE = "report.html", "restore.json", "starts.jsonl"
_FROM_COMMAND = "ms from the command at the agent to the first response"
_MODES_NOTE = (
    "thaw: a standby, restored before and left stopped, is resumed. restore: lazy, image in the node's cache. remote: the cache was "
    "emptied before. whole: the same image with every page before resume, as criu restore does it. cold: the command is run, in the same "
    "kind of sandbox."
)
_PHASES_NOTE = (
    "Mean over the starts between the quartiles of the total. Each instant is given to the phase that began last, so the parts add up to "
    "the whole (the figure beside the mode); unaccounted is what no phase covers. Each bar has its own axis."
)


def write(out: Path, result: Mapping[str, Any], measured: Sequence[Measured], began_ns: int) -> Path:
    """Write result, raw records and report; returns the HTML file.

    Args:
        out: folder; made when it is not there.
        result: of :mod:`loadgen.bench.run`.
        measured: every start of the run.
        began_ns: wall clock ns.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
    with (out / STARTS_FILE).open("wb") as file:
        file.writelines(msgspec.json.encode(item) + b"\n" for item in measured)
    functions: Mapping[str, Any] = result["functions"]
    body = [
        tiles(_headline(result)),
        section("Targets", table(*_goals(result)), "For two shared cores on a quiet machine, and the 512 MB function index."),
        section("Start to first response, by function and mode", table(*_percentiles(functions)), _MODES_NOTE),
        section("Ratios and memory", table(*_ratios(functions))),
        *_phases(functions, measured),
        *_waterfalls(result, measured),
        *_demand(result.get("demand_to_response") or {}),
        *_fanout(result, measured),
        *_density(result.get("density") or {}),
        section(
            "Checked requests", table(*_requests(functions)), f"{result['wrong']} wrong or missing answers and crashes in the whole run."
        ),
        section("What was not as asked", *_failures(result)),
        section("How it was measured", _method(result)),
        section("The machine", table(("", ""), list(result["machine"].items()))),
        section(
            "Raw data",
            "Every figure above follows from these files.",
            [f'<a href="{name}">{name}</a>' for name in (RESULT_FILE, STARTS_FILE)],
        ),
    ]
    began = datetime.datetime.fromtimestamp(began_ns / 1e9, datetime.UTC)
    path = out / REPORT_FILE
    path.write_text(page("Thaw: what a start costs", f"{began:%Y-%m-%d %H:%M} UTC", body), encoding="utf-8")
    return path


def rows_by_function(functions: Mapping[str, Any]) -> list[tuple[str, dict[str, float], float, float]]:
    """For tables: function, p50 by mode (of those that were measured), cold / thaw and whole / restore."""
    rows = []
    for name, found in functions.items():
        p50 = {mode: found[mode]["p50_ms"] for mode in MODES if found.get(mode, {}).get("n")}
        rows.append((name, p50, ratio(p50.get("cold", 0), p50.get("thaw", 0)), ratio(p50.get("whole", 0), p50.get("restore", 0))))
    return rows


def _headline(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = result.get("subject", "")
    found = result["functions"].get(name, {})
    demand = (result.get("demand_to_response") or {}).get("thaw", {})
    rows = {row[0]: row for row in rows_by_function(result["functions"])}
    _, p50, thawed, restored = rows.get(name, (name, {}, 0.0, 0.0))
    thawed_note = f"p50; cold {_ms(p50['cold'])}: {thawed:,.0f} times as long" if thawed else "p50"
    restored_note = f"p50; whole image {_ms(p50['whole'])}: {restored:,.0f} times as long" if restored else "p50"
    cold_mb = found.get("cold_pss_mb", 0.0)
    return [
        (_ms(p50.get("thaw")), f"thaw, {name}", thawed_note),
        (_ms(p50.get("restore")), "restore from the cache", restored_note),
        (_ms(demand.get("p50_ms") if demand.get("n") else None), "demand record to response", "p50 from standby, through the real broker"),
        (
            f"{found.get('standby_pss_mb', 0):,.1f} MB",
            "memory of a standby",
            "PSS" + (f"; the instance started cold holds {cold_mb:,.0f} MB" if cold_mb else ""),
        ),
    ]


def _goals(result: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    return ("what", "target", "figure", "", ""), [(g.what, g.target, g.shown, g.verdict, g.note) for g in goals.judge(result)]


def _percentiles(functions: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = ("function", "mode", "n", "p50 ms", "p90 ms", "p99 ms", "max ms", "bytes before the response")
    rows: list[Sequence[str]] = []
    for name, found in functions.items():
        for mode in MODES:
            if mode in found:
                tiers = ", ".join(f"{value:,} {tier}" for tier, value in found["bytes_by_tier"].get(mode, {}).items() if value)
                rows.append((name, mode, *_distribution(found[mode]), tiers))
    return header, rows


def _distribution(found: Mapping[str, Any]) -> list[str]:
    if not found.get("n"):
        return [str(found.get("n", 0)), "", "", "", ""]
    return [str(found["n"]), *(_figure(found[field]) for field in ("p50_ms", "p90_ms", "p99_ms", "max_ms"))]


def _ratios(functions: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = (
        "function",
        "cold / thaw",
        "whole / restore",
        "image MB",
        "working set MB",
        "remote: MB before response",
        "standby MB",
        "cold MB",
    )
    rows: list[Sequence[str]] = []
    for name, _, thawed, restored in rows_by_function(functions):
        found = functions[name]
        megabytes = [found[field] / 1e6 for field in ("image_bytes", "working_set_bytes", "remote_bytes_before_response")]
        memory = [found["standby_pss_mb"], found["cold_pss_mb"]]
        factors = [f"{value:,.1f}x" if value else "" for value in (thawed, restored)]
        rows.append((name, *factors, *(f"{value:,.2f}" if value else "" for value in (*megabytes, *memory))))
    return header, rows


def _phases(functions: Mapping[str, Any], measured: Sequence[Measured]) -> list[str]:
    sections = []
    for name in functions:
        mine = [item for item in measured if item.part == "modes" and item.record.function == name]
        bars = {mode: usual(counted(mine, mode)) for mode in MODES}
        bars = {mode: bar for mode, bar in bars.items() if bar}
        if bars:
            sections.append(section(f"Where the time goes: {name}", plots.stacked_phases(bars, name), _PHASES_NOTE))
    return sections


def usual(records: Sequence[StartRecord]) -> dict[str, float]:
    """Mean ms of each phase over the middle half of starts, without overlaps, in the order in which phases begin."""
    middle = middle_half(records)
    each = [exclusive_ms(record) for record in middle]
    begins: dict[str, list[int]] = collections.defaultdict(list)
    for record in middle:
        for phase in record.phases:
            begins[phase.name].append(phase.start_ns - record.started_ns)
    names = [*sorted(begins, key=lambda name: statistics.median(begins[name])), "unaccounted"]
    return {name: sum(found.get(name, 0.0) for found in each) / len(each) for name in names} if each else {}


def _waterfalls(result: Mapping[str, Any], measured: Sequence[Measured]) -> list[str]:
    """The median start of each mode of the function that the targets are about."""
    mine = [item for item in measured if item.part == "modes" and item.record.function == result.get("subject")]
    sections = []
    for mode in MODES:
        ordered = sorted(counted(mine, mode), key=lambda record: record.total_ns)
        if ordered:
            middle = ordered[(len(ordered) - 1) // 2]
            pages = f"{middle.pages_prefetched:,} pages prefetched, {middle.pages_faulted:,} faulted"
            caption = f"{middle.function}, {middle.total_ns / 1e6:,.2f} ms, {pages}."
            sections.append(section(f"The median start: {mode}", plots.waterfall(middle, "command"), caption))
    return sections


def _demand(found: Mapping[str, Any]) -> list[str]:
    modes = [mode for mode in MODES if mode in found]
    if not modes:
        return []
    rows: list[Sequence[str]] = []
    for mode in modes:
        rows.append((mode, "first response", *_distribution(found[mode])))
        rows.append((mode, "whole answer at the client", *_distribution(found[mode]["answer"])))
    phases = list(dict.fromkeys(name for mode in modes for name in found[mode]["phases_ms"]))
    by_phase = [(name, *(_figure(found[mode]["phases_ms"].get(name)) for mode in modes)) for name in phases]
    return [
        section(
            "From the demand record to the response",
            table(("mode", "until", "n", "p50 ms", "p90 ms", "p99 ms", "max ms"), rows),
            "Through the real broker, the scaler and the agent, one request at a time; from the event time of the demand record on.",
            table(("phase, median ms", *modes), by_phase),
        )
    ]


def _fanout(result: Mapping[str, Any], measured: Sequence[Measured]) -> list[str]:
    found = result.get("fanout") or {}
    if not found:
        return []
    fields = (
        "first_ms",
        "median_ms",
        "last_ms",
        "cpu_ms_each",
        "cpu_ms_one",
        "last_to_cpu_bound",
        "last_to_cpu_used",
        "background_percent",
        "repeats",
    )
    header = (
        "at once",
        "first ms",
        "median ms",
        "last ms",
        "CPU ms each",
        "CPU ms of one alone",
        "last / (n x CPU of one / cores)",
        "last / (n x CPU each / cores)",
        "used by others, % of a core",
        "repeats",
    )
    rows = [(size, *(_figure(item[field]) for field in fields)) for size, item in found.items()]
    name = result.get("subject", "")
    starts = {size: [item for item in measured if item.part == f"fanout-{size}" and item.record.function == name] for size in found}
    kinds = ("remote", "restore", "thaw", "cold", "whole", "baseline", "warm")
    series = [
        Series(f"{size} at once", kind, [record.total_ns / 1e6 for record in counted(items, "restore")])
        for (size, items), kind in zip(starts.items(), kinds, strict=False)
    ]
    drawn = [item for item in series if item.milliseconds]
    figure = [plots.cdf(drawn, _FROM_COMMAND, of="starts", name="fanout")] if drawn else []
    note = (
        "Medians of the repeats, from the first command on the wire. CPU is that of the whole machine, less what it used before, until "
        "the sandboxes taken from the pool are replaced."
    )
    return [section("Many starts at once", table(header, rows), *figure, note)]


def _density(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    rows: list[Sequence[str]] = [
        ("standbys", str(found["standbys"])),
        ("memory of the system in all, MB", _figure(found["system_mb"])),
        ("PSS of each when made, MB", _figure(found["pss_mb"])),
        ("seconds to make them", _figure(found["made_seconds"])),
        ("processor time used when idle, before / with them", " / ".join(f"{value} %" for value in found["idle_cpu_percent"].values())),
        *((f"{mode} with them there, p50 / p99 ms (n = {item['n']})", f"{item['p50_ms']} / {item['p99_ms']}")
          for mode, item in found["with_standbys"].items()),
        *(("refused", text) for text in found["refused"]),
    ]  # fmt: skip
    note = (
        "Memory is MemAvailable before less after. Restores are of a second such function: of one that has standbys every start is a thaw."
    )
    return [section("Many standbys", table(("", ""), rows), note)]


def _requests(functions: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows: list[Sequence[str]] = [
        (name, mode, *(f"{answers[field]:,}" for field in ("asked", "wrong", "failed", "per_second")))
        for name, found in functions.items()
        for mode, answers in found.get("requests", {}).items()
    ]
    return ("function", "after", "asked", "wrong", "not answered", "per second"), rows


def _failures(result: Mapping[str, Any]) -> list[str | Sequence[str]]:
    lines = list(result.get("failed", []))
    sources = {**result["functions"], "demand to response": result.get("demand_to_response") or {}, "density": result.get("density") or {}}
    sources |= {f"{size} at once": found for size, found in (result.get("fanout") or {}).items()}
    for name, found in sources.items():
        for asked, kinds in found.get("other", {}).items():
            lines += [f"{name}: {count} starts that were to be {asked} were {kind}; they are not counted" for kind, count in kinds.items()]
    return [lines] if lines else ["Every start was what it was to be."]


def _method(result: Mapping[str, Any]) -> list[str]:
    return [
        f"Repeat it with: {result['command']}",
        "Command to first response: one start at a time on an otherwise idle node, modes interleaved in rounds so that drift hits all "
        "alike; ends with the first answer to the readiness request.",
        "Cache state: for restore, whole and thaw every page of the image is on the node and in the page cache; for remote nothing "
        "of it is, and pages come from the object store on this machine.",
        "A start counts for a mode only when its record shows that it was of that mode.",
        "The first request after each start, and the requests of the table above, are computed again and compared byte by byte.",
        "Memory of a standby is its PSS when it was made, as the agent reports it; memory of a cold instance is the PSS of all its "
        "processes after its first request.",
    ]


def _ms(value: float | None) -> str:
    return "–" if not value else f"{_figure(value)} ms"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
