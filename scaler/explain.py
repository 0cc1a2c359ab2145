"""Why a function is held as it is, in numbers.

In: the planner's :class:`~scaler.state.FunctionState`. Out: :class:`Explanation`, a part of what is published to
``thaw.state`` (:mod:`scaler.snapshots`), which ``thaw explain`` prints. Pure.
"""

from __future__ import annotations

import msgspec

from scaler.forecast import bins
from scaler.ladder import FOREVER, RUM_PER_MB_S, Plan, Rung, RungCosts
from scaler.levels import NS
from scaler.state import FunctionState

#: Idle slots that are explained; the others are asked later than these.
SLOTS = 3


class RungPrice(msgspec.Struct, frozen=True, kw_only=True):
    """What a rung costs.

    Attributes:
        start_ms: to the first response from there.
        memory_mb: held by one idle slot.
        per_hour: price of holding it for an hour, in the currency of RUM.
        per_start: price of one start from there.
        measured: both were measured for this function; otherwise they are those of others.
    """

    rung: str
    start_ms: float
    memory_mb: float
    per_hour: float
    per_start: float
    measured: bool


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A rung, and the age of the idle slot at which it is left; None: never."""

    rung: str
    until_s: float | None


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """A period: the next request is expected between two times, with a probability."""

    from_ns: int
    to_ns: int
    chance: float


class IdleSlot(msgspec.Struct, frozen=True, kw_only=True):
    """One idle slot.

    Attributes:
        slot: its number: the next request takes the lowest.
        since_ns: when it became idle.
        rung: what it holds.
        plan: and what it will hold, by age.
        expected_ns: when the next request is as likely to have come as not, given that none has come yet; None: not within
            the reach of the forecast.
        within_minute: probability of a request within the next minute.
        periods: what periods say.
    """

    slot: int
    since_ns: int
    rung: str
    plan: list[Step]
    expected_ns: int | None
    within_minute: float
    periods: list[Expected]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a function is held as it is.

    Attributes:
        at_ns: the time that it is of.
        delay_weight: price of a second of start delay.
        rungs: what each rung costs.
        slots: the next slots to be asked.
        idle_seconds: by rung, what all idle slots have spent there since the scaler has known the function.
        moves_up: restores and starts in the background so far.
    """

    at_ns: int
    delay_weight: float
    rungs: list[RungPrice]
    slots: list[IdleSlot]
    idle_seconds: dict[str, float]
    moves_up: int

    @property
    def expected_ns(self) -> int | None:
        """When the next request is expected."""
        return self.slots[0].expected_ns if self.slots else None


def explanation(state: FunctionState) -> Explanation | None:
    """Why ``state`` is held as it is; None when no forecast holds it."""
    holding, forecast = state.holding, state.forecast
    if holding is None or forecast is None:
        return None
    weight = forecast.terms.config.delay_weight
    slots = []
    for number, slot in holding.idle_slots(SLOTS):
        age_s = holding.now_s - slot.freed_s
        busy_s = slot.freed_s - slot.arrived_s
        expected_s = _median_s(forecast.arrived_by(number, busy_s), age_s)
        slots.append(
            IdleSlot(
                slot=number,
                since_ns=_ns(slot.freed_s),
                rung=Rung(slot.rung).name.lower(),
                plan=_steps(slot.plan, slot.begin_s - slot.freed_s),
                expected_ns=None if expected_s is None else _ns(slot.freed_s + expected_s),
                within_minute=round(forecast.chance_within(number, busy_s, age_s, 60.0), 4),
                periods=[
                    Expected(
                        from_ns=_ns(slot.arrived_s + window.start_s),
                        to_ns=_ns(slot.arrived_s + window.end_s),
                        chance=round(window.chance, 4),
                    )
                    for window in forecast.windows(number)
                ],
            )
        )
    return Explanation(
        at_ns=_ns(holding.now_s),
        delay_weight=weight,
        rungs=_prices(forecast.terms.costs, weight, state.measured.of),
        slots=slots,
        idle_seconds={rung.name.lower(): round(holding.idle_s[rung], 1) for rung in (Rung.CACHED, Rung.STANDBY, Rung.RUNNING)},
        moves_up=holding.moves_up,
    )


def _prices(costs: RungCosts, weight: float, measured: dict[str, float]) -> list[RungPrice]:
    needs = {Rung.CACHED: ("restore",), Rung.STANDBY: ("thaw", "standby"), Rung.RUNNING: ("running",)}
    return [
        RungPrice(
            rung=rung.name.lower(),
            start_ms=round(costs.delay_s[rung] * 1e3, 3),
            memory_mb=round(costs.memory_mb[rung], 2),
            per_hour=round(costs.memory_mb[rung] * RUM_PER_MB_S * 3600, 5),
            per_start=round(costs.delay_s[rung] * weight, 5),
            measured=all(what in measured for what in needs[rung]),
        )
        for rung in (Rung.CACHED, Rung.STANDBY, Rung.RUNNING)
    ]


def _steps(plan: Plan, offset_s: float) -> list[Step]:
    return [
        Step(rung=Rung(rung).name.lower(), until_s=None if until_s == FOREVER else round(until_s + offset_s, 3)) for until_s, rung in plan
    ]


def _median_s(arrived: list[float], age_s: float) -> float | None:
    """The age by which half of what is still to come will have come, given that nothing has by ``age_s``."""
    came = bins.interpolate(arrived, age_s)
    half = came + (1 - came) / 2
    where = next((where for where, value in enumerate(arrived[:-1]) if value >= half), None)
    return None if where is None else max(bins.EDGES[where + 1], age_s)


def _ns(seconds: float) -> int:
    return int(seconds * NS)
