"""Is the forecast right about how often it is right?

In: a forecast (:mod:`scaler.forecast.function`) and what then came. Out: for a few horizons, how likely an arrival within
them was said to be, and how often there was one. Pure; next is :mod:`scaler.simulate.run`.
"""

from __future__ import annotations

from scaler.forecast.function import FunctionForecast
from scaler.ladder import Plan

#: Horizons by name: seconds, and the bin of the forecast that ends there (16 bins a decade from 0.1 s on).
HORIZONS = {"1s": (1.0, 16), "10s": (10.0, 32), "100s": (100.0, 48), "1000s": (1000.0, 64)}
#: Idle times that are all looked at, and one in how many after that: a busy function says little new.
_ALL, _ONE_IN = 50, 64

#: For each horizon: idle times, and sums of what was said, of what came, and of the squared difference.
Score = dict[str, list[float]]


class Scored:
    """A forecast that is asked what it expects; a :class:`scaler.holding.HoldingPolicy`."""

    def __init__(self, forecast: FunctionForecast) -> None:
        self._forecast = forecast
        self._said: dict[int, tuple[float, list[float]]] = {}
        self._seen = 0
        self.score: Score = {name: [0.0] * 4 for name in HORIZONS}

    def released(self, slot: int, idle_s: float, arrived_s: float, now_s: float) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        said = self._said.pop(slot, None)
        if said is not None and idle_s >= 0:
            self._count(said[1], idle_s, came=True)
        plan = self._forecast.released(slot, idle_s, arrived_s, now_s)
        self._seen += 1
        if self._seen <= _ALL or self._seen % _ONE_IN == 0:
            self._said[slot] = (now_s, self._forecast.arrived_by(slot, now_s - arrived_s))
        return plan

    def rising(self) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        return self._forecast.rising()

    def after_rise(self, elapsed_s: float, taken: bool) -> None:
        """See :class:`scaler.holding.HoldingPolicy`."""
        self._forecast.after_rise(elapsed_s, taken)

    def finish(self, end_s: float) -> Score:
        """Count the idle times that the end of the trace cuts short, for the horizons that they reach."""
        for since_s, said in self._said.values():
            self._count(said, end_s - since_s, came=False)
        self._said.clear()
        return self.score

    def _count(self, said: list[float], idle_s: float, *, came: bool) -> None:
        for name, (horizon_s, where) in HORIZONS.items():
            if not came and idle_s < horizon_s:
                continue
            within = float(came and idle_s < horizon_s)
            row = self.score[name]
            row[0] += 1
            row[1] += said[where]
            row[2] += within
            row[3] += (said[where] - within) ** 2


def summary(scores: list[Score]) -> dict[str, dict[str, float]]:
    """All functions' scores as figures: mean probability said, share that came, Brier score, idle times looked at."""
    result: dict[str, dict[str, float]] = {}
    for name in HORIZONS:
        number, said, came, squares = (sum(score[name][column] for score in scores) for column in range(4))
        if number:
            result[name] = {"said": said / number, "came": came / number, "brier": squares / number, "idle_times": number}
    return result
