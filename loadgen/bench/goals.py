"""What the figures have to be, and whether they are: the bench's result against its targets.

In: the JSON of :mod:`loadgen.bench.run`. Out: one :class:`Goal` per line of the target table, with the figure that was measured. Pure: an
old result can be judged again. Targets are for two shared cores on a quiet machine and the 512 MB Python function ``index``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Starts over which a percentile has to be taken to count.
STARTS_MIN = 30
#: What others may use of the machine before a fan-out says little, percent of a core.
BUSY_PERCENT = 20.0
#: Functions whose cold start takes at least so long, ms, must thaw so many times faster.
_COLD_MS_MIN, _THAW_FACTOR = 200.0, 50.0


@dataclass(frozen=True)
class Goal:
    """One target.

    Attributes:
        what: in words.
        target: with its unit.
        figure: what was measured; None: nothing was.
        met: None when it was not measured.
        note: what limits the figure's weight.
    """

    what: str
    target: str
    figure: float | None
    met: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``met``, ``not met`` or ``not measured``."""
        return "not measured" if self.met is None else "met" if self.met else "not met"

    @property
    def shown(self) -> str:
        """The figure as a person reads it."""
        return "" if self.figure is None else f"{self.figure:,.0f}" if self.figure >= 1000 else f"{self.figure:,.4g}"


def judge(result: Mapping[str, Any]) -> list[Goal]:
    """Every target, in the order of the table."""
    functions: Mapping[str, Any] = result.get("functions", {})
    index: Mapping[str, Any] = functions.get("index", {})
    thaw, restore, remote, whole, cold = (index.get(mode, {}) for mode in ("thaw", "restore", "remote", "whole", "cold"))
    demand = result.get("demand_to_response", {}).get("thaw", {}) if result.get("subject") == "index" else {}
    goals = [
        _most("thaw p50", thaw, "p50_ms", 2.5),
        _most("thaw p99", thaw, "p99_ms", 10.0),
        least("cold start / thaw, p50", _quotient(cold, thaw), 300.0, _note(thaw)),
        _most("restore p50", restore, "p50_ms", 12.0),
        _most("restore p99", restore, "p99_ms", 30.0),
        least("whole-image restore / restore, p50", _quotient(whole, restore), 25.0, _note(restore)),
        _most("remote p50", remote, "p50_ms", 30.0),
        limit("remote: bytes before the first response / working set", _bytes(index, remote), 2.0, "x"),
        _most("demand record to first response from standby, p50", demand, "p50_ms", 7.0),
        _most("demand record to first response from standby, p99", demand, "p99_ms", 25.0),
        limit("memory of a standby", index.get("standby_pss_mb") or None, 4.5, "MB PSS"),
        limit("memory of a standby, of the instance started cold", _share(index), 1.0, "%"),
        *_density(result.get("density") or {}),
        *_fanout(result.get("fanout", {}).get("100") or {}),
        *_others(functions),
    ]
    wrong = result.get("wrong")
    goals.append(Goal("wrong or missing answers and crashes", "0", wrong, None if wrong is None else wrong == 0, _asked(functions)))
    return goals


def _density(found: Mapping[str, Any]) -> Iterator[Goal]:
    held = found.get("standbys")
    yield Goal("standbys on one node", ">= 200", held, None if held is None else held >= 200)
    yield limit("memory of the system for 200 standbys", found.get("system_mb") if held and held >= 200 else None, 1200.0, "MB")


def _fanout(found: Mapping[str, Any]) -> Iterator[Goal]:
    note = f"{found['other']} were something else" if found.get("other") else ""
    if found.get("background_percent", 0.0) > BUSY_PERCENT:
        note = f"the machine was busy with other things: {found['background_percent']:.0f} % of a core"
    yield limit("100 starts at once: first", found.get("first_ms") or None, 50.0, "ms", note)
    yield limit("100 starts at once: last / (100 x CPU of one / cores)", found.get("last_to_cpu_bound") or None, 1.4, "x", note)


def _others(functions: Mapping[str, Any]) -> Iterator[Goal]:
    for name, found in functions.items():
        cold, thaw = found.get("cold", {}), found.get("thaw", {})
        if name != "index" and cold.get("p50_ms", 0.0) >= _COLD_MS_MIN:
            yield least(f"{name}: cold start / thaw, p50", _quotient(cold, thaw), _THAW_FACTOR, _note(thaw))


def _most(what: str, found: Mapping[str, Any], field: str, most: float) -> Goal:
    return limit(what, found.get(field) if found.get("n") else None, most, "ms", _note(found))


def limit(what: str, figure: float | None, most: float, unit: str, note: str = "") -> Goal:
    """A figure that may be at most this; None: it was not measured."""
    return Goal(what, f"<= {most:g} {unit}", figure, None if figure is None else figure <= most, note)


def least(what: str, figure: float | None, factor: float, note: str = "") -> Goal:
    """A ratio that has to be at least this; None: it was not measured."""
    return Goal(what, f">= {factor:g} x", figure, None if figure is None else figure >= factor, note if figure is not None else "")


def _note(found: Mapping[str, Any]) -> str:
    return f"n = {found['n']}, fewer than {STARTS_MIN}" if 0 < found.get("n", 0) < STARTS_MIN else ""


def _quotient(above: Mapping[str, Any], below: Mapping[str, Any]) -> float | None:
    return above["p50_ms"] / below["p50_ms"] if above.get("p50_ms") and below.get("p50_ms") else None


def _bytes(found: Mapping[str, Any], remote: Mapping[str, Any]) -> float | None:
    working_set = found.get("working_set_bytes")
    return found["remote_bytes_before_response"] / working_set if remote.get("n") and working_set else None


def _share(found: Mapping[str, Any]) -> float | None:
    standby, cold = found.get("standby_pss_mb"), found.get("cold_pss_mb")
    return standby / cold * 100 if standby and cold else None


def _asked(functions: Mapping[str, Any]) -> str:
    """How many requests the fewest of any function and mode were."""
    counts = [answers["asked"] for found in functions.values() for answers in found.get("requests", {}).values()]
    return f"{min(counts):,} requests after each kind of start" if counts else "one request after each start"
