"""Reads traces: Azure 2019 minute files, event files and ``.npz``.

In: a path. Out: a :class:`~scaler.simulate.model.Trace`, for :mod:`scaler.simulate.run`; or the bare counts, for
:mod:`scaler.simulate.minute`.

Formats, told by what is there:

- a folder with ``invocations.csv`` (HashOwner, HashApp, HashFunction, Trigger, then a column per minute),
  ``durations.csv`` and ``memory.csv``, joined by HashFunction (Shahrad et al., ATC 2020; In-Vitro samples);
- a folder with ``*_inv.csv``, ``*_run.csv`` and ``*_mem.csv``: the same from samples whose ids do not join, so that
  durations and memory are paired with functions by a seeded shuffle;
- a ``.csv`` of events: function, end time and duration in seconds;
- a ``.npz`` with ``counts`` [functions, minutes] and ``memory_mb`` [functions].

Any of the text files may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaler.errors import TraceUnreadable
from scaler.simulate.arrivals import MINUTE_S, periodic, place
from scaler.simulate.model import DEFAULT_MEMORY_MB, FunctionTrace, Trace

#: Duration of a request where the trace has none: about the median over the functions of azure2019-500f-8h.
DEFAULT_DURATION_S = 0.3
_SHORTEST_S, _LONGEST_S = 0.001, 60.0
#: The percentiles of durations that Azure 2019 has.
_PERCENTS = (0, 1, 25, 50, 75, 99, 100)


@dataclass(frozen=True)
class MinuteTrace:
    """Requests per minute, before they are placed.

    Attributes:
        names: functions.
        counts: requests, [functions, minutes].
        memory_mb: [functions].
        durations_s: [functions].
        triggers: the trace's word; empty strings when it has none.
        percentiles_s: percentiles 0, 1, 25, 50, 75, 99 and 100 of each function's durations, [functions, 7]; None: the
            trace has none.
    """

    name: str
    names: list[str]
    counts: NDArray[np.int64]
    memory_mb: NDArray[np.float64]
    durations_s: NDArray[np.float64]
    triggers: list[str]
    percentiles_s: NDArray[np.float64] | None = None


def read(
    path: Path,
    *,
    seed: int = 1,
    jitter_s: float | None = 0.05,
    subset: str = "",
    memory_mb: float | None = None,
    varying: bool = False,
) -> Trace:
    """The trace at ``path``, its requests placed within their minutes.

    Args:
        path: file or folder.
        seed: of the placement.
        jitter_s: of timers; None: uniform.
        subset: name of a sample in the folder's ``subset_ids.json``; with a leading ``-``: all but it.
        memory_mb: of every function, in place of the trace's.
        varying: draw each request's duration from its function's percentiles, linear between them, in place of their
            median. Where requests are and what else is drawn stays the same. A trace of events has its own durations.

    Raises:
        TraceUnreadable: it is none of the known formats, or damaged, or has no percentiles.
    """
    with _readable(path):
        if has_own_times(path):
            return _events(path, DEFAULT_MEMORY_MB if memory_mb is None else memory_mb)
        minutes = _minutes(path, seed, memory_mb)
        keep = _subset(path, minutes.names, subset) if subset else None
        has_triggers = any(minutes.triggers)
        timers = np.array([word == "timer" for word in minutes.triggers]) if has_triggers else periodic(minutes.counts)
        functions = place(
            minutes.names,
            minutes.counts,
            timers,
            minutes.durations_s,
            minutes.memory_mb,
            minutes.triggers if has_triggers else ["timer" if timer else "" for timer in timers],
            seed=seed,
            jitter_s=jitter_s,
            keep=keep,
        )
        if varying:
            if minutes.percentiles_s is None:
                raise ValueError("it has no percentiles of durations")
            percentiles_s = dict(zip(minutes.names, minutes.percentiles_s, strict=True))
            functions = [_varying(function, percentiles_s[function.name], seed) for function in functions]
    return Trace(_title(minutes.name, subset), minutes.counts.shape[1] * MINUTE_S, functions)


def _varying(function: FunctionTrace, percentiles_s: NDArray[np.float64], seed: int) -> FunctionTrace:
    luck = np.random.default_rng((seed, zlib.crc32(function.name.encode()), 1)).random(len(function.at_s))
    drawn_s = np.interp(luck * 100, _PERCENTS, np.maximum.accumulate(percentiles_s))
    return replace(function, duration_s=np.clip(drawn_s, _SHORTEST_S, _LONGEST_S))


def has_own_times(path: Path) -> bool:
    """The trace says when each request came; nothing has to be placed."""
    return path.is_file() and ".npz" not in path.suffixes


def read_minutes(path: Path, *, seed: int = 1, subset: str = "", memory_mb: float | None = None) -> MinuteTrace:
    """The trace at ``path`` as requests per minute.

    Args:
        path: file or folder.
        seed: of the pairing of functions with durations and memory, where their ids do not join.
        subset: see :func:`read`.
        memory_mb: see :func:`read`.

    Raises:
        TraceUnreadable: it is none of the known formats, or damaged, or has single events.
    """
    with _readable(path):
        if has_own_times(path):
            raise ValueError("it has single events, and minute mode wants requests per minute")
        minutes = _minutes(path, seed, memory_mb)
        if not subset:
            return minutes
        keep = np.flatnonzero(_subset(path, minutes.names, subset))
    return MinuteTrace(
        _title(minutes.name, subset),
        [minutes.names[index] for index in keep],
        minutes.counts[keep],
        minutes.memory_mb[keep],
        minutes.durations_s[keep],
        [minutes.triggers[index] for index in keep],
        minutes.percentiles_s[keep] if minutes.percentiles_s is not None else None,
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TraceUnreadable(f"{path} can't be read as a trace: {error}; scaler/simulate/traces.py says which formats can") from error


def _title(name: str, subset: str) -> str:
    return name + (f" ({subset})" if subset else "")


def _minutes(path: Path, seed: int, memory_mb: float | None) -> MinuteTrace:
    minutes = _minute_files(path, seed)
    return minutes if memory_mb is None else replace(minutes, memory_mb=np.full(len(minutes.names), memory_mb))


def _minute_files(path: Path, seed: int) -> MinuteTrace:
    if path.suffix == ".npz":
        with np.load(path) as archive:
            counts = archive["counts"].astype(np.int64)
            memory_mb = archive["memory_mb"].astype(np.float64)
        if counts.ndim != 2 or memory_mb.shape != counts.shape[:1]:
            raise ValueError(f"counts is {counts.shape} and memory_mb {memory_mb.shape}")
        names = [str(index) for index in range(len(counts))]
        return MinuteTrace(path.stem, names, counts, memory_mb, np.full(len(counts), DEFAULT_DURATION_S), [""] * len(counts))
    if (joined := _find(path, "invocations.csv")) is not None:
        header, *rows = _rows(joined)
        first = header.index("Trigger") + 1
        names = [row[header.index("HashFunction")] for row in rows]
        counts = np.array([[int(value) for value in row[first:]] for row in rows], np.int64)
        memory = dict(_column(_required(path, "memory.csv"), "AverageAllocatedMb"))
        median_ms = dict(_column(_required(path, "durations.csv"), "percentile_Average_50"))
        memory_mb = np.array([memory[name] for name in names])
        durations_s = np.array([median_ms[name] for name in names]) / 1000
        triggers = [row[header.index("Trigger")] for row in rows]
        percentiles = _percentiles(_required(path, "durations.csv"))
        percentiles_s = np.array([percentiles[name] for name in names]) / 1000 if percentiles else None
    else:
        header, *rows = _rows(_only(path, "*_inv.csv*"))
        first = next(index for index, word in enumerate(header) if word.endswith("_minute"))
        names = [row[header.index("HashFunction")] for row in rows]
        counts = np.array([[int(value) for value in row[first:]] for row in rows], np.int64)
        random = np.random.default_rng(seed)
        memories = _values(_only(path, "*_mem.csv*"), "AverageAllocatedMb")
        medians_ms = _values(_only(path, "*_run.csv*"), "percentile_Average_50")
        memory_mb = random.permutation(np.resize(np.array(memories), len(names)))
        paired = random.permutation(np.resize(np.arange(len(medians_ms)), len(names)))
        durations_s = np.array(medians_ms)[paired] / 1000
        triggers = [""] * len(names)
        percentiles = _percentiles(_only(path, "*_run.csv*"))
        percentiles_s = np.array(list(percentiles.values()))[paired] / 1000 if len(percentiles) == len(medians_ms) else None
    return MinuteTrace(path.name, names, counts, memory_mb, np.clip(durations_s, _SHORTEST_S, _LONGEST_S), triggers, percentiles_s)


def _percentiles(path: Path) -> dict[str, list[float]]:
    """Percentiles of each function's durations, ms; empty when the file has not all of them."""
    header, *rows = _rows(path)
    columns = [f"percentile_Average_{percent}" for percent in _PERCENTS]
    if not set(columns) <= set(header):
        return {}
    where = [header.index(column) for column in columns]
    return {row[header.index("HashFunction")]: [float(row[index]) for index in where] for row in rows}


def _events(path: Path, memory_mb: float) -> Trace:
    header, *rows = _rows(path)
    words = [word.strip().lower() for word in header]
    function = words.index("func" if "func" in words else "function")
    duration = words.index("duration")
    at, ends = (words.index("end_timestamp"), True) if "end_timestamp" in words else (words.index("time"), False)
    requests: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        seconds = float(row[duration])
        requests.setdefault(row[function], []).append((float(row[at]) - (seconds if ends else 0.0), seconds))
    begin_s = min((item[0][0] for item in map(sorted, requests.values())), default=0.0)
    functions = []
    span_s = 0.0
    for name in sorted(requests):
        table = np.array(sorted(requests[name]))
        table[:, 0] -= begin_s
        span_s = max(span_s, float((table[:, 0] + table[:, 1]).max()))
        functions.append(FunctionTrace(name, table[:, 0].copy(), np.maximum(table[:, 1], _SHORTEST_S), memory_mb))
    return Trace(path.name, span_s, functions)


def _subset(path: Path, names: list[str], subset: str) -> NDArray[np.bool_]:
    found = _required(path, "subset_ids.json")
    with _open(found) as file:
        chosen = set(json.load(file)[subset.removeprefix("-")])
    inside = np.array([name in chosen for name in names])
    return ~inside if subset.startswith("-") else inside


def _values(path: Path, name: str) -> list[float]:
    header, *rows = _rows(path)
    value = header.index(name)
    return [float(row[value]) for row in rows]


def _column(path: Path, name: str) -> Iterator[tuple[str, float]]:
    header, *rows = _rows(path)
    key, value = header.index("HashFunction"), header.index(name)
    for row in rows:
        yield row[key], float(row[value])


def _rows(path: Path) -> list[list[str]]:
    with _open(path) as file:
        return [row for row in csv.reader(file) if row]


def _open(path: Path) -> io.TextIOBase:
    return io.TextIOWrapper(gzip.open(path)) if path.suffix == ".gz" else path.open(encoding="utf-8", newline="")


def _find(folder: Path, name: str) -> Path | None:
    return next((found for found in (folder / name, folder / f"{name}.gz") if found.exists()), None)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"there are {len(found)} files {pattern} in {folder}, and there should be one")
    return found[0]


def _required(folder: Path, name: str) -> Path:
    found = _find(folder, name)
    if found is None:
        raise FileNotFoundError(f"{name} or {name}.gz is not in {folder}")
    return found
