"""``thaw bench restore``: how long the agent takes to bring up each function, by start mode, one start at a time.

In: a running agent and Function documents. Out: per function and mode the percentiles of command → first response, the median of each
phase, and what was read. The modes are brought about (an evict before each remote start, policy ``off`` for cold ones) and counted by
the agent's evidence; answers are asked for and checked.
"""

from __future__ import annotations

import asyncio
import collections
import json
import statistics
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.api.connection import Connection, connect
from agent.api.function import Function, read_yaml
from agent.api.messages import CheckpointPublished, Command, Evict, MakeCheckpoint, Release, Start, StartDone
from agent.api.records import StartRecord
from infra.settings import Settings
from loadgen.checks import target_of
from loadgen.errors import LoadImpossible
from loadgen.http import get
from loadgen.installation import Say

_DEADLINE_S = 300.0
#: Pause between starts, s: the pool of sandboxes is full again, as it is on a node that is not overloaded.
_PAUSE_S = 0.3


class Bench:
    """Measures on one agent."""

    def __init__(self, connection: Connection, starts: int, cold_starts: int, say: Say) -> None:
        self._connection = connection
        self._number = {"restore": starts, "remote": starts, "cold": cold_starts}
        self._say = say
        self.wrong = 0

    async def function(self, function: Function) -> dict[str, Any]:
        """All modes of one function.

        Raises:
            LoadImpossible: it cannot be checkpointed or started.
        """
        off = msgspec.structs.replace(function.spec.policy, checkpoint="off")
        cold = msgspec.structs.replace(function, spec=msgspec.structs.replace(function.spec, policy=off))
        records = {"cold": [await self._start(cold, row) for row in range(self._number["cold"])]}
        published = await self._call(MakeCheckpoint, function=function)
        if not isinstance(published, CheckpointPublished):
            raise LoadImpossible(f"no checkpoint of {function.name}: {published.message}")
        records["restore"] = [await self._start(function, row) for row in range(self._number["restore"])]
        records["remote"] = []
        for row in range(self._number["remote"]):
            await self._evict(function)
            records["remote"].append(await self._start(function, row))
        found: dict[str, Any] = {mode: summary(items, mode) for mode, items in records.items()}
        found["image_bytes"] = published.checkpoint.image_bytes
        found["working_set_bytes"] = int(statistics.median(item.pages_prefetched * 4096 for item in records["restore"]))
        found["remote_bytes_before_response"] = int(statistics.median(item.bytes_by_tier.get("s3", 0) for item in records["remote"]))
        self._say(f"{function.name}: " + ", ".join(f"{mode} p50 {found[mode]['p50_ms']:.1f} ms" for mode in records))
        return found

    async def _start(self, function: Function, row: int) -> StartRecord:
        report = await self._call(Start, function=function)
        if not isinstance(report, StartDone):
            raise LoadImpossible(f"{function.name} did not start: {report.message}")
        target = target_of(function)
        status, body = await get(report.instance.address, target.path(row))
        self.wrong += status != 200 or bool(target.inspect(body, row).problem)
        await self._call(Release, instance=report.instance.instance)
        await asyncio.sleep(_PAUSE_S)
        return report.record

    async def _evict(self, function: Function) -> None:
        """Empty the node's cache; a download of the start before may still use the image."""
        give_up = time.monotonic() + 60
        while hasattr(await self._call(Evict, function_name=function.name), "message"):
            if time.monotonic() > give_up:
                raise LoadImpossible(f"the image of {function.name} stays in use")
            await asyncio.sleep(0.1)

    async def _call(self, kind: type[Command], **fields: Any) -> Any:
        command = kind(id=uuid.uuid4().hex, deadline_ns=time.time_ns() + int(_DEADLINE_S * 1e9), **fields)
        self._connection.send(command)
        while (message := await self._connection.receive()) is not None:
            if getattr(message, "command_id", "") == command.id:
                return message
        raise LoadImpossible("the agent hung up")


def summary(records: Sequence[StartRecord], mode: str) -> dict[str, Any]:
    """Percentiles of command → first response of the starts that were of ``mode`` by evidence, and the median ms of each phase."""
    mine = [record for record in records if record.start_mode == mode]
    totals = sorted(record.total_ns / 1e6 for record in mine)
    phases: dict[str, list[float]] = collections.defaultdict(list)
    for record in mine:
        for phase in record.phases:
            phases[phase.name].append((phase.end_ns - phase.start_ns) / 1e6)
        phases["unaccounted"].append(record.unaccounted_ns / 1e6)
    return {
        "n": len(mine),
        **{f"p{share}_ms": round(percentile(totals, share), 2) for share in (50, 90, 99)},
        "max_ms": round(totals[-1], 2) if totals else 0.0,
        "phases_ms": {name: round(statistics.median(values), 2) for name, values in phases.items()},
    }


def percentile(values: Sequence[float], share: int) -> float:
    """Nearest-rank percentile of sorted values; 0 of none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.0
    """
    return values[max(0, -(-len(values) * share // 100) - 1)] if values else 0.0


async def run(settings: Settings, documents: Sequence[Path], starts: int, cold_starts: int, say: Say) -> dict[str, Any]:
    """Measure every document's function on this machine's agent, one after the other.

    Returns:
        ``{"functions": {NAME: {"cold": S, "restore": S, "remote": S, …}}, "wrong": N}``.
    """
    where = json.loads(settings.agent_file.read_text())
    connection, _ = await connect(where["host"], where["port"], "bench", "scaler")
    try:
        bench = Bench(connection, starts, cold_starts, say)
        functions = {}
        for document in documents:
            (function,) = read_yaml(document.read_text(), str(document), document.parent)
            functions[function.name] = await bench.function(function)
        return {"functions": functions, "wrong": bench.wrong}
    finally:
        await connection.close()
