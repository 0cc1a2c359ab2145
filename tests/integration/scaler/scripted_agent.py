"""An agent for tests: speaks the real protocol on a real stream, and does what a script says instead of starting processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from agent.api.connection import Connection
from agent.api.messages import (
    AgentCommand,
    CheckpointInfo,
    CheckpointPublished,
    CommandFailed,
    CommandTaken,
    Evict,
    Evicted,
    Fetch,
    FetchDone,
    Hello,
    InstanceExited,
    InstanceInfo,
    Inventory,
    MakeCheckpoint,
    Message,
    Prepare,
    PrepareDone,
    Release,
    StandbyInfo,
    Start,
    StartDone,
    StartFailed,
)
from agent.api.records import Phase, StartRecord
from infra.tls import Credentials


class ScriptedAgent:
    """One node. ``starts(command, number)`` returns how long a start takes, or why it fails (``refused`` or a reason)."""

    def __init__(
        self,
        name: str = "n1",
        starts: Callable[[Start, int], float | str] | None = None,
        host: str = "127.0.0.1",
        credentials: Credentials | None = None,
    ) -> None:
        self.name = name
        self.starts = starts or (lambda command, number: 0.0)
        self.commands: list[tuple[int, AgentCommand]] = []
        self.instances: dict[str, InstanceInfo] = {}
        self.standbys: dict[str, StandbyInfo] = {}
        self.checkpoints: dict[str, CheckpointInfo] = {}
        self.port = 0
        self._host = host
        self._credentials = credentials
        self._answers: dict[str, Message | None] = {}
        self._underway: dict[str, CommandTaken] = {}
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task] = set()
        self._changed = asyncio.Event()

    async def start(self) -> None:
        context = self._credentials.server() if self._credentials else None
        self._server = await asyncio.start_server(self._serve, self._host, self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every stream; instances stay, as they do when an agent dies."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            await connection.close()

    async def close(self) -> None:
        await self.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of(self, kind: type) -> list[AgentCommand]:
        return [command for _, command in self.commands if isinstance(command, kind)]

    def running(self, function: str) -> int:
        return sum(info.function == function for info in self.instances.values())

    def waiting(self, function: str) -> int:
        """Its standbys."""
        return sum(info.function == function for info in self.standbys.values())

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until something that happens here makes ``condition`` true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _serve(self, reader, writer) -> None:
        connection = Connection(reader, writer)
        self._connections.add(connection)
        try:
            await connection.shake_hands(Hello(identity=self.name, role="agent"))
            connection.send(
                Inventory(
                    node=self.name,
                    memory_mb=16000,
                    memory_free_mb=12000,
                    instances=list(self.instances.values()),
                    standbys=list(self.standbys.values()),
                    checkpoints=list(self.checkpoints.values()),
                    underway=list(self._underway.values()),
                )
            )
            while (command := await connection.receive()) is not None:
                self._take(command)
        except ConnectionError:
            pass
        finally:
            self._connections.discard(connection)
            await connection.close()

    def _take(self, command: AgentCommand) -> None:
        self.commands.append((time.time_ns(), command))
        self._changed.set()
        if command.id in self._answers:
            if (answer := self._answers[command.id]) is not None:
                self._report(answer)
            return
        self._answers[command.id] = None
        task = asyncio.ensure_future(self._do(command, time.time_ns()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, command: AgentCommand, received_ns: int) -> None:
        if isinstance(command, Start):
            self._underway[command.id] = CommandTaken(
                id=command.id,
                kind="start",
                function=command.function.name,
                function_digest=command.function.digest,
                until_ns=command.deadline_ns,
            )
            self._report(self._underway[command.id])
        answer = self._answers[command.id] = await self._answer(command, received_ns)
        self._underway.pop(command.id, None)
        self._report(answer)

    async def _answer(self, command: AgentCommand, received_ns: int) -> Message:
        match command:
            case Start():
                return await self._start(command, received_ns)
            case Release():
                info = self.instances.pop(command.instance, None) or self.standbys.pop(command.instance, None)
                function = info.function if info else ""
                return InstanceExited(instance=command.instance, function=function, reason="released", command_id=command.id)
            case Prepare():
                return self._prepare(command)
            case Fetch():
                known = self.checkpoints.get(command.function.name)
                return FetchDone(
                    command_id=command.id,
                    function=command.function.name,
                    function_digest=command.function.digest,
                    checkpoint=known if known and known.function_digest == command.function.digest else None,
                )
            case MakeCheckpoint():
                name, digest = command.function.name, command.function.digest
                self.checkpoints[name] = CheckpointInfo(
                    function=name, function_digest=digest, checkpoint=f"{name}-1", image_bytes=1, complete=True
                )
                return CheckpointPublished(command_id=command.id, function=name, function_digest=digest, checkpoint=self.checkpoints[name])
            case Evict():
                self.checkpoints.pop(command.function_name, None)
                return Evicted(command_id=command.id, function=command.function_name)
        raise AssertionError(command)

    def _prepare(self, command: Prepare) -> Message:
        name, digest = command.function.name, command.function.digest
        known = self.checkpoints.get(name)
        if known is None or known.function_digest != digest:
            return CommandFailed(
                command_id=command.id, function=name, command="prepare", reason="checkpoint_missing", message="there is no checkpoint"
            )
        info = StandbyInfo(
            standby=f"{name}-{command.id}",
            function=name,
            function_digest=digest,
            checkpoint=known.checkpoint,
            pss_bytes=4_100_000,
            made_ns=time.time_ns(),
            command_id=command.id,
        )
        self.standbys[info.standby] = info
        return PrepareDone(command_id=command.id, standby=info, seconds={"restore": 0.001})

    async def _start(self, command: Start, received_ns: int) -> Message:
        outcome = self.starts(command, len(self.of(Start)))
        if isinstance(outcome, str):
            return StartFailed(
                command_id=command.id,
                function=command.function.name,
                reason=outcome,
                message="as the script says",
                refused=outcome == "refused",
            )
        if outcome:
            await asyncio.sleep(outcome)
        known = self.checkpoints.get(command.function.name)
        standby = next((item for item in self.standbys.values() if item.function_digest == command.function.digest), None)
        if standby is not None:
            del self.standbys[standby.standby]
        mode = "thaw" if standby is not None else "restore" if known is not None else "cold"
        info = InstanceInfo(
            instance=standby.standby if standby is not None else f"{command.function.name}-{command.id}",
            function=command.function.name,
            function_digest=command.function.digest,
            address="127.0.0.1:1",
            start_mode=mode,
            started_ns=time.time_ns(),
            command_id=command.id,
        )
        self.instances[info.instance] = info
        ended_ns = time.time_ns()
        record = StartRecord(
            command_id=command.id,
            function=info.function,
            node=self.name,
            instance=info.instance,
            checkpoint=known.checkpoint if known else "",
            start_mode=mode,
            traceparent=command.traceparent,
            started_ns=received_ns,
            ended_ns=ended_ns,
            phases=[Phase("agent.queue", received_ns, received_ns + 10), Phase("ready", received_ns + 10, ended_ns)],
            bytes_by_tier={"memory": 5},
            criu={"restore_time": 7},
        )
        return StartDone(command_id=command.id, instance=info, record=record)

    def exit(self, instance: str) -> None:
        """Let an instance end by itself."""
        info = self.instances.pop(instance)
        self._report(InstanceExited(instance=instance, function=info.function, reason="exited", exit_code=1))

    def _report(self, message: Message) -> None:
        for connection in list(self._connections):
            try:
                connection.send(message)
            except ConnectionError:
                self._connections.discard(connection)
        self._changed.set()
