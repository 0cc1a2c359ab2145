"""What starts and rungs cost here, as measured.

In: start records, prepared standbys and released instances (:mod:`scaler.reports`). Out: a function's
:class:`~scaler.ladder.RungCosts`, for its forecast (:mod:`scaler.forecasts`) and for ``thaw explain``. Pure.

A function's own measurements count most; until there are any, those of functions with an image of its size (by powers of
two), then those of all, then the figures of DESIGN ("The ladder"). Missing data is unknown, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scaler.ladder import Rung, RungCosts

#: Share of a new measurement in the mean.
_NEW = 0.2
#: Start delays until anything is measured, s: DESIGN, "The ladder".
_START_S: Mapping[str, float] = {"thaw": 0.0017, "restore": 0.010, "remote": 0.040}
_STANDBY_MB = 4.1
#: An idle instance holds what it has touched: this share of its limit, but not less than the floor.
_RUNNING_SHARE, _RUNNING_FLOOR_MB = 0.06, 8.0


@dataclass(slots=True)
class Means:
    """Means of what was measured, by what it is of: a start mode (s), ``standby`` or ``running`` (MB)."""

    of: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, value: float) -> None:
        """Take in one measurement."""
        before = self.of.get(what)
        self.of[what] = value if before is None else before + _NEW * (value - before)


_NO_MEANS = Means()


@dataclass(slots=True)
class CostBook:
    """The measurements of one planner."""

    everywhere: Means = field(default_factory=Means)
    #: By image size: the exponent of the next power of two, in MB.
    by_size: dict[int, Means] = field(default_factory=dict)

    def add(self, own: Means, image_mb: int, what: str, value: float) -> None:
        """Take in one measurement of a function.

        Args:
            own: the function's means.
            image_mb: size of its image, or its memory limit while that is unknown.
            what: a start mode, ``standby`` or ``running``.
            value: s for starts, MB for memory.
        """
        for means in (own, self.by_size.setdefault(image_mb.bit_length(), Means()), self.everywhere):
            means.add(what, value)

    def load(self, own: Means, measured: Means, image_mb: int) -> None:
        """Go on with what another planner has measured of a function: what this one has measured itself counts more.

        Args:
            own: the function's means.
            measured: the other's.
            image_mb: as in :meth:`add`.
        """
        for what, value in measured.of.items():
            for means in (own, self.by_size.setdefault(image_mb.bit_length(), Means()), self.everywhere):
                means.of.setdefault(what, value)

    def of(self, own: Means, image_mb: int, limit_mb: int) -> RungCosts:
        """The rungs of a function, with start delays in order: none is dearer than the one below it."""
        alike = self.by_size.get(image_mb.bit_length(), _NO_MEANS).of
        books = own.of, alike, self.everywhere.of
        thaw_s = _first(books, "thaw", _START_S["thaw"])
        restore_s = max(_first(books, "restore", _START_S["restore"]), thaw_s)
        remote_s = max(_first(books, "remote", _START_S["remote"]), restore_s)
        standby_mb = _first(books, "standby", _STANDBY_MB)
        running_mb = own.of.get("running") or max(_RUNNING_FLOOR_MB, _RUNNING_SHARE * limit_mb)
        return RungCosts((remote_s, restore_s, thaw_s, 0.0), (0.0, 0.0, standby_mb, max(running_mb, standby_mb)))


def _first(books: Sequence[Mapping[str, float]], what: str, default: float) -> float:
    """The mean of the first book that has one."""
    for means in books:
        value = means.get(what)
        if value is not None:
            return value
    return default


def rung_of(start_mode: str) -> int:
    """The rung that a start by ``start_mode`` began at."""
    return {"thaw": Rung.STANDBY, "restore": Rung.CACHED}.get(start_mode, Rung.STORED)
