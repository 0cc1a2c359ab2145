"""Which fault comes when. Pure: same arguments, same faults.

In: a duration, a seed, kinds. Out: :class:`Planned`, in order. Faults are drawn like cards: a deck holds each kind as often as its weight
says and is used up before it is shuffled again, so that each kind gets its share of any long run; the first deck holds each kind once.
Next: :mod:`loadgen.chaos.faults` does them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal["kill", "pause", "cut", "silent", "slow", "short", "corrupt", "refuse", "full"]
Target = Literal["scaler", "scalers", "agent", "pager-worker", "pager-keeper", "instance", "broker", "store", "link", "cache"]


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        target: what it happens to.
        action: what happens.
        says: the same for people.
        weight: how often it is in the deck.
        lasts_s: shortest and longest time until it is undone; kills are not.
        apart_s: from its end, and the return of what was killed, to the next fault: time to come right, so that what is noticed is
            noticed of one fault.
    """

    target: Target
    action: Action
    says: str
    weight: int
    lasts_s: tuple[float, float] = (0.0, 0.0)
    apart_s: float = 2.5

    @property
    def name(self) -> str:
        """Such as ``agent-kill``."""
        return f"{self.target}-{self.action}"


@dataclass(frozen=True)
class Planned:
    """A fault to be.

    Attributes:
        number: from 1.
        kind: what happens.
        lasts_s: until it is undone.
        pause_s: from then, and the return of what was killed, to the next fault.
        pick: in [0, 1): which one, when the target is several.
    """

    number: int
    kind: Kind
    lasts_s: float
    pause_s: float
    pick: float


_SHORT, _LONG = (1.0, 2.5), (2.0, 4.0)
KINDS: tuple[Kind, ...] = (
    Kind("scaler", "kill", "SIGKILL of one of the two scalers", 4, apart_s=3.0),
    Kind("scalers", "kill", "SIGKILL of both scalers at once", 2, apart_s=3.5),
    Kind("scaler", "pause", "SIGSTOP of one of the two scalers", 1, _SHORT, 3.0),
    Kind("agent", "kill", "SIGKILL of the agent", 4, apart_s=3.0),
    Kind("agent", "pause", "SIGSTOP of the agent", 1, _SHORT),
    Kind("pager-worker", "kill", "SIGKILL of the process that serves pages", 4),
    Kind("pager-keeper", "kill", "SIGKILL of the process that replaces it", 2),
    Kind("pager-worker", "pause", "SIGSTOP of the process that serves pages", 1, _SHORT),
    Kind("instance", "kill", "SIGKILL of an instance's processes", 7, apart_s=2.0),
    Kind("instance", "pause", "SIGSTOP of an instance's processes", 1, _SHORT),
    Kind("broker", "kill", "SIGKILL of the broker", 2, apart_s=3.0),
    Kind("broker", "pause", "SIGSTOP of the broker", 1, _SHORT),
    Kind("broker", "cut", "connections to the broker are reset, new ones refused", 1, _SHORT, 3.0),
    Kind("broker", "silent", "connections to the broker carry nothing", 1, _SHORT, 3.0),
    Kind("broker", "slow", "connections to the broker carry everything 150 ms late", 1, _LONG),
    Kind("store", "kill", "SIGKILL of the object store", 2),
    Kind("store", "pause", "SIGSTOP of the object store", 1, _LONG),
    Kind("store", "cut", "connections to the store are reset, new ones refused", 1, _LONG),
    Kind("store", "silent", "connections to the store carry nothing", 1, _LONG),
    Kind("store", "short", "answers of the store break off", 1, _LONG),
    Kind("store", "corrupt", "answers of the store have wrong bytes", 1, _LONG),
    Kind("store", "refuse", "the store answers 503 SlowDown", 1, _LONG),
    Kind("link", "cut", "streams between scalers and agent are reset, new ones refused", 1, _SHORT),
    Kind("link", "silent", "streams between scalers and agent carry nothing", 1, _SHORT),
    Kind("cache", "full", "no byte is left on the disk of the node's cache", 1, _LONG),
    Kind("store", "full", "no byte is left on the store's disk", 1, _LONG),
    Kind("broker", "full", "no byte is left on the broker's disk", 1, _SHORT, 4.0),
)


def kind_named(name: str) -> Kind:
    """The kind of that name.

    Raises:
        KeyError: there is none.
    """
    return {kind.name: kind for kind in KINDS}[name]


def schedule(seconds: float, seed: int, kinds: Sequence[Kind] = KINDS, pace: float = 1.0) -> list[Planned]:
    """As many faults as there is time for when whatever is killed returns at once.

    Args:
        seconds: from the first fault to the end of the pause after the last.
        seed: of everything.
        kinds: faults to draw from.
        pace: how many times as fast faults come and go.
    """
    source = random.Random(seed)
    planned: list[Planned] = []
    for kind in _drawn(source, kinds):
        lasts_s = source.uniform(*kind.lasts_s) / pace
        pause_s = kind.apart_s * source.uniform(0.8, 1.2) / pace
        seconds -= lasts_s + pause_s
        if seconds < 0:
            break
        planned.append(Planned(len(planned) + 1, kind, lasts_s, pause_s, source.random()))
    return planned


def _drawn(source: random.Random, kinds: Sequence[Kind]) -> Iterator[Kind]:
    deck = list(kinds)
    while deck:
        source.shuffle(deck)
        yield from deck
        deck = [kind for kind in kinds for _ in range(kind.weight)]
