"""What can be left out, to see that the simulation would notice: a few replacements each, made here and nowhere in shipped code.

In: a name of :data:`SAFEGUARDS`. Out: what is replaced by what, for :mod:`thaw.faults.world`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

import scaler.service
from agent.epochs import Epochs
from agent.errors import CriuError
from agent.instance import Instance
from agent.lease import Scalers
from agent.node import Node
from agent.starts import Starter
from scaler.edges import agents
from scaler.edges.agents import Agents
from scaler.edges.replay import ReplayPoint
from scaler.events import ShardReady
from scaler.service import Service
from thaw.faults.network import End
from thaw.faults.parts import KeptEpochs

_NEVER_NS = 10**18
Replacements = list[tuple[Any, str, Any]]


@dataclass(frozen=True)
class Safeguard:
    """One thing that keeps the installation right.

    Attributes:
        what: in a few words.
        without: the replacements that leave it out.
    """

    what: str
    without: Callable[[], Replacements]
    #: One that fails without it, as far as is known: looked at first.
    seed: int = 1


def removal(name: str) -> Replacements:
    """The replacements that leave a safeguard out; none for an empty name."""
    return SAFEGUARDS[name].without() if name else []


def _before(owner: type, name: str, first: Callable[..., None]) -> Replacements:
    """Do something before a method."""
    shipped = getattr(owner, name)

    def replaced(self: Any, *arguments: Any, **options: Any) -> Any:
        first(self, *arguments)
        return shipped(self, *arguments, **options)

    return [(owner, name, replaced)]


def _after(owner: type, name: str, then: Callable[..., None]) -> Replacements:
    """Do something after a method."""
    shipped = getattr(owner, name)

    def replaced(self: Any, *arguments: Any, **options: Any) -> Any:
        found = shipped(self, *arguments, **options)
        then(self, *arguments)
        return found

    return [(owner, name, replaced)]


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _configured(**changes: Any) -> Replacements:
    simulated = scaler.service.planner_config
    return [(scaler.service, "planner_config", lambda settings: dataclasses.replace(simulated(settings), **changes))]


def _with_records(change: Callable[[Any], Any]) -> Replacements:
    shipped = Service.demand

    def demand(self: Any, record: Any) -> None:
        shipped(self, dataclasses.replace(record, event=change(record.event)))

    return [(Service, "demand", demand)]


def _order_of_arrival() -> Replacements:
    numbers = itertools.count(1)
    return _with_records(lambda event: msgspec.structs.replace(event, seq=next(numbers)))


def _no_inventory() -> Replacements:
    shipped = Agents._connected

    def connected(self: Any, link: Any, inventory: Any) -> None:
        shipped(self, link, msgspec.structs.replace(inventory, instances=[], standbys=[], checkpoints=[]))

    return [(Agents, "_connected", connected)]


def _no_cold_start() -> Replacements:
    shipped = Starter._tried

    async def tried(self: Any, *arguments: Any) -> Any:
        found = await shipped(self, *arguments)
        if found is None:
            raise CriuError("the restore failed")
        return found

    return [(Starter, "_tried", tried)]


def _stop_by_halves() -> Replacements:
    async def stop(self: Any, workshop: Any, grace_s: float = 0.0) -> None:
        self.releasing = True
        await self._remove(workshop)

    return [(Instance, "stop", stop)]


def _decide_at_once(service: Any, shard: int, epoch: int) -> None:
    service._handle(ShardReady(shard=shard), time.time_ns())


SAFEGUARDS = {
    "epoch-check": Safeguard("agents refuse commands of an older epoch", lambda: [(Epochs, "check", _nothing)], seed=5),
    "kept-epochs": Safeguard("the next agent knows the epochs of the one before", lambda: [(KeptEpochs, "_write", _nothing)], seed=22),
    "idempotence": Safeguard(
        "an agent carries out each command id once",
        lambda: _before(Node, "handle", lambda node, command: node._answers.pop(command.id, None)),
        seed=3,
    ),
    "lease": Safeguard("a node that no scaler reaches starts nothing more", lambda: [(Scalers, "check", _nothing)], seed=129),
    "kept-answers": Safeguard(
        "the next agent answers for what the one before has done",
        lambda: _after(Node, "adopt", lambda node, _: node._answers.clear()),
        seed=214,
    ),
    "adoption": Safeguard("the next agent takes over what the one before has left", lambda: [(Node, "adopt", _nothing)], seed=3),
    "replay-point": Safeguard(
        "what is committed is the oldest record that still counts",
        lambda: [(ReplayPoint, "offset", lambda self, now_ns: self.next_offset)],
        seed=257,
    ),
    "newest-counts": Safeguard("of a source the newest event counts, not the one that came last", _order_of_arrival, seed=13),
    "time-to-live": Safeguard(
        "a source that is silent counts as zero", lambda: _with_records(lambda event: msgspec.structs.replace(event, ttl=86400.0)), seed=5
    ),
    "shard-ready": Safeguard(
        "a gained shard is decided on when its demand, the functions and the nodes are known",
        lambda: _after(Service, "shard_gained", _decide_at_once),
        seed=1,
    ),
    "inventory": Safeguard("an agent tells each scaler that connects all that there is", _no_inventory, seed=1),
    "answers": Safeguard(
        "a command without answer is sent again on the next stream, and counts as failed after its deadline",
        lambda: [
            *_before(agents._Link, "_open", lambda link, *_: link.unanswered.clear()),
            *_configured(answer_grace_ns=_NEVER_NS),
        ],
        seed=6,
    ),
    "answer-timeout": Safeguard(
        "a command that is not answered in time counts as failed", lambda: _configured(answer_grace_ns=_NEVER_NS), seed=6
    ),
    "catch-up": Safeguard(
        "a scaler that was stopped reads demand before it releases anything", lambda: [(scaler.service, "_STALL_S", float("inf"))], seed=32
    ),
    "node-lost": Safeguard("what was on a node that stays away is started elsewhere", lambda: [(Agents, "_lost", _nothing)], seed=22),
    "keep-alive": Safeguard("a peer that says nothing any more is noticed", lambda: [(End, "setsockopt", _nothing)], seed=9),
    "retry": Safeguard("a failed start is owed", lambda: _configured(retry_ns=_NEVER_NS), seed=2),
    "orphans": Safeguard("instances of a function that is not known are released", lambda: _configured(orphan_idle_ns=_NEVER_NS), seed=53),
    "cold-start": Safeguard("a failed restore becomes a cold start", _no_cold_start, seed=92),
    "whole-removal": Safeguard("the removal of an instance goes on when its start is out of time", _stop_by_halves, seed=2),
}
