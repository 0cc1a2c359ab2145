"""Which rung each idle slot of one function holds, now and until when.

In: the function's need for instances going up and down, with the time as an argument. Out: how many idle slots are at each
rung, and when that changes by itself; what a start finds. Used by the live planner (:mod:`scaler.instances`,
:mod:`scaler.standbys`) and by the simulator (:mod:`scaler.simulate.slots`). Pure.

Slots are a stack: with a need of ``n``, slots ``0 .. n-1`` are busy and the others idle; the next request takes slot ``n``.
So slot ``k`` is idle exactly as long as the need is not above ``k``, low slots are idle often and shortly and high ones
seldom and for long, and each can be forecast by itself, from levels alone. Instances are alike: which of them serves is not
said here. A request takes the highest rung that any idle slot holds; if that is not slot ``n``'s, the two exchange what
they hold.

The cost of an event does not grow with the number of slots: every slot has at most one entry in a heap of changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Protocol

from scaler.ladder import FOREVER, Plan, Rung, overlay

_CACHED: Plan = ((FOREVER, int(Rung.CACHED)),)
_RUNNING = int(Rung.RUNNING)


class HoldingPolicy(Protocol):
    """Decides what idle slots of one function hold."""

    def released(self, slot: int, idle_s: float, arrived_s: float, now_s: float) -> Plan:
        """What a slot shall hold that becomes idle.

        Args:
            slot: its number.
            idle_s: how long it was idle before it was taken; negative when it is new.
            arrived_s: when it was taken.
            now_s: the time.
        """
        ...

    def rising(self) -> Plan:
        """What the next slot shall hold at least, from a rise of the need on; empty: nothing more."""
        ...

    def after_rise(self, elapsed_s: float, taken: bool) -> None:
        """Learn what came after a rise: the next slot was taken ``elapsed_s`` later, or only the next rise came."""
        ...


class Slot:
    """One slot. Its plan counts from :attr:`begin_s`."""

    __slots__ = ("arrived_s", "at", "begin_s", "freed_s", "idle_s", "plan", "queued_s", "rise_s", "rung", "since_s")

    def __init__(self, now_s: float) -> None:
        self.plan: Plan = _CACHED
        #: Index of the current segment of :attr:`plan`.
        self.at = 0
        self.begin_s = self.since_s = now_s
        #: What it holds, since :attr:`since_s`.
        self.rung = int(Rung.CACHED)
        #: When it became idle, when it was taken last, and how long it had been idle then; negative: never.
        self.freed_s = -1.0
        self.arrived_s = now_s
        self.idle_s = -1.0
        #: The last rise that made it the next one; negative: none since it was taken.
        self.rise_s = -1.0
        #: When its entry in the heap of changes is due.
        self.queued_s = FOREVER


class Holding:
    """All slots of one function.

    Args:
        policy: decides what they hold.
    """

    __slots__ = ("_changes", "_policy", "_slots", "held", "idle_s", "moves_up", "need", "now_s")

    def __init__(self, policy: HoldingPolicy) -> None:
        self._policy = policy
        self._slots: list[Slot] = []
        self._changes: list[tuple[float, int]] = []
        #: The time of the last event.
        self.now_s = 0.0
        #: Busy slots.
        self.need = 0
        #: Idle slots by rung.
        self.held = [0, 0, 0, 0]
        #: Seconds that idle slots have spent at each rung.
        self.idle_s = [0.0, 0.0, 0.0, 0.0]
        #: Moves up the ladder without a request: what is restored in the background.
        self.moves_up = 0

    @property
    def next_change_s(self) -> float:
        """When an idle slot may change its rung by itself; infinity: never."""
        return self._changes[0][0] if self._changes else FOREVER

    def advance(self, now_s: float) -> None:
        """Carry out the changes that are due. Time does not go back."""
        self.now_s = now_s
        changes = self._changes
        while changes and changes[0][0] <= now_s:
            due_s, number = heappop(changes)
            slot = self._slots[number]
            if slot.queued_s != due_s:
                continue
            slot.queued_s = FOREVER
            if number >= self.need:
                self._follow(number, slot, now_s)

    def raised(self, now_s: float) -> int:
        """The need has gone up by one.

        Returns:
            The rung that the request found.
        """
        self.advance(now_s)
        number = self.need
        slot = self._slots[number] if number < len(self._slots) else self._new(now_s)
        if slot.rise_s >= 0:
            self._policy.after_rise(now_s - slot.rise_s, True)
            slot.rise_s = -1.0
        found = slot
        if slot.rung != _RUNNING and (self.held[Rung.RUNNING] or (slot.rung < Rung.STANDBY and self.held[Rung.STANDBY])):
            found = max(self._slots[number + 1 :], key=lambda other: other.rung)
        rung = found.rung
        self._charge(found, now_s)
        self.held[rung] -= 1
        if found is not slot:
            self._charge(slot, now_s)
            found.plan, found.at, found.begin_s, found.rung = slot.plan, slot.at, slot.begin_s, slot.rung
            self._queue(self._slots.index(found, number), found)
        slot.idle_s = now_s - slot.freed_s if slot.freed_s >= 0 else -1.0
        slot.arrived_s = now_s
        self.need = number + 1
        self._rise(number + 1, now_s)
        return rung

    def lowered(self, now_s: float) -> None:
        """The need has gone down by one."""
        self.advance(now_s)
        number = self.need = self.need - 1
        slot = self._slots[number]
        slot.plan = self._policy.released(number, slot.idle_s, slot.arrived_s, now_s)
        slot.at = 0
        slot.begin_s = slot.since_s = slot.freed_s = now_s
        slot.rise_s = -1.0
        slot.rung = slot.plan[0][1]
        self.held[slot.rung] += 1
        self._queue(number, slot)

    def pack(self) -> list[object]:
        """Plain values, for :meth:`unpack`; only while no slot is busy."""
        self.settle(self.now_s)
        slots = []
        for slot in self._slots:
            ahead = (slot.begin_s, slot.plan[slot.at :]) if slot.queued_s < FOREVER or slot.rung != Rung.CACHED else ()
            slots.append([slot.freed_s, slot.arrived_s, slot.idle_s, slot.rise_s, *ahead])
        return [self.now_s, self.idle_s, self.moves_up, slots]

    @classmethod
    def unpack(cls, packed: Sequence[Any], policy: HoldingPolicy) -> Holding:
        """What :meth:`pack` gave."""
        holding = cls(policy)
        holding.now_s, holding.idle_s, holding.moves_up, slots = packed
        for number, (freed_s, arrived_s, idle_s, rise_s, *plan) in enumerate(slots):
            slot = holding._new(holding.now_s)
            slot.freed_s, slot.arrived_s, slot.idle_s, slot.rise_s = freed_s, arrived_s, idle_s, rise_s
            if plan:
                slot.begin_s, slot.plan = plan[0], tuple(map(tuple, plan[1]))
                slot.rung = slot.plan[0][1]
                holding.held[Rung.CACHED] -= 1
                holding.held[slot.rung] += 1
                holding._queue(number, slot)
        return holding

    def idle_slots(self, most: int) -> list[tuple[int, Slot]]:
        """The lowest idle slots that were taken before, which are the next to be asked."""
        return [(number, slot) for number, slot in enumerate(self._slots[self.need :], self.need) if slot.freed_s >= 0][:most]

    def give_up(self, rung: int, now_s: float) -> bool:
        """Bring the idle slot down to cached that is at ``rung`` and would be asked last; False when none is."""
        for number in range(len(self._slots) - 1, self.need - 1, -1):
            slot = self._slots[number]
            if slot.rung == rung:
                slot.plan, slot.at, slot.begin_s = _CACHED, 0, now_s
                self._hold(slot, int(Rung.CACHED), now_s)
                return True
        return False

    def settle(self, now_s: float) -> None:
        """Bring :attr:`idle_s` up to date."""
        self.advance(now_s)
        for slot in self._slots[self.need :]:
            self._charge(slot, now_s)

    def _new(self, now_s: float) -> Slot:
        slot = Slot(now_s)
        self._slots.append(slot)
        self.held[slot.rung] += 1
        return slot

    def _rise(self, number: int, now_s: float) -> None:
        """The slot has become the next one because the need has risen: it may be wanted soon."""
        slot = self._slots[number] if number < len(self._slots) else None
        if slot is not None:
            if slot.rise_s >= 0:
                self._policy.after_rise(now_s - slot.rise_s, False)
            elif slot.rung == _RUNNING:
                return
        least = self._policy.rising()
        if not least:
            return
        slot = slot or self._new(now_s)
        slot.rise_s = now_s
        age_s = now_s - slot.begin_s
        plan, begin_s = slot.plan[slot.at :], 0.0
        for until_s, rung in least:
            if rung > Rung.CACHED:
                plan = overlay(plan, age_s + begin_s, age_s + until_s, rung)
            begin_s = until_s
        slot.plan, slot.at = plan, next(at for at, (until_s, _) in enumerate(plan) if until_s > age_s)
        self._hold(slot, plan[slot.at][1], now_s)
        self._queue(number, slot)

    def _follow(self, number: int, slot: Slot, now_s: float) -> None:
        """Bring an idle slot to where its plan is."""
        plan = slot.plan
        while (due_s := slot.begin_s + plan[slot.at][0]) <= now_s:
            slot.at += 1
            self._hold(slot, plan[slot.at][1], due_s)
        self._queue(number, slot)

    def _hold(self, slot: Slot, rung: int, now_s: float) -> None:
        if rung != slot.rung:
            self._charge(slot, now_s)
            self.held[slot.rung] -= 1
            self.held[rung] += 1
            self.moves_up += rung > slot.rung
            slot.rung = rung

    def _queue(self, number: int, slot: Slot) -> None:
        due_s = slot.begin_s + slot.plan[slot.at][0]
        if due_s < slot.queued_s:
            slot.queued_s = due_s
            heappush(self._changes, (due_s, number))

    def _charge(self, slot: Slot, now_s: float) -> None:
        self.idle_s[slot.rung] += now_s - slot.since_s
        slot.since_s = now_s
