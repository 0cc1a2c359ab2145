"""When requests come: Poisson, uniform and burst arrivals. Pure: same arguments, same arrivals.

In: rates, durations, function names, a seed. Out: lists of :class:`Arrival`, ordered by time, for
:mod:`loadgen.driver`. Arrivals taken from a production trace come from :mod:`loadgen.traces`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from loadgen.errors import TraceInvalid

#: Rows asked for are drawn from this range; each sample function folds it into the size of its data.
ROWS = 1_000_000


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """One request to be.

    Attributes:
        at_s: intended time, seconds after the start of the run.
        function: deployed function that is asked.
        row: what it is asked for.
        trace_function: function of the trace that this stands for; empty when it comes from no trace.
    """

    at_s: float
    function: str
    row: int
    trace_function: str = ""


def poisson(rate: float, duration_s: float, functions: Sequence[str], seed: int) -> list[Arrival]:
    """Independent arrivals, ``rate`` per second on average over all functions, each function equally likely.

    Raises:
        TraceInvalid: the rate or duration is not positive, or there is no function.
    """
    _check(functions, rate=rate, duration=duration_s)
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s = source.expovariate(rate)
    while at_s < duration_s:
        arrivals.append(Arrival(at_s, source.choice(functions), source.randrange(ROWS)))
        at_s += source.expovariate(rate)
    return arrivals


def uniform(rate: float, duration_s: float, functions: Sequence[str], seed: int) -> list[Arrival]:
    """Evenly spaced arrivals, the functions in turn; the first one at time 0.

    Raises:
        TraceInvalid: the rate or duration is not positive, or there is no function.
    """
    _check(functions, rate=rate, duration=duration_s)
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    # Counted, not summed up, so that rounding errors do not grow over a long run.
    while (at_s := len(arrivals) / rate) < duration_s:
        arrivals.append(Arrival(at_s, functions[len(arrivals) % len(functions)], source.randrange(ROWS)))
    return arrivals


def bursts(sizes_and_times: Sequence[tuple[int, float]], functions: Sequence[str], seed: int) -> list[Arrival]:
    """Many arrivals at one instant, for each function.

    Args:
        sizes_and_times: number of requests per function and the time of the burst, s.
        functions: each of them gets the whole burst.
        seed: of the rows.

    Raises:
        TraceInvalid: a size or time is negative, or there is no function.
    """
    _check(functions)
    source = random.Random(seed)
    arrivals: list[Arrival] = []
    for size, at_s in sizes_and_times:
        if size < 1 or not 0 <= at_s < float("inf"):
            raise TraceInvalid(f"a burst of {size} requests at {at_s} s is not possible; write N@T, such as 50@10")
        for function in functions:
            arrivals.extend(Arrival(at_s, function, source.randrange(ROWS)) for _ in range(size))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def parse_burst(text: str) -> tuple[int, float]:
    """Read ``N@T``: N requests at T seconds.

    Raises:
        TraceInvalid: it does not look so.
    """
    size, _, at_s = text.partition("@")
    try:
        return int(size), float(at_s)
    except ValueError:
        raise TraceInvalid(f"{text!r} is not a burst; write N@T, such as 50@10 for 50 requests at second 10") from None


def merge(*parts: Sequence[Arrival]) -> list[Arrival]:
    """Several kinds of arrivals as one, ordered by time."""
    return sorted((arrival for part in parts for arrival in part), key=lambda arrival: arrival.at_s)


def _check(functions: Sequence[str], **positive: float) -> None:
    if not functions:
        raise TraceInvalid("no function to send requests to")
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise TraceInvalid(f"the {name} must be above 0, not {value}")
