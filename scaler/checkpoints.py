"""When a function is frozen, and where its checkpoint is fetched to.

In: a function whose document, checkpoint state or cold starts changed, and nodes that connect (:mod:`scaler.planner`,
:mod:`scaler.reports`). Out: Fetch, MakeCheckpoint and Evict commands in :attr:`scaler.world.World.out`.

The policy at this stage: each node is asked to fetch as soon as the function is applied, which also tells whether a
checkpoint of this digest exists. If none does, the first cold start makes one, on the node of that start, once; then
the other nodes fetch it.
"""

from __future__ import annotations

from agent.api.messages import CheckpointPublished, CommandFailed, Evict, Fetch, FetchDone, MakeCheckpoint
from agent.api.records import StartRecord
from scaler import forecasts, placeholders, placement
from scaler.levels import NS
from scaler.state import FunctionState
from scaler.timers import TimerKey
from scaler.world import Pending, World, backoff_ns

#: Reasons (:attr:`agent.errors.AgentError.reason`) for which another attempt gives the same result.
PERMANENT = ("not_freezable", "function_invalid")


def settle(world: World, state: FunctionState, now_ns: int) -> None:
    """Ask nodes to fetch, or one node to make the checkpoint, if it is time to."""
    function, checkpoint = state.function, state.checkpoint
    if function is None or function.spec.policy.checkpoint == "off" or not world.acting(state):
        return
    if (checkpoint.id or not checkpoint.checked) and now_ns >= checkpoint.fetch_retry_ns:
        for node in world.nodes.values():
            # What a checkpoint must fit is the image of a node's pods: one without any can't look for it.
            without = state.placeholders is not None and not state.placeholders.get(node.name)
            if node.up and not without and node.name not in checkpoint.cached and node.name not in checkpoint.asked:
                header = world.header(state, now_ns, world.config.command_deadline_ns)
                checkpoint.asked[node.name] = None
                checkpoint.fetching[header["id"]] = node.name
                world.send(Pending("fetch", state.name, node.name), Fetch(**header, function=function))
    if checkpoint.id or not checkpoint.checked or not checkpoint.cold_on or checkpoint.making or checkpoint.given_up:
        return
    if now_ns < checkpoint.retry_ns:
        return
    possible = placeholders.free(world, state)
    where = world.nodes.get(checkpoint.cold_on)
    if where is None or not where.up or (possible is not None and where.name not in possible):
        where = placement.choose(
            world.nodes.values(),
            memory_mb=function.spec.limits.memory_mb,
            costs=forecasts.costs(world, state),
            standby={},
            cached={},
            avoid={},
            possible=possible,
            now_ns=now_ns,
        )
    if where is None:
        return  # the next inventory comes back here, and so does the next placeholder
    readiness_ns = int(function.spec.readiness.timeout_seconds * NS) + world.config.readiness_margin_ns
    header = world.header(state, now_ns, max(world.config.checkpoint_deadline_ns, readiness_ns))
    checkpoint.making = header["id"]
    world.send(Pending("checkpoint", state.name, where.name), MakeCheckpoint(**header, function=function))


def fetched(world: World, state: FunctionState, node: str, report: FetchDone, now_ns: int) -> None:
    """A node has looked for the checkpoint."""
    checkpoint = state.checkpoint
    checkpoint.fetching.pop(report.command_id, None)
    if report.function_digest != state.digest:
        return
    checkpoint.checked = True
    checkpoint.fetch_failures = checkpoint.fetch_retry_ns = 0
    if report.checkpoint is not None:
        found = report.checkpoint.checkpoint
        if checkpoint.id and checkpoint.id != found:
            # It was replaced meanwhile. The others look again after a pause: nodes that disagree must not keep each
            # other busy.
            checkpoint.asked = {node: None}
            checkpoint.fetch_retry_ns = now_ns + world.config.fetch_retry_ns
            world.timers.arm(TimerKey("checkpoint", state.name, "fetch"), checkpoint.fetch_retry_ns)
        held_by(state, found, node, report.checkpoint.image_bytes)
        state.generation = max(state.generation, report.checkpoint.generation)
    elif not checkpoint.fetching:
        # The last word of the nodes that were asked: there is none (any more).
        checkpoint.cached.pop(node, None)
        if not checkpoint.cached:
            checkpoint.id = ""
    settle(world, state, now_ns)


def published(world: World, state: FunctionState, node: str, report: CheckpointPublished, now_ns: int) -> None:
    """A node made the checkpoint."""
    checkpoint = state.checkpoint
    if checkpoint.making == report.command_id:
        checkpoint.making = ""
    if state.function is None:
        evict(world, state, node, now_ns)
        return
    state.generation = max(state.generation, report.checkpoint.generation)
    if report.function_digest == state.digest:
        held_by(state, report.checkpoint.checkpoint, node, report.checkpoint.image_bytes)
        checkpoint.checked = True
        checkpoint.asked = {node: None}
        checkpoint.failures = checkpoint.retry_ns = 0
    settle(world, state, now_ns)


def held_by(state: FunctionState, checkpoint_id: str, node: str, image_bytes: int = 0) -> None:
    """A node holds the function's current checkpoint, which is the one that was known or replaces it."""
    checkpoint = state.checkpoint
    checkpoint.image_mb = image_bytes >> 20 or checkpoint.image_mb
    if checkpoint.id != checkpoint_id:
        checkpoint.id = checkpoint_id
        checkpoint.cached = {}  # what other nodes hold is older
        state.retire_standbys()
    checkpoint.cached[node] = None


def started(world: World, state: FunctionState, node: str, record: StartRecord, now_ns: int) -> None:
    """An instance of the current digest was started on ``node``: that tells of its checkpoint."""
    checkpoint = state.checkpoint
    if record.start_mode == "cold":
        started_cold(world, state, node, now_ns)
    elif record.checkpoint and checkpoint.id in ("", record.checkpoint):
        checkpoint.checked = True
        held_by(state, record.checkpoint, node)
    elif record.checkpoint and record.start_mode != "thaw":
        # The node takes another one for current: have it look.
        checkpoint.cached.pop(node, None)
        checkpoint.asked.pop(node, None)
        settle(world, state, now_ns)


def started_cold(world: World, state: FunctionState, node: str, now_ns: int) -> None:
    """An instance of the current digest was started cold on ``node``."""
    checkpoint = state.checkpoint
    checkpoint.cold_on = node
    if checkpoint.id:
        # A restore was not possible although there is a checkpoint: have the node look again, it may be gone from the
        # store.
        checkpoint.cached.pop(node, None)
        checkpoint.asked.pop(node, None)
    settle(world, state, now_ns)


def failed(world: World, state: FunctionState, node: str, report: CommandFailed, now_ns: int) -> None:
    """A fetch or the making of a checkpoint failed."""
    checkpoint = state.checkpoint
    if checkpoint.fetching.pop(report.command_id, None) is not None:
        checkpoint.asked.pop(node, None)
        checkpoint.fetch_failures += 1
        checkpoint.fetch_retry_ns = now_ns + backoff_ns(world.config.fetch_retry_ns, checkpoint.fetch_failures)
        world.timers.arm(TimerKey("checkpoint", state.name, "fetch"), checkpoint.fetch_retry_ns)
    elif checkpoint.making == report.command_id:
        checkpoint.making = ""
        checkpoint.failures += 1
        checkpoint.retry_ns = now_ns + backoff_ns(world.config.checkpoint_retry_ns, checkpoint.failures)
        if report.reason in PERMANENT:
            checkpoint.given_up = report.reason
        world.timers.arm(TimerKey("checkpoint", state.name, "make"), checkpoint.retry_ns)
    state.last_error = f"{report.command} on {node}: {report.reason}: {report.message}"


def evict(world: World, state: FunctionState, node: str, now_ns: int) -> None:
    """Have one node drop the function's image."""
    if world.acting(state):
        header = world.header(state, now_ns, world.config.command_deadline_ns)
        world.send(Pending("evict", state.name, node), Evict(**header, function_name=state.name))
