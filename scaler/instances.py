"""How many instances of a function there shall be, and the starts and releases that lead there.

In: a function whose level, document, instances or starts changed (:mod:`scaler.planner`, :mod:`scaler.reports`). Out:
Start and Release commands in :attr:`scaler.world.World.out`.

The policy at this stage:

- wanted = level / concurrency, rounded up, and what the forecast holds running beside that, within min and max. What is
  missing is started at once, in one decision; starts in progress count.
- What is surplus is released after ``policy.idleSeconds`` in which it was not needed, or at once when the forecast has
  said how long, the newest instance first: the oldest has most of its pages.
- Instances of an older digest serve until as many new ones do, then go at once; when nothing is wanted they go at once.
  While they are replaced they come on top of ``max``: the alternative is a gap in service.
- A start goes to a node with a standby that no other start counts on, before any other. Which standby is used is the
  agent's choice, and whether one was is told by its report.
- A failed start is owed: repeated after a pause that doubles with each failed round, for as long as the level asks for
  it. The pause holds back only what failed; more demand starts more at once.
"""

from __future__ import annotations

from agent.api.messages import Release, Start
from scaler import forecasts, placeholders, placement
from scaler.commands import Need
from scaler.ladder import Rung
from scaler.levels import NS
from scaler.placement import Node
from scaler.state import FunctionState, Instance, Starting
from scaler.timers import TimerKey
from scaler.world import Pending, World, backoff_ns


def settle(world: World, state: FunctionState, now_ns: int, need: Need | None = None) -> None:
    """Start what is missing and release what is surplus.

    Args:
        world: the planner's memory.
        state: the function.
        now_ns: the time.
        need: what fresh starts answer to; None: the newest demand, counted from now.
    """
    if not world.acting(state):
        return
    world.touched[state.name] = None
    if not (state.owed or state.surplus or state.stale or world.waiting) and state.have == state.wanted:
        return  # the usual case
    _start_missing(world, state, now_ns, need)
    _release_surplus(world, state, now_ns)


def place(world: World, state: FunctionState, needs: list[Need], now_ns: int, predicted: int = 0) -> None:
    """Start one instance per need, each on the best node; what finds none is owed.

    Args:
        world: the planner's memory.
        state: the function.
        needs: what the starts answer to.
        now_ns: the time.
        predicted: so many of them, the last ones, are the forecast's: they take room that is free, or none.
    """
    function = state.function
    if function is None:
        return
    for name in [name for name, until_ns in state.avoid.items() if until_ns <= now_ns]:
        del state.avoid[name]
    standby = state.free_standbys()
    sandboxes = placeholders.free(world, state)
    costs = forecasts.costs(world, state)
    for index, need in enumerate(needs):
        node = placement.choose(
            world.nodes.values(),
            memory_mb=function.spec.limits.memory_mb,
            costs=costs,
            standby=standby,
            cached=state.checkpoint.cached,
            avoid=state.avoid,
            possible=sandboxes,
            now_ns=now_ns,
        )
        if index >= len(needs) - predicted and (node is None or node.memory_free_mb < function.spec.limits.memory_mb):
            return
        if node is None:
            state.owed.extend(needs[index : len(needs) - predicted])
            world.waiting[state.name] = None
            if state.avoid:
                world.timers.arm(TimerKey("retry", state.name, "refused"), min(state.avoid.values()))
            return
        thaws = node.name in standby
        if thaws:
            standby[node.name] -= 1
            if not standby[node.name]:
                del standby[node.name]
        else:
            placeholders.take(sandboxes, node.name)
        expected_s = costs.delay_s[Rung.STANDBY if thaws else Rung.CACHED if node.name in state.checkpoint.cached else Rung.STORED]
        _start(world, state, node, need, thaws, expected_s, now_ns)


def failed(world: World, state: FunctionState, attempt: int, need: Need, now_ns: int) -> None:
    """Owe a start that failed, and set the pause before it is repeated. Whoever does not decide for the function owes nothing."""
    if not world.acting(state):
        return
    state.failures = max(state.failures, attempt + 1)
    state.retry_ns = now_ns + backoff_ns(world.config.retry_ns, state.failures)
    state.owed.append(need)
    world.timers.arm(TimerKey("retry", state.name, "failed"), state.retry_ns)


def release(world: World, state: FunctionState, instance: Instance, now_ns: int) -> None:
    """Let one instance go."""
    header = world.header(state, now_ns, world.config.command_deadline_ns)
    state.ready.pop(instance.id, None)
    state.stale.pop(instance.id, None)
    state.releasing[instance.id] = (instance, header["id"])
    world.send(Pending("release", state.name, instance.node, instance.id), Release(**header, instance=instance.id))


def known_start(world: World, state: FunctionState, node: str, command_id: str, digest: str, now_ns: int) -> None:
    """Put a start into the books that another scaler has asked for."""
    thaws = node in state.free_standbys()
    state.starts[command_id] = Starting(command_id, node, digest, Need(None, now_ns), 0, thaws, now_ns)
    state.starting += digest == state.digest
    if (where := world.nodes.get(node)) is not None and state.function is not None:
        where.begin(command_id, forecasts.costs(world, state).delay_s[Rung.STANDBY if thaws else Rung.CACHED])
        where.book(command_id, forecasts.expected_mb(world, state))


def forget_start(world: World, state: FunctionState, command_id: str) -> Starting | None:
    """Take a start out of the books; None when it is not (or no longer) in them."""
    start = state.starts.pop(command_id, None)
    if start is None:
        return None
    if start.digest == state.digest:
        state.starting -= 1
    if (node := world.nodes.get(start.node)) is not None:
        node.end(command_id)
        node.unbook(command_id)
    return start


def forget_instance(world: World, state: FunctionState, instance_id: str) -> Instance | None:
    """Take an instance out of the books; its memory counts as free again."""
    instance = state.remove(instance_id)
    if instance is not None and (node := world.nodes.get(instance.node)) is not None:
        node.instances.pop(instance_id, None)
        node.unbook(instance_id)
    return instance


def _start_missing(world: World, state: FunctionState, now_ns: int, need: Need | None) -> None:
    missing = state.wanted - state.have
    if missing <= 0:
        state.owed.clear()
        world.waiting.pop(state.name, None)
        return
    del state.owed[missing:]
    fresh = need or Need(state.newest if state.levels.level else None, now_ns)
    number = missing - len(state.owed)
    # What the forecast adds is nobody's demand.
    predicted = min(number, max(0, state.wanted - max(state.have, state.demanded)))
    needs = [fresh] * (number - predicted) + [Need(None, now_ns)] * predicted
    if now_ns >= state.retry_ns:
        needs = state.owed + needs
        state.owed = []
    elif state.failures:
        predicted, needs = 0, needs[: number - predicted]
    world.waiting.pop(state.name, None)
    place(world, state, needs, now_ns, predicted)


def _start(world: World, state: FunctionState, node: Node, need: Need, thaws: bool, expected_s: float, now_ns: int) -> None:
    function = state.function
    assert function is not None
    readiness_ns = int(function.spec.readiness.timeout_seconds * NS) + world.config.readiness_margin_ns
    header = world.header(state, now_ns, max(world.config.start_deadline_ns, readiness_ns))
    command_id = header["id"]
    state.starts[command_id] = Starting(command_id, node.name, state.digest, need, state.failures, thaws, now_ns)
    state.starting += 1
    node.begin(command_id, expected_s)
    node.book(command_id, forecasts.expected_mb(world, state))
    world.send(Pending("start", state.name, node.name), Start(**header, function=function), need)


def _release_surplus(world: World, state: FunctionState, now_ns: int) -> None:
    if now_ns < world.releases_from_ns:
        if state.have > state.wanted or state.stale:
            world.timers.arm(TimerKey("idle", state.name), world.releases_from_ns)
        return
    due: list[int] = []
    if state.function is None and not state.deleted:
        # Instances of a function that nobody has described to us: not needed, but not to be killed in haste either.
        pool, idle_ns, keep, surplus = state.stale, world.config.orphan_idle_ns, 0, len(state.stale)
    else:
        wanted = state.wanted
        _release(world, state, state.stale, len(state.stale) - max(0, wanted - len(state.ready)), now_ns, due)
        pool, idle_ns, keep, surplus = state.ready, _idle_ns(world, state), wanted, max(0, state.have - wanted)
    del state.surplus[surplus:]
    state.surplus.extend([now_ns] * (surplus - len(state.surplus)))
    over = sum(since_ns + idle_ns <= now_ns for since_ns in state.surplus) if len(pool) > keep else 0
    released = _release(world, state, pool, min(over, len(pool) - keep), now_ns, due)
    del state.surplus[:released]
    if state.surplus and state.surplus[0] + idle_ns > now_ns:
        due.append(state.surplus[0] + idle_ns)
    if due:
        world.timers.arm(TimerKey("idle", state.name), min(due))
    else:
        world.timers.disarm(TimerKey("idle", state.name))


def _idle_ns(world: World, state: FunctionState) -> int:
    """How long an instance stays that nobody needs."""
    if state.function is None:
        return 0
    idle_s = state.function.spec.policy.idle_seconds
    if idle_s is not None:
        return int(idle_s * NS)
    # Without a forecast nobody has said yet for how long it pays: the scaler may just have started.
    return 0 if state.holding is not None else world.config.unknown_idle_ns


def _release(world: World, state: FunctionState, pool: dict[str, Instance], count: int, now_ns: int, due: list[int]) -> int:
    """Release up to ``count`` of ``pool``, newest first; adds to ``due`` when one of them may be tried again."""
    if count <= 0:
        return 0
    chosen: list[Instance] = []
    for instance in reversed(pool.values()):
        if len(chosen) == count:
            break
        if instance.release_after_ns > now_ns:
            due.append(instance.release_after_ns)
        else:
            chosen.append(instance)
    for instance in chosen:
        release(world, state, instance, now_ns)
    return len(chosen)
