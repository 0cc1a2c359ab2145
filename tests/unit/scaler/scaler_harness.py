"""A planner with a clock and short words for events: what the planner's tests are written in."""

from __future__ import annotations

from agent.api.function import Function, FunctionSpec, Instances, Limits, Metadata, Policy
from agent.api.messages import (
    CheckpointInfo,
    CheckpointPublished,
    CommandFailed,
    Evict,
    Evicted,
    Fetch,
    FetchDone,
    InstanceExited,
    InstanceInfo,
    Inventory,
    MakeCheckpoint,
    Prepare,
    PrepareDone,
    Release,
    StandbyInfo,
    Start,
    StartDone,
    StartFailed,
)
from agent.api.records import DemandPosition, StartRecord
from scaler.commands import NodeCommand
from scaler.demand import DemandEvent
from scaler.events import (
    DemandSeen,
    Event,
    FunctionApplied,
    FunctionDeleted,
    NodeLost,
    NodeReport,
    Origin,
    ShardGained,
    ShardReady,
    Tick,
)
from scaler.levels import NS
from scaler.planner import Planner
from scaler.world import PlannerConfig

T0 = 1_700_000_000 * NS


def function(
    name: str = "f",
    *,
    command: str = "serve",
    concurrency: int = 1,
    minimum: int = 0,
    maximum: int = 10,
    idle_s: float | None = 30.0,
    checkpoint: str = "auto",
    memory_mb: int = 512,
    standby: int = 0,
) -> Function:
    return Function(
        metadata=Metadata(name=name),
        spec=FunctionSpec(
            command=[command],
            port=8080,
            limits=Limits(memory_mb=memory_mb, concurrency=concurrency),
            instances=Instances(min=minimum, max=maximum),
            policy=Policy(idle_seconds=idle_s, checkpoint=checkpoint, standby=standby),
        ),
    )


class Harness:
    """Feeds one planner; keeps what it was told so that it can be replayed."""

    def __init__(self, *, shards: tuple[int, ...] = (0,), config: PlannerConfig | None = None) -> None:
        self.config = config or PlannerConfig()
        self.planner = Planner("t", lambda name: 0, self.config)
        self.now = T0
        self.log: list[tuple[Event, int]] = []
        self.commands: list[NodeCommand] = []
        self.seq = 0
        self.made = 0
        for shard in shards:
            self.do(ShardGained(shard=shard, epoch=1))
            self.do(ShardReady(shard=shard))

    def do(self, event: Event) -> list[NodeCommand]:
        self.log.append((event, self.now))
        commands = self.planner.handle(event, self.now)
        self.commands += commands
        return commands

    def pass_s(self, seconds: float) -> list[NodeCommand]:
        """Let time pass in steps of the service's tick."""
        commands = []
        end = self.now + int(seconds * NS)
        while self.now < end:
            self.now = min(self.now + NS // 10, end)
            commands += self.do(Tick())
        return commands

    def node(self, name: str = "n1", *, memory_free_mb: int = 8000, instances=(), standbys=(), checkpoints=(), connected=True):
        return self.do(
            NodeReport(
                node=name,
                connected=connected,
                report=Inventory(
                    node=name,
                    memory_mb=16000,
                    memory_free_mb=memory_free_mb,
                    instances=list(instances),
                    standbys=list(standbys),
                    checkpoints=list(checkpoints),
                ),
            )
        )

    def apply(self, document: Function | None = None) -> list[NodeCommand]:
        return self.do(FunctionApplied(function=document or function()))

    def delete(self, name: str = "f") -> list[NodeCommand]:
        return self.do(FunctionDeleted(name=name))

    def demand(
        self,
        in_flight: int,
        *,
        name: str = "f",
        source: str = "s",
        epoch: int = 1,
        seq: int | None = None,
        ttl: float = 3600.0,
        shard: int = 0,
        seen_ns: int | None = None,
    ) -> list[NodeCommand]:
        self.seq += 1
        event = DemandEvent(
            function=name,
            source=source,
            epoch=epoch,
            seq=self.seq if seq is None else seq,
            at=self.now - 1000,
            in_flight=in_flight,
            ttl=ttl,
        )
        origin = Origin(at_ns=event.at, traceparent=f"tp-{self.seq}", position=DemandPosition("thaw.demand", shard, self.seq))
        seen = self.now if seen_ns is None else seen_ns
        return self.do(DemandSeen(event=event, shard=shard, seen_ns=seen, origin=origin))

    def done(self, command: NodeCommand, *, mode: str = "restore", instance: str = "") -> list[NodeCommand]:
        assert isinstance(command.message, Start)
        self.made += 1
        info = self.info(
            instance or f"i{self.made}",
            command.message.function,
            mode=mode,
            command_id=command.message.id,
        )
        record = StartRecord(
            command_id=command.message.id,
            function=info.function,
            checkpoint="" if mode == "cold" else "cp",
            start_mode=mode,
            ended_ns=self.now,
        )
        report = StartDone(command_id=command.message.id, instance=info, record=record)
        return self.do(NodeReport(node=command.node, report=report))

    def info(self, instance: str, document: Function, *, mode: str = "restore", command_id: str = "") -> InstanceInfo:
        return InstanceInfo(
            instance=instance,
            function=document.name,
            function_digest=document.digest,
            address="198.18.0.2:8080",
            start_mode=mode,
            started_ns=self.now,
            command_id=command_id,
        )

    def failed(self, command: NodeCommand, *, refused: bool = False, reason: str = "criu") -> list[NodeCommand]:
        assert isinstance(command.message, Start)
        report = StartFailed(
            command_id=command.message.id,
            function=command.message.function.name,
            reason="refused" if refused and reason == "criu" else reason,
            message="m",
            refused=refused,
        )
        return self.do(NodeReport(node=command.node, report=report))

    def exited(self, instance: str, *, node: str = "n1", name: str = "f", command_id: str = "") -> list[NodeCommand]:
        reason = "released" if command_id else "exited"
        report = InstanceExited(instance=instance, function=name, reason=reason, command_id=command_id)
        return self.do(NodeReport(node=node, report=report))

    def released(self, command: NodeCommand, *, name: str = "f") -> list[NodeCommand]:
        assert isinstance(command.message, Release)
        return self.exited(command.message.instance, node=command.node, name=name, command_id=command.message.id)

    def fetched(self, command: NodeCommand, *, checkpoint: str = "", generation: int = 0) -> list[NodeCommand]:
        assert isinstance(command.message, Fetch)
        document = command.message.function
        report = FetchDone(
            command_id=command.message.id,
            function=document.name,
            function_digest=document.digest,
            checkpoint=self.checkpoint(document, checkpoint, generation) if checkpoint else None,
        )
        return self.do(NodeReport(node=command.node, report=report))

    def published(self, command: NodeCommand, *, checkpoint: str = "cp", generation: int = 0) -> list[NodeCommand]:
        assert isinstance(command.message, MakeCheckpoint)
        document = command.message.function
        report = CheckpointPublished(
            command_id=command.message.id,
            function=document.name,
            function_digest=document.digest,
            checkpoint=self.checkpoint(document, checkpoint, generation),
        )
        return self.do(NodeReport(node=command.node, report=report))

    def evicted(self, command: NodeCommand) -> list[NodeCommand]:
        assert isinstance(command.message, Evict)
        report = Evicted(command_id=command.message.id, function=command.message.function_name)
        return self.do(NodeReport(node=command.node, report=report))

    def prepared(self, command: NodeCommand, *, checkpoint: str = "cp", standby: str = "") -> list[NodeCommand]:
        assert isinstance(command.message, Prepare)
        self.made += 1
        info = self.standby(standby or f"s{self.made}", command.message.function, checkpoint=checkpoint, command_id=command.message.id)
        return self.do(NodeReport(node=command.node, report=PrepareDone(command_id=command.message.id, standby=info)))

    def standby(self, name: str, document: Function, *, checkpoint: str = "cp", command_id: str = "") -> StandbyInfo:
        return StandbyInfo(
            standby=name,
            function=document.name,
            function_digest=document.digest,
            checkpoint=checkpoint,
            pss_bytes=4_000_000,
            made_ns=self.now,
            command_id=command_id,
        )

    def command_failed(self, command: NodeCommand, *, reason: str = "store", name: str = "f", refused: bool = False) -> list[NodeCommand]:
        report = CommandFailed(command_id=command.message.id, function=name, command="c", reason=reason, message="m", refused=refused)
        return self.do(NodeReport(node=command.node, report=report))

    def lost(self, name: str = "n1") -> list[NodeCommand]:
        return self.do(NodeLost(node=name))

    @staticmethod
    def checkpoint(document: Function, name: str = "cp", generation: int = 0) -> CheckpointInfo:
        return CheckpointInfo(
            function=document.name,
            function_digest=document.digest,
            checkpoint=name,
            image_bytes=1,
            complete=True,
            generation=generation,
        )


def only(kind: type, commands: list[NodeCommand]) -> list[NodeCommand]:
    return [command for command in commands if isinstance(command.message, kind)]


def starts(commands: list[NodeCommand]) -> list[NodeCommand]:
    return only(Start, commands)


def prepares(commands: list[NodeCommand]) -> list[NodeCommand]:
    return only(Prepare, commands)


def releases(commands: list[NodeCommand]) -> list[NodeCommand]:
    return only(Release, commands)


def running(harness: Harness, count: int, **options) -> list[str]:
    """Apply f and bring it to ``count`` instances; its checkpoint exists."""
    commands = harness.apply(function(**options))
    for fetch in only(Fetch, commands):
        harness.fetched(fetch, checkpoint="cp")
    for command in starts(commands) + starts(harness.demand(count)):
        harness.done(command)
    return [item.instance for item in harness.planner.explain("f").instances]
