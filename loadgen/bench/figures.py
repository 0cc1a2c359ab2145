"""From start records to figures: pure, so that everything the bench says can be computed again from its raw data.

In: :class:`~agent.api.records.StartRecord` values and what was asked for. Out: percentiles, phases, and how often a start was something
else than asked. Used by every part of :mod:`loadgen.bench`.
"""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from agent.api.records import StartRecord

#: What the bench asks for, in the order of its tables. ``whole`` is a restore with every page before resume: CRIU's own way.
MODES = ("thaw", "restore", "remote", "whole", "cold")
#: A restore that read this share of the image before its response was one of the whole image.
_WHOLE_SHARE = 0.8
_PAGE_BYTES = 4096


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the bench.

    Attributes:
        part: of the bench, such as ``modes`` or ``fanout-100``.
        asked: the mode that it was to be.
        kind: what it was by evidence: the asked mode, another, or ``failed: REASON``.
        record: as the agent (or the scaler) wrote it.
    """

    part: str
    asked: str
    kind: str
    record: StartRecord


def kind_of(asked: str, record: StartRecord, image_bytes: int) -> str:
    """What a start was, by what its record shows.

    >>> kind_of("whole", StartRecord(command_id="1", function="f", start_mode="restore", pages_prefetched=100), 1_000_000)
    'restore'
    """
    if record.outcome != "ready":
        return f"failed: {record.outcome}"
    if asked == "whole" and record.start_mode == "restore":
        read_bytes = max(record.pages_prefetched * _PAGE_BYTES, sum(record.bytes_by_tier.values()))
        return "whole" if read_bytes >= _WHOLE_SHARE * image_bytes else "restore"
    return record.start_mode


def counted(measured: Iterable[Measured], asked: str) -> list[StartRecord]:
    """Records of the starts that were what they were to be."""
    return [item.record for item in measured if item.asked == asked and item.kind == asked]


def others(measured: Iterable[Measured]) -> dict[str, dict[str, int]]:
    """Of the starts that came out differently: asked mode → what it was → how often."""
    found: dict[str, dict[str, int]] = {}
    for item in measured:
        if item.kind != item.asked:
            kinds = found.setdefault(item.asked, {})
            kinds[item.kind] = kinds.get(item.kind, 0) + 1
    return found


def summary(records: Sequence[StartRecord]) -> dict[str, Any]:
    """Percentiles of the whole start, and the median ms of each phase."""
    phases: dict[str, list[float]] = collections.defaultdict(list)
    for record in records:
        for phase in record.phases:
            phases[phase.name].append((phase.end_ns - phase.start_ns) / 1e6)
        phases["unaccounted"].append(record.unaccounted_ns / 1e6)
    return {
        **distribution([record.total_ns / 1e6 for record in records]),
        "phases_ms": {name: round(statistics.median(values), 2) for name, values in phases.items()},
    }


def distribution(milliseconds: Iterable[float]) -> dict[str, Any]:
    """Number, percentiles and largest of values; zeros of none."""
    values = sorted(milliseconds)
    return {
        "n": len(values),
        **{f"p{share}_ms": round(percentile(values, share), 2) for share in (50, 90, 99)},
        "max_ms": round(values[-1], 2) if values else 0.0,
    }


def percentile(values: Sequence[float], share: int) -> float:
    """Nearest-rank percentile: the value that at least ``share`` % of all do not exceed; 0 of none.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50)
    2.0
    """
    return sorted(values)[max(0, -(-len(values) * share // 100) - 1)] if values else 0.0


def median(values: Iterable[float], digits: int = 2) -> float:
    """Median, rounded; 0 of none."""
    found = list(values)
    return round(statistics.median(found), digits) if found else 0.0


def exclusive_ms(record: StartRecord) -> dict[str, float]:
    """Each instant of a start given to one phase, the one that began last: unlike the phases' own durations these add up to the whole.

    >>> from agent.api.records import Phase
    >>> phases = [Phase("criu.restore", 0, 6_000_000), Phase("prefetch", 2_000_000, 4_000_000)]
    >>> exclusive_ms(StartRecord(command_id="1", function="f", ended_ns=10_000_000, phases=phases))
    {'criu.restore': 4.0, 'prefetch': 2.0, 'unaccounted': 4.0}
    """
    phases = sorted(record.phases, key=lambda phase: phase.start_ns)
    inside = [(max(phase.start_ns, record.started_ns), min(phase.end_ns, record.ended_ns), phase.name) for phase in phases]
    cuts = sorted({record.started_ns, record.ended_ns, *(at for start, end, _ in inside if start < end for at in (start, end))})
    found: dict[str, int] = {name: 0 for _, _, name in inside} | {"unaccounted": 0}
    for since, until in itertools.pairwise(cuts):
        names = [name for start, end, name in inside if start <= since and until <= end]
        found[names[-1] if names else "unaccounted"] += until - since
    return {name: value_ns / 1e6 for name, value_ns in found.items()}


def middle_half(records: Sequence[StartRecord]) -> list[StartRecord]:
    """The starts between the quartiles of the total: what a usual start looks like, without the median's habit of not adding up."""
    ordered = sorted(records, key=lambda record: record.total_ns)
    quarter = len(ordered) // 4
    return ordered[quarter : len(ordered) - quarter]


def ratio(above: float, below: float) -> float:
    """Quotient, rounded; 0 when there is nothing to divide by."""
    return round(above / below, 2) if below else 0.0
