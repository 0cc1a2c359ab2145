"""What the simulator speaks of: traces, costs and outcomes. Plain values.

In: made by :mod:`scaler.simulate.traces` (files), :mod:`scaler.simulate.history` (the demand topic) and :mod:`scaler.simulate.arrivals`.
Out: the arguments of the engines (:mod:`scaler.simulate.slots`, :mod:`scaler.simulate.counts`) and what they return to
:mod:`scaler.simulate.run`.
"""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scaler.ladder import RUM_COLD_S, RungCosts

#: Memory of a function of which none is known, MB: the flat figure of DESIGN's reference table.
DEFAULT_MEMORY_MB = 170.0


class StartMode(enum.IntEnum):
    """How a request's instance came to be; ``WARM``: an idle one took it."""

    WARM = 0
    THAW = 1
    RESTORE = 2
    REMOTE = 3
    COLD = 4


@dataclass(frozen=True)
class FunctionTrace:
    """The requests to one function.

    Attributes:
        name: as the trace has it.
        at_s: arrivals, ascending, seconds after the trace's begin.
        duration_s: how long each runs, seconds; same shape.
        memory_mb: an instance's memory, MB.
        trigger: the trace's word for it; empty when it has none.
    """

    name: str
    at_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    memory_mb: float
    trigger: str = ""


@dataclass(frozen=True)
class Trace:
    """Requests to many functions over ``span_s`` seconds."""

    name: str
    span_s: float
    functions: list[FunctionTrace]


@dataclass(frozen=True)
class World:
    """What starts and rungs cost in one simulated installation.

    ``rungs`` False is the classic world: a miss is a cold start, an idle instance holds all its memory. The defaults
    are the model of DESIGN ("The ladder").

    Attributes:
        rungs: the ladder is there.
        thaw_s: start from standby.
        restore_s: start from the node's cache.
        remote_s: first start of a function.
        cold_s: start without a checkpoint.
        standby_mb: memory of a standby.
        running_share: memory of an idle running instance, as a share of the function's.
        running_floor_mb: the least it holds.
        spread_s: start delays of thaw, restore, remote and cold as measured: quantiles in equal steps from the least to the
            greatest. Empty: every start takes what is said above, which is otherwise the mean, and all that policies know.
        seed: of the draws from them.
    """

    rungs: bool = True
    thaw_s: float = 0.0017
    restore_s: float = 0.010
    remote_s: float = 0.040
    cold_s: float = RUM_COLD_S
    standby_mb: float = 4.1
    running_share: float = 0.06
    running_floor_mb: float = 8.0
    spread_s: tuple[tuple[float, ...], ...] = ()
    seed: int = 1

    def costs(self, memory_mb: float) -> RungCosts:
        """The rungs of a function with ``memory_mb``. In the classic world all but running are a cold start."""
        if not self.rungs:
            return RungCosts((self.cold_s,) * 3 + (0.0,), (0.0, 0.0, memory_mb, memory_mb))
        running_mb = max(self.running_floor_mb, self.running_share * memory_mb)
        return RungCosts((self.remote_s, self.restore_s, self.thaw_s, 0.0), (0.0, 0.0, self.standby_mb, running_mb))

    @property
    def first_s(self) -> float:
        """Delay of a function's first start."""
        return self.remote_s if self.rungs else self.cold_s

    def drawn(self, function: FunctionTrace) -> list[list[float]]:
        """What a start of each :class:`StartMode` takes if the function's request of that number causes it, s.

        The luck is the request's, whatever the mode and the policy, so that policies are compared on equal luck.
        """
        number = len(function.at_s)
        if not self.spread_s:
            return [[delay_s] * number for delay_s in (0.0, self.thaw_s, self.restore_s, self.remote_s, self.cold_s)]
        luck = np.random.default_rng((self.seed, zlib.crc32(function.name.encode()))).random(number)
        drawn = [np.interp(luck, np.linspace(0, 1, len(quantiles)), quantiles).tolist() for quantiles in self.spread_s]
        return [[0.0] * number, *drawn]

    def by_rung(self, function: FunctionTrace) -> list[list[float]]:
        """The same by the :class:`~scaler.ladder.Rung` that the request finds."""
        warm, thaw, restore, remote, cold = self.drawn(function)
        return [remote, restore, thaw, warm] if self.rungs else [cold, cold, cold, warm]


@dataclass
class Outcome:
    """What one function's requests met under one policy.

    Attributes:
        delays_s: start delay of each request, by order of arrival.
        starts: requests by :class:`StartMode`.
        wasted_mb_s: memory held while idle, by :class:`~scaler.ladder.Rung`, MB-s.
        wasted_second_half_mb_s: of these, in the second half of the trace's span.
        moves_up: moves up the ladder that no request asked for.
        handle_ns: time that the policy took for an event, of a sample of the events.
    """

    delays_s: NDArray[np.float64]
    starts: list[int] = field(default_factory=lambda: [0] * len(StartMode))
    wasted_mb_s: list[float] = field(default_factory=lambda: [0.0] * 4)
    wasted_second_half_mb_s: float = 0.0
    moves_up: int = 0
    handle_ns: list[int] = field(default_factory=list)
