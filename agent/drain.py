"""Waits until no request is in progress on an instance, by what the kernel knows of its connections.

In: an instance whose watchers have been told that it goes. Out: nothing; the wait is over when it is idle, gone, out of time, or told to
hurry. Next: :mod:`agent.node` ends it.

The kernel tells when data last came and went, in clock ticks. Data after which nothing was sent is a request without its answer. When both
were in one tick (a client that asks again at once, or an answer within a tick), the delayed acknowledgement of what came tells: if the peer
confirmed something later, that was the answer; if the kernel had to send a bare one, there was no answer, and it notes that.

Known limits: a request in two or more segments, sent in the tick of the answer before, looks answered; one-sided messages (a WebSocket's
last word, HTTP/2 window updates) look like requests, and an answer that pauses for longer than :data:`RECENT_MS` like a finished one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent.instance import Instance
from infra import sockdiag
from infra.sockdiag import TcpConnection

logger = logging.getLogger(__name__)
#: A connection on which data was sent so lately may go on with it, ms. Longer than any acknowledgement is delayed (200 ms).
RECENT_MS = 250
#: Pause between two looks, s; doubles up to the second value.
_PAUSE_S = (0.01, 0.1)
_CLOSED_BY_US = (sockdiag.FIN_WAIT1, sockdiag.LAST_ACK, sockdiag.CLOSING)
_CLOSED_BY_PEER = (sockdiag.CLOSE_WAIT, sockdiag.LAST_ACK, sockdiag.CLOSING)


class Drainer:
    """Waits for the last requests of instances; one per agent."""

    def __init__(self) -> None:
        # A thread of its own: it enters other network namespaces, which no thread that does other work may.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sockdiag")

    def close(self) -> None:
        """End the thread; nothing drains any more."""
        self._thread.shutdown(wait=False)

    async def drain(self, instance: Instance, timeout_s: float) -> bool:
        """Wait until the instance is idle, at most ``timeout_s``, and no longer than it lives and has time (:attr:`Instance.hurry`).

        Returns:
            Whether there was nothing to wait for.
        """
        loop = asyncio.get_running_loop()
        end, pause = loop.time() + timeout_s, _PAUSE_S[0]
        waited = False
        hurry = loop.create_task(instance.hurry.wait())
        try:
            while not (instance.ended.done() or instance.sandbox.gone.done()):
                if not await loop.run_in_executor(self._thread, is_busy, instance.sandbox.init_pid, instance.function.spec.port):
                    break
                waited = True
                left_s = end - loop.time()
                if left_s <= 0 or hurry.done():
                    logger.warning("instance %s is ended with requests in progress", instance.id)
                    break
                await asyncio.wait((hurry, instance.ended), timeout=min(pause, left_s), return_when=asyncio.FIRST_COMPLETED)
                pause = min(2 * pause, _PAUSE_S[1])
        except OSError as error:
            if not instance.sandbox.gone.done():
                logger.warning("instance %s is ended without waiting for its requests: cannot %s", instance.id, error)
        finally:
            hurry.cancel()
        return not waited


def is_busy(pid: int, port: int) -> bool:
    """Whether a request is in progress on a port, in the network namespace of a process. Blocking; for a thread that does nothing else.

    Raises:
        OSError: the process is gone, or the kernel cannot be asked.
    """
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with sockdiag.open_in(namespace) as client:
            connections = sockdiag.tcp_connections(client, port)
    finally:
        os.close(namespace)

    def prompt() -> set[int]:
        tables = (Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6"))
        return {inode for table in tables if table.exists() for inode in sockdiag.prompt_answerers(table.read_text())}

    return any(in_use(connection, prompt) for connection in connections)


def in_use(connection: TcpConnection, prompt: Callable[[], set[int]]) -> bool:
    """Whether a request, or its answer, is under way on a connection.

    Args:
        connection: of the port on which requests come.
        prompt: gives the inodes of connections that answer promptly (:func:`infra.sockdiag.prompt_answerers`); seldom needed.
    """
    if connection.unconfirmed_bytes > (connection.state in _CLOSED_BY_US):
        return True
    if connection.state in _CLOSED_BY_US:
        return False
    if connection.unread_bytes > (connection.state in _CLOSED_BY_PEER) or connection.data_sent_ms < RECENT_MS:
        return True
    if connection.data_sent_ms != connection.data_received_ms:
        return connection.data_received_ms < connection.data_sent_ms
    if connection.segments_sent == 0 or connection.segments_received == 0:
        return connection.segments_received > 0
    return connection.confirmed_ms >= connection.data_received_ms and connection.inode not in prompt()
