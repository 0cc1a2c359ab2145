"""A request through an address behind which there may be nobody yet: a Service's.

In: the address, a path. Out: what :func:`loadgen.http.get` gives, as soon as anybody answers. The kernel tells of refusals at a limited
rate and drops the rest in silence, and a connection that was not taken is tried again by the kernel only a second later. So another
connection is begun every :data:`PAUSE_S`, those before it are left open, and the first one that is taken carries the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
import time

from infra.telemetry import trace_id
from loadgen import http
from loadgen.errors import AttemptFailed

#: From one connection to the next, s.
PAUSE_S = 0.002
#: A connection that was not taken for so long will not be before the kernel tries again, s; after that it is closed.
_OPEN_S = 0.5


class Ways:
    """Sends requests, and keeps how each found its way.

    Attributes:
        taken_ns: trace id → when the connection that was taken had been begun, wall clock ns: the way was there then.
        waited: trace ids of requests whose first connection was not taken.
    """

    def __init__(self) -> None:
        self.taken_ns: dict[str, int] = {}
        self.waited: set[str] = set()

    async def get(self, address: str, path: str, traceparent: str) -> tuple[int, bytes]:
        """Send one GET to whoever takes a connection first; waits for one until cancelled.

        Args:
            address: ``host:port`` in digits.
            path: with the query.
            traceparent: W3C trace context to hand to the function.

        Raises:
            AttemptFailed: whoever took the connection did not answer.
        """
        host, _, port = address.rpartition(":")
        connection, began_ns, number = await _first_taken((host, int(port)))
        self.taken_ns[trace_id(traceparent)] = began_ns
        if number > 1:
            self.waited.add(trace_id(traceparent))
        with connection:
            return await http.ask(connection, address, path, traceparent)


async def _first_taken(where: tuple[str, int]) -> tuple[socket.socket, int, int]:
    """The connection, when it was begun, and how many were."""
    loop = asyncio.get_running_loop()
    winner: asyncio.Future[tuple[socket.socket, int, int]] = loop.create_future()
    #: Descriptor → connection, when it was begun, how many were then; in that order.
    waiting: dict[int, tuple[socket.socket, int, int]] = {}
    begun = itertools.count(1)

    def give_up(number: int) -> None:
        if number in waiting:
            loop.remove_writer(number)
            waiting.pop(number)[0].close()

    def writable(number: int) -> None:
        connection = waiting[number][0]
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or winner.done():
            give_up(number)
            return
        loop.remove_writer(number)
        winner.set_result(waiting.pop(number))

    def begin() -> None:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        now_ns, count = time.time_ns(), next(begun)
        reason = connection.connect_ex(where)
        if reason not in (0, errno.EINPROGRESS):
            connection.close()
            if reason not in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
                raise AttemptFailed(f"no connection to {where[0]}:{where[1]}: {errno.errorcode.get(reason, reason)}")
            return
        waiting[connection.fileno()] = connection, now_ns, count
        loop.add_writer(connection.fileno(), writable, connection.fileno())

    try:
        while not winner.done():
            begin()
            oldest = next(iter(waiting), None)
            if oldest is not None and time.time_ns() - waiting[oldest][1] > _OPEN_S * 1e9:
                give_up(oldest)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await asyncio.shield(winner)
        return winner.result()
    except asyncio.CancelledError:
        if winner.done():
            winner.result()[0].close()
        raise
    finally:
        for number in list(waiting):
            give_up(number)
