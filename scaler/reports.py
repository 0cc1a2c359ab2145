"""What an agent's report changes.

In: :class:`scaler.events.NodeReport` and the two ways of losing a node, from :mod:`scaler.planner`. Out: changed
functions, which :mod:`scaler.instances`, :mod:`scaler.standbys` and :mod:`scaler.checkpoints` then settle.

The agent is the authority on its node: its inventory adds what the planner did not know and removes what is not there.
Answers to commands that the planner has given up (their deadline passed, their node was lost) still count as news of
what exists.
"""

from __future__ import annotations

import itertools

from agent.api.messages import (
    CheckpointPublished,
    CommandFailed,
    CommandTaken,
    Evicted,
    FetchDone,
    InstanceExited,
    InstanceInfo,
    Inventory,
    PrepareDone,
    StartDone,
    StartFailed,
)
from scaler import checkpoints, forecasts, instances, pressure, standbys
from scaler.commands import Need
from scaler.events import PlannerReport
from scaler.placement import Node
from scaler.state import FunctionState, Instance, Preparing
from scaler.world import Pending, World, backoff_ns

#: Reason of a failed release that means: it is gone already.
GONE = "instance_gone"
#: Reason of a refused start that means: the node's memory is full.
NO_ROOM = "no_room"
#: Reason of commands that were not answered in time.
NO_ANSWER = "no_answer"
#: Functions that get another try when one instance ends: enough to use the room, few enough to keep an event cheap.
WOKEN_PER_EXIT = 8


def handle(world: World, node: str, report: PlannerReport, now_ns: int, connected: bool) -> None:
    """Take in one report of one node."""
    if isinstance(report, Inventory):
        inventory(world, node, report, now_ns, connected)
    elif isinstance(report, CommandTaken):
        taken(world, node, report, now_ns)
    elif isinstance(report, StartDone):
        start_done(world, node, report, now_ns)
    elif isinstance(report, StartFailed):
        start_failed(world, node, report, now_ns)
    elif isinstance(report, PrepareDone):
        _prepare_done(world, node, report, now_ns)
    elif isinstance(report, InstanceExited):
        instance_exited(world, node, report, now_ns)
    else:
        _command_answered(world, node, report, now_ns)


def taken(world: World, node: str, report: CommandTaken, now_ns: int) -> None:
    """A node begins what another scaler has asked for: who decides next must not ask for it again."""
    if report.id in world.pending or report.until_ns + world.config.answer_grace_ns <= now_ns:
        return
    state = world.function(report.function)
    if report.kind == "checkpoint":
        if state.checkpoint.making:
            return
        state.checkpoint.making = report.id
    elif report.kind == "prepare":
        state.standbys.making[report.id] = Preparing(node, 0)
    else:
        instances.known_start(world, state, node, report.id, report.function_digest, now_ns)
    world.expect(report.id, Pending(report.kind, state.name, node, foreign=True), report.until_ns)
    world.touched[state.name] = None


def start_done(world: World, node: str, report: StartDone, now_ns: int) -> None:
    """An instance answered for the first time."""
    record = report.record
    state = world.function(report.instance.function)
    start = state.starts.get(report.command_id)
    _adopt(world, state, node, report.instance)
    state.last_start_mode = record.start_mode
    state.last_start_ms = (record.ended_ns - (start.need.since_ns if start else record.started_ns)) / 1e6
    # Waiting for its turn says nothing of what a start costs, nor does waiting for a node or for the failure of another start.
    queued_ns = sum(phase.end_ns - phase.start_ns for phase in record.phases if phase.name == "agent.queue")
    took_ns = record.ended_ns - (start.sent_ns if start else record.started_ns) - queued_ns
    forecasts.started(world, state, node, record.start_mode, max(0, took_ns) / 1e9)
    if start is not None and start.thaws and record.start_mode != "thaw":
        standbys.not_used(state, node)
    if report.instance.function_digest == state.digest:
        checkpoints.started(world, state, node, record, now_ns)
    _settle(world, state, now_ns)


def start_failed(world: World, node: str, report: StartFailed, now_ns: int) -> None:
    """A start came to nothing."""
    world.answered(report.command_id)
    state = world.functions.get(report.function)
    start = instances.forget_start(world, state, report.command_id) if state is not None else None
    if state is None or start is None:
        return
    where = world.nodes.get(node)
    state.last_error = f"start on {node}: {report.reason}: {report.message}"
    if start.digest == state.digest:
        if report.refused:
            # Another node at once. With none left, this node again after a pause.
            state.failures = max(state.failures, start.attempt + 1)
            state.avoid[node] = now_ns + backoff_ns(world.config.retry_ns, state.failures)
            if report.reason == NO_ROOM and where is not None and state.function is not None and start.need.origin is not None:
                pressure.make_room(world, where, state.function.spec.limits.memory_mb, now_ns)
            if world.acting(state) and state.wanted > state.have + len(state.owed):
                instances.place(world, state, [start.need], now_ns)
        else:
            if where is not None:
                where.failed_until_ns = now_ns + world.config.failed_lately_ns
                if report.reason == NO_ANSWER and any(other.up for other in world.nodes.values() if other is not where):
                    # What such a node costs is not known: it must not look quicker than one that answers slowly.
                    state.avoid[node] = now_ns + world.config.failed_lately_ns
            instances.failed(world, state, start.attempt, start.need, now_ns)
    _settle(world, state, now_ns)
    world.forget_if_empty(state)


def instance_exited(world: World, node: str, report: InstanceExited, now_ns: int) -> None:
    """An instance or a standby is gone: released, or by itself."""
    pending = world.answered(report.command_id) if report.command_id else None
    # An agent that no longer knows the instance does not know its function either.
    state = world.functions.get(pending.function if pending is not None else report.function)
    if state is None:
        return
    asked_for = report.instance in state.releasing or report.instance in state.standbys.leaving or pending is not None
    instance = instances.forget_instance(world, state, report.instance)
    if report.pss_bytes:
        forecasts.measured(world, state, "running", report.pss_bytes / 1e6)
    standby = standbys.forget(world, state, report.instance, node)
    if standby is not None and not asked_for:
        state.last_error = f"standby {standby.id} on {node}: {report.reason}, exit code {report.exit_code}"
        standbys.exited(world, state, standby, now_ns)
    if instance is not None and not asked_for:
        state.last_error = f"instance {report.instance} on {node}: {report.reason}, exit code {report.exit_code}"
        if instance.digest == state.digest and now_ns - instance.started_ns < world.config.early_exit_ns:
            if (where := world.nodes.get(node)) is not None:
                where.failed_until_ns = now_ns + world.config.failed_lately_ns
            instances.failed(world, state, instance.attempt, Need(state.newest, now_ns), now_ns)
    _settle(world, state, now_ns)
    world.touched[state.name] = None
    world.forget_if_empty(state)
    _wake(world, WOKEN_PER_EXIT, now_ns)


def inventory(world: World, name: str, report: Inventory, now_ns: int, connected: bool) -> None:
    """All that exists on a node, and its room."""
    node = world.nodes.setdefault(name, Node(name))
    node.up, node.memory_mb = True, report.memory_mb
    if connected or not node.connection:
        world.connections += 1
        node.connection = world.connections
    present = {info.instance for info in report.instances}
    changed: dict[str, None] = {}
    for instance_id, function in [item for item in node.instances.items() if item[0] not in present]:
        instances.forget_instance(world, world.functions[function], instance_id)
        changed[function] = None
    for info in sorted(report.instances, key=lambda item: (item.started_ns, item.instance)):
        state = world.function(info.function)
        if state.find(info.instance) is None:
            _adopt(world, state, name, info)
            changed[info.function] = None
            if info.start_mode == "cold" and info.function_digest == state.digest and not state.checkpoint.cold_on:
                state.checkpoint.cold_on = name
    held = {item.function: item for item in report.checkpoints}
    for function, item in held.items():
        known = world.functions.if_awake(function)
        if known is None:
            continue
        known.generation = max(known.generation, item.generation)
        if item.function_digest == known.digest:
            if known.checkpoint.id in ("", item.checkpoint):
                checkpoints.held_by(known, item.checkpoint, name, item.image_bytes)
                changed[function] = None
            known.checkpoint.checked = True
    changed.update(_standbys_of(world, name, report))
    changed.update(_underway_of(world, name, report, now_ns))
    node.memory_free_mb = report.memory_free_mb
    for state in world.functions.awake():
        if name in state.checkpoint.cached and state.name not in held:
            del state.checkpoint.cached[name]
        if connected:
            state.checkpoint.asked.pop(name, None)
            checkpoints.settle(world, state, now_ns)
    for function in changed:
        if (found := world.functions.get(function)) is not None:
            _settle(world, found, now_ns)
            world.touched[function] = None
            world.forget_if_empty(found)
    _wake(world, len(world.waiting) + len(world.short), now_ns)


def _standbys_of(world: World, name: str, report: Inventory) -> dict[str, None]:
    """Take over the standbys of a node; returns the functions that are concerned."""
    node, changed = world.nodes[name], dict[str, None]()
    present = {info.standby for info in report.standbys}
    for standby, function in [item for item in node.standbys.items() if item[0] not in present]:
        standbys.forget(world, world.functions[function], standby, name)
        changed[function] = None
    for info in sorted(report.standbys, key=lambda item: (item.made_ns, item.standby)):
        world.answered(info.command_id)
        state = world.function(info.function)
        making = state.standbys.making.pop(info.command_id, None)
        if standbys.adopt(world, state, name, info) or making is not None:
            changed[info.function] = None
    return changed


def _underway_of(world: World, name: str, report: Inventory, now_ns: int) -> dict[str, None]:
    """Take over what is being made on a node, and drop what others have asked for and is not; returns the functions that are concerned."""
    changed = dict[str, None]()
    underway = {item.id: item for item in report.underway}
    for command_id, pending in [item for item in world.pending.items() if item[1].foreign and item[1].node == name]:
        if command_id in underway or (state := world.functions.get(pending.function)) is None:
            continue
        world.answered(command_id)
        instances.forget_start(world, state, command_id)
        state.standbys.making.pop(command_id, None)
        if state.checkpoint.making == command_id:
            state.checkpoint.making = ""
        changed[state.name] = None
    done = {info.command_id for info in report.instances} | {info.command_id for info in report.standbys}
    for command_id, item in underway.items():
        if command_id not in done:
            taken(world, name, item, now_ns)
            changed[item.function] = None
    return changed


def node_lost(world: World, name: str, now_ns: int) -> None:
    """Everything on a node counts as gone; what is needed of it is started elsewhere."""
    node = world.nodes.pop(name, None)
    if node is None:
        return
    again: dict[str, list[Need]] = {}
    for instance_id, function in list(node.instances.items()):
        instances.forget_instance(world, world.functions[function], instance_id)
        again.setdefault(function, [])
    for standby, function in list(node.standbys.items()):
        standbys.forget(world, world.functions[function], standby, name)
        again.setdefault(function, [])
    for command_id, pending in [item for item in world.pending.items() if item[1].node == name]:
        world.answered(command_id)
        state = world.functions.get(pending.function)
        if state is None:
            continue
        start = instances.forget_start(world, state, command_id)
        if start is not None and start.digest == state.digest:
            again.setdefault(state.name, []).append(start.need)
        if state.standbys.making.pop(command_id, None) is not None:
            again.setdefault(state.name, [])
        if pending.kind in ("fetch", "checkpoint"):
            lost = CommandFailed(
                command_id=command_id,
                function=state.name,
                command=pending.kind,
                reason="node_lost",
                message="the node is away",
            )
            checkpoints.failed(world, state, name, lost, now_ns)
    for state in world.functions.awake():
        state.checkpoint.cached.pop(name, None)
        state.checkpoint.asked.pop(name, None)
        state.avoid.pop(name, None)
        state.standbys.avoid.pop(name, None)
    for function, needs in again.items():
        state = world.functions[function]
        missing = state.wanted - state.have - len(state.owed)
        if world.acting(state) and missing > 0:
            instances.place(world, state, needs[:missing], now_ns)
        _settle(world, state, now_ns)
        world.touched[function] = None
        world.forget_if_empty(state)


def overdue(world: World, command_id: str, now_ns: int) -> None:
    """A command was not answered in time: it counts as failed."""
    pending = world.pending.get(command_id)
    if pending is None:
        return
    message = "no answer within deadline and grace"
    if pending.kind == "start":
        failed = StartFailed(command_id=command_id, function=pending.function, reason=NO_ANSWER, message=message)
        start_failed(world, pending.node, failed, now_ns)
    else:
        _command_answered(
            world,
            pending.node,
            CommandFailed(
                command_id=command_id,
                function=pending.function,
                command=pending.kind,
                reason=NO_ANSWER,
                message=message,
            ),
            now_ns,
        )


def _prepare_done(world: World, node: str, report: PrepareDone, now_ns: int) -> None:
    world.answered(report.command_id)
    state = world.function(report.standby.function)
    standbys.prepared(world, state, node, report, now_ns)
    world.forget_if_empty(state)


def _command_answered(world: World, node: str, report: FetchDone | CheckpointPublished | Evicted | CommandFailed, now_ns: int) -> None:
    pending = world.answered(report.command_id)
    state = world.functions.get(pending.function if pending is not None else report.function)
    if state is None:
        return
    world.touched[state.name] = None
    if isinstance(report, FetchDone):
        checkpoints.fetched(world, state, node, report, now_ns)
        standbys.settle(world, state, now_ns)
    elif isinstance(report, CheckpointPublished):
        checkpoints.published(world, state, node, report, now_ns)
        standbys.settle(world, state, now_ns)
    elif isinstance(report, Evicted):
        state.checkpoint.cached.pop(node, None)
        state.checkpoint.asked.pop(node, None)
    elif pending is not None and pending.kind == "release":
        _release_failed(world, state, node, pending, report, now_ns)
    elif pending is not None and pending.kind == "prepare":
        standbys.failed(world, state, node, report, now_ns)
        world.forget_if_empty(state)
    else:
        checkpoints.failed(world, state, node, report, now_ns)


def _release_failed(world: World, state: FunctionState, node: str, pending: Pending, report: CommandFailed, now_ns: int) -> None:
    state.last_error = f"release of {pending.instance} on {node}: {report.reason}: {report.message}"
    standbys.release_failed(world, state, pending.instance, report.command_id, report.reason == GONE, node, now_ns)
    released = state.releasing.get(pending.instance)
    if released is None or released[1] != report.command_id:
        world.forget_if_empty(state)
        return
    if report.reason == GONE:
        instances.forget_instance(world, state, pending.instance)
    elif report.reason == NO_ANSWER and world.acting(state):
        # It may be gone, or go at any moment: it serves nobody's demand any more.
        instances.release(world, state, released[0], now_ns)
    else:
        instance = state.releasing.pop(pending.instance)[0]
        instance.release_after_ns = now_ns + world.config.release_retry_ns
        state.add(instance)
    instances.settle(world, state, now_ns)
    world.forget_if_empty(state)


def _adopt(world: World, state: FunctionState, node: str, info: InstanceInfo) -> None:
    """Put an instance into the books; settles the start that it came of, whoever sent that."""
    world.answered(info.command_id)
    start = instances.forget_start(world, state, info.command_id)
    if start is not None:
        state.failures = 0
    if state.find(info.instance) is not None:
        return
    standbys.forget(world, state, info.instance, node)  # it was one until now
    where = world.nodes.setdefault(node, Node(node))
    where.instances[info.instance] = state.name
    where.book(info.instance, forecasts.expected_mb(world, state, info.start_mode) if state.function is not None else 0)
    state.add(
        Instance(
            id=info.instance,
            node=node,
            digest=info.function_digest,
            address=info.address,
            start_mode=info.start_mode,
            started_ns=info.started_ns,
            attempt=start.attempt if start is not None else 0,
        )
    )
    world.touched[state.name] = None


def _settle(world: World, state: FunctionState, now_ns: int) -> None:
    """Instances first: a standby must not delay a start."""
    instances.settle(world, state, now_ns)
    standbys.settle(world, state, now_ns)


def _wake(world: World, count: int, now_ns: int) -> None:
    """Let up to ``count`` functions that found no node try again: there may be room now. Instances before standbys."""
    waiting = list(itertools.islice(world.waiting, count))
    short = list(itertools.islice(world.short, count - len(waiting)))
    for name in waiting:
        del world.waiting[name]
        if (state := world.functions.get(name)) is not None:
            state.avoid.clear()
            instances.settle(world, state, now_ns)
    for name in short:
        del world.short[name]
        if (state := world.functions.get(name)) is not None:
            state.standbys.avoid.clear()
            standbys.settle(world, state, now_ns)
