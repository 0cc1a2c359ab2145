"""How many standbys of a function there shall be, and the prepares and releases that lead there.

In: a function whose document, checkpoint, standbys or starts changed, and nodes with new room (:mod:`scaler.planner`,
:mod:`scaler.reports`). Out: Prepare and Release commands in :attr:`scaler.world.World.out`.

The policy at this stage:

- :func:`wanted` says how many, for the whole installation. They are made on nodes that hold the function's current
  checkpoint and have room for an instance of it, where the function has the fewest (:func:`scaler.placement.spread`).
- Never more are held or being made than are wanted, whatever digest those being made are of; those that leave do not
  count. One that is used or ends is replaced when that is reported, so that the replacement does not compete with the
  start it gives way to.
- A standby of an older digest or checkpoint, or one too many, leaves at once and for good, the newest of the node with the
  most first. Its release is held back while a start of the function is unanswered on its node, because the agent may just
  be thawing it.
- A failed prepare is repeated after a pause that doubles with each failed round; a refused one goes to another node.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from agent.api.messages import CommandFailed, Prepare, PrepareDone, Release, StandbyInfo
from scaler import forecasts, placeholders, placement
from scaler.ladder import Rung
from scaler.placement import Node
from scaler.state import FunctionState, Preparing, Standby
from scaler.timers import TimerKey
from scaler.world import Pending, World, backoff_ns

_MB = 1e6


def wanted(state: FunctionState) -> int:
    """Standbys of the function that the installation shall hold: what the forecast says, but not fewer than the policy."""
    function = state.function
    if function is None or function.spec.policy.checkpoint == "off":
        return 0
    predicted = state.holding.held[Rung.STANDBY] if state.holding is not None else 0
    return max(function.spec.policy.standby, min(predicted, function.spec.instances.max - state.need))


def settle(world: World, state: FunctionState, now_ns: int) -> None:
    """Let go what is too much and make what is missing."""
    if not world.acting(state):
        return
    books = state.standbys
    if not (books.leaving or world.short) and 0 <= wanted(state) - books.count <= len(books.making):
        return  # the usual case
    _retire_surplus(state)
    _release(world, state, now_ns)
    _prepare(world, state, now_ns)


def adopt(world: World, state: FunctionState, node: str, info: StandbyInfo, attempt: int = 0) -> bool:
    """Put a standby into the books; False when it is known, also as the instance that it has become."""
    if state.find(info.standby) is not None or state.standbys.find(info.standby, node) is not None:
        return False
    standby = Standby(info.standby, node, info.function_digest, info.checkpoint, info.pss_bytes / _MB, info.made_ns, attempt)
    world.nodes.setdefault(node, Node(node)).standbys[standby.id] = state.name
    state.standbys.add(standby)
    if not state.fits(standby):
        state.standbys.retire(standby)
    world.touched[state.name] = None
    return True


def forget(world: World, state: FunctionState, name: str, node: str) -> Standby | None:
    """Take a standby out of the books: it is gone, or has become an instance. None when it is not in them."""
    standby = state.standbys.remove(name, node)
    if standby is not None:
        if (where := world.nodes.get(node)) is not None:
            where.standbys.pop(name, None)
            where.memory_free_mb = min(where.memory_mb, where.memory_free_mb + _room_mb(standby))
        world.touched[state.name] = None
    return standby


def prepared(world: World, state: FunctionState, node: str, report: PrepareDone, now_ns: int) -> None:
    """A node has made a standby."""
    making = state.standbys.making.pop(report.command_id, None)
    forecasts.measured(world, state, "standby", report.standby.pss_bytes / _MB)
    if making is not None:
        state.standbys.failures = 0
    if adopt(world, state, node, report.standby, making.attempt if making is not None else 0):
        world.nodes[node].memory_free_mb -= _room_mb(report.standby)
    settle(world, state, now_ns)


def failed(world: World, state: FunctionState, node: str, report: CommandFailed, now_ns: int) -> None:
    """A prepare failed."""
    standbys = state.standbys
    state.last_error = f"{report.command} on {node}: {report.reason}: {report.message}"
    making = standbys.making.pop(report.command_id, None)
    if making is not None and report.refused:
        # Another node at once; with none left, this node again after a pause.
        standbys.failures = max(standbys.failures, making.attempt + 1)
        standbys.avoid[node] = now_ns + backoff_ns(world.config.prepare_retry_ns, standbys.failures)
    elif making is not None:
        _pause(world, state, making.attempt, now_ns)
    settle(world, state, now_ns)


def exited(world: World, state: FunctionState, standby: Standby, now_ns: int) -> None:
    """A standby that was to stay has ended by itself; one that did so at once counts as failed."""
    if now_ns - standby.made_ns < world.config.early_exit_ns:
        _pause(world, state, standby.attempt, now_ns)


def not_used(state: FunctionState, node: str) -> None:
    """A start that was to thaw a standby of ``node`` found none, or could not.

    What the books say of that node is in doubt: the oldest one leaves and is replaced. If it is not there its release says
    so, if it was faulty it is well lost.
    """
    if node in state.standbys.held:
        state.standbys.retire(next(iter(state.standbys.held[node].values())))


def release_failed(world: World, state: FunctionState, name: str, command_id: str, gone: bool, node: str, now_ns: int) -> None:
    """A release was not carried out: it is repeated after a pause, unless there is nothing to release."""
    leaving = state.standbys.leaving.get(name)
    if leaving is None or leaving.command_id != command_id:
        return
    if gone:
        forget(world, state, name, node)
    else:
        leaving.command_id, leaving.release_after_ns = "", now_ns + world.config.release_retry_ns
    settle(world, state, now_ns)


def _pause(world: World, state: FunctionState, attempt: int, now_ns: int) -> None:
    standbys = state.standbys
    standbys.failures = max(standbys.failures, attempt + 1)
    standbys.retry_ns = now_ns + backoff_ns(world.config.prepare_retry_ns, standbys.failures)
    world.timers.arm(TimerKey("standby", state.name, "failed"), standbys.retry_ns)


def _retire_surplus(state: FunctionState) -> None:
    standbys = state.standbys
    for _ in range(standbys.count - wanted(state)):
        fullest = max(standbys.held.values(), key=len)
        standbys.retire(next(reversed(fullest.values())))


def _release(world: World, state: FunctionState, now_ns: int) -> None:
    if not state.standbys.leaving:
        return
    starting_on = {start.node for start in state.starts.values()}
    later_ns: list[int] = []
    for leaving in state.standbys.leaving.values():
        standby = leaving.standby
        if leaving.command_id or standby.node in starting_on:
            continue
        if leaving.release_after_ns > now_ns:
            later_ns.append(leaving.release_after_ns)
            continue
        header = world.header(state, now_ns, world.config.command_deadline_ns)
        leaving.command_id = header["id"]
        world.send(Pending("release", state.name, standby.node, standby.id), Release(**header, instance=standby.id))
    if later_ns:
        world.timers.arm(TimerKey("standby", state.name, "release"), min(later_ns))


def _prepare(world: World, state: FunctionState, now_ns: int) -> None:
    function, standbys, checkpoint = state.function, state.standbys, state.checkpoint
    missing = wanted(state) - standbys.count - len(standbys.making)
    if missing <= 0:
        world.short.pop(state.name, None)
        return
    if function is None or not checkpoint.id or now_ns < standbys.retry_ns:
        return
    for name in [name for name, until_ns in standbys.avoid.items() if until_ns <= now_ns]:
        del standbys.avoid[name]
    making: dict[str, int] = {}
    for item in standbys.making.values():
        making[item.node] = making.get(item.node, 0) + 1
    held = {name: len(standbys.held.get(name, {})) + making.get(name, 0) for name in checkpoint.cached}
    sandboxes = placeholders.free(world, state)
    world.short.pop(state.name, None)
    for _ in range(missing):
        node = placement.spread(
            _preparers(world, state, making, sandboxes),
            memory_mb=function.spec.limits.memory_mb,
            held=held,
            avoid=standbys.avoid,
        )
        if node is None:
            # Nodes that are busy with prepares come back here with their answers, the others with what ends on them.
            world.short[state.name] = None
            if standbys.avoid:
                world.timers.arm(TimerKey("standby", state.name, "refused"), min(standbys.avoid.values()))
            return
        held[node.name] += 1
        making[node.name] = making.get(node.name, 0) + 1
        placeholders.take(sandboxes, node.name)
        header = world.header(state, now_ns, world.config.command_deadline_ns)
        standbys.making[header["id"]] = Preparing(node.name, standbys.failures)
        world.send(Pending("prepare", state.name, node.name), Prepare(**header, function=function))


def _preparers(world: World, state: FunctionState, making: dict[str, int], possible: Container[str] | None) -> Iterator[Node]:
    """Nodes that may be asked for one more."""
    for name in state.checkpoint.cached:
        node = world.nodes.get(name)
        if node is not None and (possible is None or name in possible) and making.get(name, 0) < world.config.prepares_ahead:
            yield node


def _room_mb(standby: Standby | StandbyInfo) -> int:
    pss_mb = standby.pss_mb if isinstance(standby, Standby) else standby.pss_bytes / _MB
    return max(1, round(pss_mb))
