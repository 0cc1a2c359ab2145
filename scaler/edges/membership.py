"""Ends the group membership of a scaler that was killed on this machine, so that its shards are free at once.

In: the member id that :mod:`scaler.edges.kafka` got from the broker, kept in ``state_dir/scaler``. Out: a leave request in the name of a
member whose process is gone. Without it a killed scaler's shards stay its own until its session times out (6 s by default).
"""

from __future__ import annotations

import json
import logging
import os

from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.errors import KafkaError
from aiokafka.protocol.group import LeaveGroupRequest

from infra import files, kafka
from infra.errors import KafkaUnavailable
from infra.local.processes import identity_of
from infra.settings import Settings

logger = logging.getLogger(__name__)


class Membership:
    """What the next scaler on this machine needs to know of this one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.paths.state_dir / "scaler"
        self._file = self._folder / f"member-{os.getpid()}.json"
        self._noted = ""

    def note(self, member_id: str) -> None:
        """Keep the current member id."""
        if member_id == self._noted:
            return
        self._noted = member_id
        self._folder.mkdir(parents=True, exist_ok=True)
        value = {"group": self._settings.scaler.group, "member_id": member_id, "pid": os.getpid(), "began": _began(os.getpid())}
        files.write(self._file, json.dumps(value).encode())

    def forget(self) -> None:
        """This scaler has left by itself."""
        self._file.unlink(missing_ok=True)

    async def end_predecessors(self) -> None:
        """Leave the group in the name of every scaler of this machine whose process is gone."""
        for path in self._folder.glob("member-*.json"):
            try:
                value = json.loads(path.read_text())
                pid, began, group, member_id = int(value["pid"]), str(value["began"]), str(value["group"]), str(value["member_id"])
            except (OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
                continue
            if began == _began(pid):
                continue  # it lives
            try:
                if member_id:
                    await self._leave(group, member_id)
                    logger.info("a scaler that was killed (pid %d) has left group %s", pid, group)
            except (KafkaError, KafkaUnavailable, OSError) as error:
                logger.info("the killed scaler of pid %d stays in the group until its session ends: %s", pid, error)
            path.unlink(missing_ok=True)

    async def _leave(self, group: str, member_id: str) -> None:
        settings = self._settings.kafka
        client = AIOKafkaClient(
            bootstrap_servers=settings.bootstrap_servers,
            client_id="thaw-scaler-leave",
            request_timeout_ms=settings.request_timeout_ms,
            **kafka.security(settings),
        )
        try:
            await client.bootstrap()
            coordinator = await client.coordinator_lookup(CoordinationType.GROUP, group)
            if await client.ready(coordinator, group=ConnectionGroup.COORDINATION):
                await client.send(coordinator, LeaveGroupRequest(group, member_id), group=ConnectionGroup.COORDINATION)
        finally:
            await kafka.close(client)


def _began(pid: int) -> str:
    """When a process began, in clock ticks since boot: with the pid it names a process for good. Empty when there is none."""
    identity = identity_of(pid)
    return str(identity.start_ticks) if identity else ""
