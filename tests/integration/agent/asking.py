"""Asks an instance many checked requests at once, over connections that are kept and over new ones."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from loadgen import resp
from loadgen.checks import Target
from loadgen.errors import AttemptFailed

ASKERS = 8
_ANSWER_S = 30.0


@dataclass
class Tally:
    """What came of many requests."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    #: Requests over a connection that had served one before.
    on_kept: int = 0


async def ask_many(target: Target, address: str, count: int, seed: int) -> Tally:
    """Send ``count`` requests for scattered rows from :data:`ASKERS` coroutines; every other one of these keeps its connection."""
    rows = iter([random.Random(seed).randrange(1_000_000) for _ in range(count)])
    tally = Tally()
    async with asyncio.TaskGroup() as group:
        for number in range(ASKERS):
            group.create_task(_ask(target, address, rows, tally, keeping=number % 2 == 0))
    return tally


async def _ask(target: Target, address: str, rows: object, tally: Tally, *, keeping: bool) -> None:
    kept = _Kept(target, address, tally)
    for row in rows:
        try:
            async with asyncio.timeout(_ANSWER_S):
                status, body = await (kept.ask(row) if keeping else target.ask(address, target.path(row), ""))
        except (AttemptFailed, OSError, EOFError) as error:
            tally.failed.append(f"row {row}: {error!r}")
            kept.close()
            continue
        verdict = target.inspect(body, row)
        if status != 200 or verdict.problem:
            tally.wrong.append(f"row {row}: {status} {verdict.problem} {body[:300]!r}")
        else:
            tally.right += 1
            tally.tokens.add(verdict.token)
    kept.close()


class _Kept:
    """One connection that serves requests until its server closes it."""

    def __init__(self, target: Target, address: str, tally: Tally) -> None:
        self._target, self._address, self._tally = target, address, tally
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, row: int) -> tuple[int, bytes]:
        if self._streams is None:
            host, _, port = self._address.partition(":")
            self._streams = await asyncio.open_connection(host, int(port))
        else:
            self._tally.on_kept += 1
        reader, writer = self._streams
        path = self._target.path(row)
        if self._target.ask is resp.get:
            writer.write(resp.command("MGET", "token", path))
            return 200, await resp.read_reply(reader)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._address}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
        body = await reader.readexactly(int(fields["content-length"]))
        if fields.get("connection") == "close":
            self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
