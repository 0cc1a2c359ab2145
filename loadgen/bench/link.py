"""The bench's own connection to an agent: many commands at once, each with its answer.

In: commands of :mod:`agent.api.messages`. Out: their reports; instances that ended although nobody asked are kept in
:attr:`AgentLink.crashes`. Used by the parts of :mod:`loadgen.bench`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from agent.api.connection import Connection, connect
from agent.api.messages import Command, InstanceExited, Inventory
from agent.errors import ProtocolError
from infra import tls
from infra.settings import Settings
from infra.tasks import TaskGroup
from loadgen.errors import LoadImpossible

#: Longest wait for the answer to a command, s: a cold start on a busy machine, or a checkpoint of 512 MB.
DEADLINE_S = 300.0
#: The agent answers a command that fails by its deadline a moment after it.
_GRACE_S = 5.0
#: No partition: the epochs of the scalers' shards are none of the bench's business.
_SHARD = -1


class AgentLink:
    """One stream to an agent, as a scaler has it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._ended = False
        #: What ended by itself, for people.
        self.crashes: list[str] = []

    async def call(self, kind: type[Command], *, deadline_s: float = DEADLINE_S, **fields: Any) -> Any:
        """Send one command and wait for its report.

        Raises:
            LoadImpossible: the agent hung up or says nothing.
        """
        answer = self.send(kind, deadline_s=deadline_s, **fields)
        try:
            async with asyncio.timeout(deadline_s + _GRACE_S):
                return await answer
        except TimeoutError as error:
            raise LoadImpossible(
                f"the agent did not answer {kind.__name__} within {deadline_s:.0f} s; does it know this command?"
            ) from error

    def send(self, kind: type[Command], *, deadline_s: float = DEADLINE_S, **fields: Any) -> asyncio.Future[Any]:
        """Send one command; the future gets its report. Each is the root of a trace, as a demand record is."""
        command = kind(
            id=uuid.uuid4().hex,
            deadline_ns=time.time_ns() + int(deadline_s * 1e9),
            traceparent=f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            shard=_SHARD,
            **fields,
        )
        answer = self._waiting[command.id] = asyncio.get_running_loop().create_future()
        try:
            self._connection.send(command)
        except ConnectionError as error:
            raise LoadImpossible(f"the agent hung up: {error}") from error
        if self._ended:
            answer.set_exception(LoadImpossible("the agent hung up"))
        return answer

    async def listen(self) -> None:
        """Hand reports to those who wait for them, until the stream ends."""
        while (message := await self._connection.receive()) is not None:
            answer = self._waiting.pop(getattr(message, "command_id", ""), None)
            if answer is not None and not answer.done():
                answer.set_result(message)
            elif isinstance(message, InstanceExited) and message.reason != "released":
                self.crashes.append(f"{message.function}: {message.instance} ended by itself: {message.reason}, code {message.exit_code}")
        self._ended = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(LoadImpossible("the agent hung up"))


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[AgentLink]:
    """A link to the agent of this machine for as long as the body runs."""
    connection = await _connect(settings)
    tasks = TaskGroup("bench")
    link = AgentLink(connection)
    tasks.spawn(link.listen(), "reports")
    try:
        yield link
    finally:
        await connection.close()
        await tasks.close()


async def inventory(settings: Settings) -> Inventory:
    """Everything that is on the agent's node now.

    Raises:
        LoadImpossible: the agent does not say.
    """
    connection = await _connect(settings)
    try:
        async with asyncio.timeout(_GRACE_S):
            while (message := await connection.receive()) is not None:
                if isinstance(message, Inventory):
                    return message
    finally:
        await connection.close()
    raise LoadImpossible("the agent hung up before it sent its inventory")


async def _connect(settings: Settings) -> Connection:
    try:
        where = json.loads(settings.agent_file.read_text())
        credentials = await asyncio.to_thread(tls.credentials, settings, "scaler")
        connection, _ = await connect(where["host"], where["port"], "bench", "scaler", credentials)
    except (OSError, ValueError, TimeoutError, ProtocolError) as error:
        raise LoadImpossible(f"the agent of this machine ({settings.agent_file}) cannot be reached: {error}") from error
    return connection
