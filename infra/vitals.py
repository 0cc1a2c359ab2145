"""How a process is: what it depends on, what it counts, facts that a person wants to see.

In: functions to read from, registered by the parts that know (:mod:`scaler.service`, :mod:`agent.server`); nothing is read before somebody
asks. Out: plain values for :mod:`infra.health`, which serves them, and :mod:`infra.metrics`, which exports them. No I/O in here, so that
parts may be observed in any process, simulated ones too.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.guard import Condition

#: Measurements that are kept until somebody exports them; then the oldest are dropped.
_UNREAD_MAX = 10_000
Attributes = Mapping[str, str]
#: Values of one instrument, by attributes.
Reading = Callable[[], Iterable[tuple[float, Attributes]]]


@dataclass(frozen=True)
class Dependency:
    """Something that this process needs.

    Attributes:
        read: how it is.
        essential: without it the process is not ready.
    """

    name: str
    read: Callable[[], Condition]
    essential: bool = False


@dataclass(frozen=True)
class Instrument:
    """A metric that is read when it is exported, in the words of OpenTelemetry.

    Attributes:
        kind: ``counter`` (only grows) or ``gauge``.
        unit: in UCUM: ``s``, ``By``, ``{start}``.
    """

    name: str
    kind: str
    unit: str
    description: str
    read: Reading


class Distribution:
    """A metric of single values: what was recorded waits here for whoever exports it."""

    def __init__(self, name: str, unit: str, description: str, bounds: tuple[float, ...]) -> None:
        self.name, self.unit, self.description, self.bounds = name, unit, description, bounds
        self._unread: deque[tuple[float, Attributes]] = deque(maxlen=_UNREAD_MAX)

    def record(self, value: float, attributes: Attributes) -> None:
        """Take note of one."""
        self._unread.append((value, attributes))

    def drain(self) -> Iterable[tuple[float, Attributes]]:
        """What was recorded since the last call."""
        with contextlib.suppress(IndexError):  # exports may run in threads of their own
            while True:
                yield self._unread.popleft()


class Kept:
    """A condition that is told by events: one part notices, others ask."""

    def __init__(self, reason: str = "") -> None:
        self._now = Condition(not reason, time.time(), reason)

    def __call__(self) -> Condition:
        """What it is now."""
        return self._now

    def set(self, reason: str) -> None:
        """Empty: it is well. The time counts from when it has turned well or bad."""
        turned = self._now.ok == bool(reason)
        self._now = Condition(not reason, time.time() if turned else self._now.since_s, reason)


@dataclass
class Vitals:
    """One process's. Registering a name again replaces it.

    Attributes:
        component: ``agent`` or ``scaler``.
        identity: which one of them.
    """

    component: str
    identity: str
    dependencies: dict[str, Dependency] = field(default_factory=dict)
    instruments: dict[str, Instrument] = field(default_factory=dict)
    distributions: dict[str, Distribution] = field(default_factory=dict)
    facts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    since_s: float = field(default_factory=time.time)

    def depends_on(self, name: str, read: Callable[[], Condition], *, essential: bool = False) -> None:
        """Tell of a dependency."""
        self.dependencies[name] = Dependency(name, read, essential)

    def counter(self, name: str, unit: str, description: str, read: Reading) -> None:
        """A value that only grows."""
        self.instruments[name] = Instrument(name, "counter", unit, description, read)

    def gauge(self, name: str, unit: str, description: str, read: Reading) -> None:
        """A value that goes up and down."""
        self.instruments[name] = Instrument(name, "gauge", unit, description, read)

    def distribution(self, name: str, unit: str, description: str, bounds: tuple[float, ...]) -> Distribution:
        """Single values, counted in buckets up to each of ``bounds``."""
        found = self.distributions[name] = self.distributions.get(name) or Distribution(name, unit, description, bounds)
        return found

    def fact(self, name: str, read: Callable[[], Any]) -> None:
        """Something for :meth:`status`; anything that JSON knows."""
        self.facts[name] = read

    def conditions(self) -> dict[str, Condition]:
        """How each dependency is."""
        return {name: dependency.read() for name, dependency in self.dependencies.items()}

    def readiness(self) -> dict[str, Any]:
        """Whether this process can do its work, and what is degraded and why."""
        found = self.conditions()
        missing = [name for name, condition in found.items() if not condition.ok and self.dependencies[name].essential]
        return {
            "ready": not missing,
            "degraded": [name for name, condition in found.items() if not condition.ok],
            "dependencies": {
                name: {
                    "ok": condition.ok,
                    "essential": self.dependencies[name].essential,
                    "since": round(condition.since_s, 3),
                    "reason": condition.reason,
                }
                for name, condition in found.items()
            },
        }

    def status(self) -> dict[str, Any]:
        """Everything that a person may want to know of this process."""
        return {
            "component": self.component,
            "identity": self.identity,
            "since": round(self.since_s, 3),
            **self.readiness(),
            "facts": {name: read() for name, read in self.facts.items()},
        }


def one(read: Callable[[], float]) -> Reading:
    """The reading of an instrument without attributes."""
    return lambda: [(read(), {})]


def by(key: str, read: Callable[[], Mapping[str, float]]) -> Reading:
    """The reading of an instrument with one attribute."""
    return lambda: [(value, {key: name}) for name, value in read().items()]
