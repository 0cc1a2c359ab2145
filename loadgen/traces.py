"""Arrivals of production traces. Pure but for reading the file; same arguments, same arrivals.

In: a CSV file, gzipped or not, in one of the two published Azure forms: events
(``app,func,end_timestamp,duration``; 2021) or counts per minute (``HashOwner,HashApp,HashFunction,…,1,2,3…``; 2019).
Out: lists of :class:`loadgen.arrivals.Arrival`: a slice of the trace, played faster or slower, with each function of
the trace standing for a deployed one. How long an invocation took in production is not replayed: the deployed function
takes the time that it takes. Next: :mod:`loadgen.driver`.
"""

from __future__ import annotations

import collections
import csv
import gzip
import io
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from loadgen.arrivals import ROWS, Arrival
from loadgen.errors import TraceInvalid

#: The trace that comes with Thaw: 998 invocations of 49 functions in 108 minutes of Azure Functions, January 2021.
SHIPPED = Path(__file__).parent / "traces" / "azure2021-events-999" / "events.csv.gz"
#: In an explicit mapping, stands for every function of the trace that is not named.
REST = "*"

_MINUTE = re.compile(r"(\d+)(_minute)?")
#: A start that the trace's rounding puts before its beginning still belongs to it.
_EARLIEST_S = 0.0


def read(path: Path, *, from_s: float = 0.0, to_s: float = math.inf, seed: int = 0) -> list[tuple[float, str]]:
    """Read invocations that begin in ``[from_s, to_s)`` of the trace's own time.

    Args:
        path: CSV or CSV.gz; the header tells which form it is.
        from_s: start of the slice, s since the start of the trace.
        to_s: end of the slice, not included.
        seed: where invocations lie within their minute, for the minute form.

    Returns:
        Start time (s since ``from_s``) and function name of the trace, ordered by time.

    Raises:
        TraceInvalid: no such file, not one of the known forms, a wrong value; the message names the line.
    """
    if not from_s < to_s:
        raise TraceInvalid(f"the slice from {from_s} s to {to_s} s of {path} is empty")
    invocations = []
    try:
        with _open(path) as file:
            rows = csv.reader(file)
            header = next(rows, [])
            parse = _form(header, path, seed)
            for row in rows:
                try:
                    invocations += [(at - from_s, name) for at, name in parse(row, from_s, to_s) if from_s <= at < to_s]
                except (ValueError, IndexError) as error:
                    raise TraceInvalid(f"{path}:{rows.line_num}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise TraceInvalid(f"cannot read trace {path}: {error}") from error
    invocations.sort()
    return invocations


def replay(
    invocations: Sequence[tuple[float, str]],
    functions: Sequence[str],
    *,
    mapping: Mapping[str, str] | None = None,
    time_factor: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Turn invocations of a trace into arrivals at deployed functions.

    Args:
        invocations: of :func:`read`.
        functions: deployed functions; without ``mapping`` the trace's functions stand for them in turn, the most
            invoked first.
        mapping: beginning of a trace function's name, or :data:`REST`, to deployed function; what it does not name
            is left out.
        time_factor: how many times faster than the trace: 10 plays ten minutes in one.
        seed: of the rows that are asked for.

    Raises:
        TraceInvalid: no function, a time factor that is not positive, or a mapping that matches nothing.
    """
    if not 0 < time_factor < math.inf:
        raise TraceInvalid(f"the time factor must be above 0, not {time_factor}")
    counts = collections.Counter(name for _, name in invocations)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    if mapping:
        stands_for = {name: target for name in ranked if (target := _mapped(name, mapping)) is not None}
        if ranked and not stands_for:
            raise TraceInvalid(f"the mapping matches none of the trace's {len(ranked)} functions, such as {ranked[0]}")
    elif functions:
        stands_for = {name: functions[rank % len(functions)] for rank, name in enumerate(ranked)}
    else:
        raise TraceInvalid("no function to replay the trace on")
    source = random.Random(seed)
    return [Arrival(at_s / time_factor, stands_for[name], source.randrange(ROWS), name) for at_s, name in invocations if name in stands_for]


def _mapped(name: str, mapping: Mapping[str, str]) -> str | None:
    prefixes = [prefix for prefix in mapping if prefix != REST and name.startswith(prefix)]
    return mapping[max(prefixes, key=len)] if prefixes else mapping.get(REST)


def _open(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


_Parser = Callable[[list[str], float, float], Iterator[tuple[float, str]]]


def _form(header: Sequence[str], path: Path, seed: int) -> _Parser:
    names = {name: index for index, name in enumerate(header)}
    if {"app", "func", "end_timestamp", "duration"} <= names.keys():
        return _events_parser(names)
    if {"HashOwner", "HashApp", "HashFunction"} <= names.keys():
        minutes = [(index, int(match[1])) for index, name in enumerate(header) if (match := _MINUTE.fullmatch(name))]
        if minutes:
            return _minutes_parser(names["HashFunction"], minutes, seed)
    raise TraceInvalid(
        f"{path}:1: this is neither a trace of events (app,func,end_timestamp,duration) "
        "nor one of minutes (HashOwner,HashApp,HashFunction,1,2,…)"
    )


def _events_parser(names: Mapping[str, int]) -> _Parser:
    app, func, end, duration = (names[name] for name in ("app", "func", "end_timestamp", "duration"))

    def parse(row: list[str], _from_s: float, _to_s: float) -> Iterator[tuple[float, str]]:
        start = float(row[end]) - float(row[duration])
        if not math.isfinite(start):
            raise ValueError(f"{row[end]!r} and {row[duration]!r} are not times")
        # The same function name may occur in several apps; the pair is what was deployed.
        yield max(_EARLIEST_S, start), f"{row[func]}/{row[app]}"

    return parse


def _minutes_parser(function: int, minutes: Sequence[tuple[int, int]], seed: int) -> _Parser:
    first = min(number for _, number in minutes)
    spans = [(index, 60.0 * (number - first)) for index, number in minutes]

    def parse(row: list[str], from_s: float, to_s: float) -> Iterator[tuple[float, str]]:
        for index, start in spans:
            if start + 60 <= from_s or start >= to_s:
                continue
            count = int(row[index])
            if count < 0:
                raise ValueError(f"{count} invocations in minute {start / 60:.0f}")
            if count:
                # Seeded by place, not by order of reading: a slice holds exactly what the whole trace holds there.
                source = random.Random(f"{seed}/{row[function]}/{start}")
                yield from ((start + 60 * source.random(), row[function]) for _ in range(count))

    return parse
