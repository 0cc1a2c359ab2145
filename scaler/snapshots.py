"""What others may see of a function: plain values.

In: the planner's :class:`~scaler.state.FunctionState`. Out: :class:`FunctionSnapshot`, published to ``thaw.state`` and printed by
``thaw get functions``.
"""

from __future__ import annotations

import msgspec

from scaler.explain import Explanation, explanation
from scaler.state import FunctionState


class InstanceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One instance for people."""

    instance: str
    node: str
    address: str
    start_mode: str
    started_ns: int
    state: str


class FunctionSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One function for people: what is wanted, what is there, why.

    Attributes:
        rung: highest rung at which any node holds it.
        demanded: instances that the level and the bounds ask for.
        wanted: these and what the forecast holds running beside them.
        last_start_ms: need (demand event) to first response of the newest start.
        owed: instances wanted whose start waits for a retry or for a node.
        standbys: those that may be used.
        standbys_wanted: how many there shall be.
        standbys_making: those on their way.
        standbys_mb: memory of all that exist (proportional set size, when they were made).
    """

    function: str
    shard: int
    digest: str
    rung: str
    level: int
    sources: int
    demanded: int
    wanted: int
    starting: int
    owed: int
    instances: list[InstanceSnapshot]
    standbys: int
    standbys_wanted: int
    standbys_making: int
    standbys_mb: float
    checkpoint: str
    cached_on: list[str]
    making_checkpoint: bool
    last_start_ms: float
    last_start_mode: str
    last_error: str
    explanation: Explanation | None = None


def snapshot(state: FunctionState, standbys_wanted: int) -> FunctionSnapshot:
    """The plain form of ``state``."""
    shown = [(instance, word) for group, word in ((state.ready, "ready"), (state.stale, "stale")) for instance in group.values()]
    shown += [(instance, "releasing") for instance, _ in state.releasing.values()]
    checkpoint, standbys = state.checkpoint, state.standbys
    held = [standby for group in standbys.held.values() for standby in group.values()]
    rung = "running" if state.ready or state.stale else "standby" if held else "cached" if checkpoint.cached else "stored"
    return FunctionSnapshot(
        function=state.name,
        shard=state.shard,
        digest=state.digest,
        rung=rung,
        level=state.levels.level,
        sources=len(state.levels.sources),
        demanded=state.demanded,
        wanted=state.wanted,
        starting=state.starting,
        owed=len(state.owed),
        instances=[
            InstanceSnapshot(
                instance=instance.id,
                node=instance.node,
                address=instance.address,
                start_mode=instance.start_mode,
                started_ns=instance.started_ns,
                state=word,
            )
            for instance, word in shown
        ],
        standbys=len(held),
        standbys_wanted=standbys_wanted,
        standbys_making=len(standbys.making),
        standbys_mb=round(sum(standby.pss_mb for standby in [*held, *(item.standby for item in standbys.leaving.values())]), 1),
        checkpoint=checkpoint.id,
        cached_on=list(checkpoint.cached),
        making_checkpoint=bool(checkpoint.making),
        last_start_ms=state.last_start_ms,
        last_start_mode=state.last_start_mode,
        last_error=state.last_error,
        explanation=explanation(state),
    )
