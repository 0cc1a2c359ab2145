"""Streams: a peer that has lost its power is noticed."""

from __future__ import annotations

import asyncio
import socket

from agent.api.connection import SILENCE_S, Connection


async def test_both_ends_notice_a_peer_that_says_nothing_any_more() -> None:
    accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    sockets: list[socket.socket] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sockets.append(writer.get_extra_info("socket"))
        accepted.set_result(Connection(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    sockets.append(writer.get_extra_info("socket"))
    connection = Connection(reader, writer)
    for raw in sockets if await accepted else ():
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle_s, interval_s, probes = (
            raw.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle_s + interval_s * probes == SILENCE_S
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENCE_S * 1000
    assert len(sockets) == 2
    for end in (connection, accepted.result()):
        await end.close()
    server.close()
