"""Placeholder pods: how many a function shall have, and which nodes have one that is free.

In: what :mod:`scaler.planner` was told of a function's pods (:class:`scaler.events.PlaceholdersSeen`), and what it wants of the function.
Out: the number that :mod:`scaler.edges.kubernetes.controller` brings about; nodes for :mod:`scaler.instances`, :mod:`scaler.standbys` and
:mod:`scaler.checkpoints`. Pure.

In Kubernetes an instance, a standby or the process that is frozen into a checkpoint takes one placeholder of its function. A node
without a free one can't be asked for any of them. Which of a node's placeholders is taken is the agent's choice, so they are counted
here, not named. A function without pods (``None``) is on nodes that make their own sandboxes.
"""

from __future__ import annotations

from collections.abc import Iterator

from scaler.state import FunctionState
from scaler.world import World


def target(*, wanted: int, standbys: int, making: bool, maximum: int, ahead: int) -> int:
    """How many placeholders of its current digest a function shall have, those in use included.

    Args:
        wanted: instances that shall run.
        standbys: that shall be held beside them.
        making: a checkpoint is being made, or will be as soon as there is a placeholder for it.
        maximum: instances that may ever run at once: a placeholder more could never be used.
        ahead: empty ones beside all these, for what nobody has expected.
    """
    used = max(0, wanted) + max(0, standbys)
    # A quarter more than is used: what grows, grows by shares.
    spare = max(ahead, -(-used // 4)) if ahead else 0
    # What is frozen is no instance and comes on top of them; but a placeholder that nothing runs in serves as well.
    return max(min(maximum, used + spare), min(maximum, used) + making)


def free(world: World, state: FunctionState) -> dict[str, int] | None:
    """Nodes with a placeholder that nothing is in or on the way to, and how many; None: the function has no pods."""
    if state.placeholders is None:
        return None
    left = dict(state.placeholders)
    for node in _users(world, state):
        if node in left:
            left[node] -= 1
    return {node: count for node, count in left.items() if count > 0}


def take(free: dict[str, int] | None, node: str) -> None:
    """One of ``free`` is on its way to being used."""
    if free is not None:
        free[node] -= 1
        if not free[node]:
            del free[node]


def _users(world: World, state: FunctionState) -> Iterator[str]:
    """The node of each of the current digest that takes a placeholder or soon will."""
    digest, standbys = state.digest, state.standbys
    for instance in state.instances():
        if instance.digest == digest:
            yield instance.node
    for start in state.starts.values():
        # One that thaws takes the placeholder of its standby.
        if start.digest == digest and not start.thaws:
            yield start.node
    for held in standbys.held.values():
        for standby in held.values():
            yield standby.node
    for leaving in standbys.leaving.values():
        if leaving.standby.digest == digest:
            yield leaving.standby.node
    for making in standbys.making.values():
        yield making.node
    if (pending := world.pending.get(state.checkpoint.making)) is not None:
        yield pending.node
