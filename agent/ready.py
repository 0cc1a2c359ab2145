"""Asks an instance whether it answers.

In: an address, the function's readiness rule and warm-up requests. Out: the times at which the port accepted and the first response came;
or an error when it does not come in time or the instance ends first. A small HTTP/1.1 client of its own: one request, no reuse, because
what is measured here is the first response.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.api.function import Function, WarmUp
from agent.errors import InstanceGone, NotReady

HEAD_BYTES_MAX, RESPONSE_BYTES_MAX = 64 << 10, 1 << 20
_STATUS, _LENGTH = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})(?![0-9])"), re.compile(rb"[0-9]{1,15}")
#: Pauses between attempts to connect, s: short at first, since a restored instance listens already.
_PAUSE_S, _PAUSE_MAX_S = 0.0005, 0.01
#: Longest wait for one answer, s.
_ATTEMPT_S = 10.0


@dataclass(frozen=True)
class Readiness:
    """When the port accepted the connection that was answered, and when its first response was complete, ns."""

    accepted_ns: int
    responded_ns: int


async def wait_ready(
    address: str, function: Function, deadline_ns: int, ended: asyncio.Future[int], go: Callable[[], None] = lambda: None
) -> Readiness:
    """Wait until the instance at ``address`` fulfils its readiness rule.

    Args:
        address: IPv4 address of the instance.
        function: port and readiness rule.
        deadline_ns: wall clock ns at which to give up.
        ended: completed with a wait status when the instance's main process ends.
        go: called once, when the first request is on its way or could not be sent. A stopped process is resumed here: the kernel has
            accepted the connection in its place by then, and the request waits for it.

    Raises:
        NotReady: the deadline passed; the message says what happened last. InstanceGone: it ended first.
    """
    path = function.spec.readiness.path
    pause, last, going = _PAUSE_S, "", False

    def go_once() -> None:
        nonlocal going
        if not going:
            going = True
            go()

    while True:
        if ended.done():
            raise InstanceGone(f"the process ended with status {ended.result()} before it answered", function=function.name)
        left_s = (deadline_ns - time.time_ns()) / 1e9
        if left_s <= 0:
            raise NotReady(f"no answer on port {function.spec.port}: {last or 'no time was left'}", function=function.name, address=address)
        limit_s = min(left_s, _ATTEMPT_S)
        try:
            async with asyncio.timeout(limit_s):
                sock = await _connect(address, function.spec.port)
                accepted_ns = time.time_ns()
                with sock:
                    if not path:
                        go_once()
                        return Readiness(accepted_ns, accepted_ns)
                    status = await _exchange(sock, address, WarmUp(path=path), go_once)
            if 200 <= status < 300:
                return Readiness(accepted_ns, time.time_ns())
            last = f"GET {path} answered {status}"
        except TimeoutError:
            if not last or limit_s == _ATTEMPT_S:  # an attempt that the deadline cut short says less than the one before
                last = f"GET {path} was not answered within {limit_s:.1f} s"
        except OSError as error:
            last = error.strerror or str(error)
        except ValueError as error:
            last = f"GET {path} answered something that is not HTTP: {error}"
        go_once()
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _PAUSE_MAX_S)


async def warm_up(address: str, function: Function, timeout_s: float, *, repeat: bool = True) -> None:
    """Send the function's warm-up requests, in order; without ``repeat`` each of them once.

    Raises:
        NotReady: one fails or answers an error.
    """
    for request in function.spec.warm_up:
        for _ in range(request.repeat if repeat else 1):
            try:
                async with asyncio.timeout(timeout_s):
                    with await _connect(address, function.spec.port) as sock:
                        status = await _exchange(sock, address, request)
            except (OSError, ValueError, TimeoutError) as error:
                text = f"warm-up {request.method} {request.path} failed: {error or 'no answer in time'}"
                raise NotReady(text, function=function.name, stage="warm-up") from error
            if status >= 400:
                text = f"warm-up {request.method} {request.path} answered {status}"
                raise NotReady(text, function=function.name, stage="warm-up")


async def _connect(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex((address, port))
        if error == errno.EINPROGRESS:
            # To a sandbox of this node the handshake is over when the call returns; a turn of the loop would cost more than it.
            if not select.select([], [sock], [], 0)[1]:
                await _writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock.fileno(), _finish, done)
    try:
        await done
    finally:
        loop.remove_writer(sock.fileno())


async def _exchange(sock: socket.socket, host: str, request: WarmUp, sent: Callable[[], None] = lambda: None) -> int:
    """Send one request and read the response to its end; returns the status."""
    loop = asyncio.get_running_loop()
    body = request.body.encode()
    head = f"{request.method} {request.path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(sock, head.encode() + body)
    sent()
    response = Response()
    while not response.complete and (piece := await loop.sock_recv(sock, 65536)):
        response.take(piece)
    return response.status


class Response:
    """An answer as it arrives, in pieces of any size. The process that sends it may be hostile: of the body nothing is kept."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._in_body = False
        self._length = -1
        self._received = 0
        #: All of it is here: as much as Content-Length says; without one it ends with the connection, or where nobody reads on.
        self.complete = False

    def take(self, piece: bytes) -> None:
        """The next bytes.

        Raises:
            ValueError: the header does not end.
        """
        self._received += len(piece)
        if not self._in_body:
            searched = max(0, len(self._head) - 3)
            self._head += piece
            end = self._head.find(b"\r\n\r\n", searched)
            if end < 0 and len(self._head) > HEAD_BYTES_MAX:
                raise ValueError(f"a header of more than {HEAD_BYTES_MAX} bytes")
            if end >= 0:
                self._in_body, self._received = True, len(self._head) - end - 4
                del self._head[end:]
                self._length = _content_length(self._head)
        if self._in_body:
            self.complete = 0 <= self._length <= self._received or self._received > RESPONSE_BYTES_MAX

    @property
    def status(self) -> int:
        """The status code.

        Raises:
            ValueError: it is not HTTP.
        """
        found = _STATUS.match(self._head)
        if found is None:
            raise ValueError(f"{bytes(self._head[:40])!r}" if self._head else "an empty answer")
        return int(found.group(1))


def _content_length(head: bytearray) -> int:
    """What a header says of its body; -1: nothing."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and _LENGTH.fullmatch(value.strip()):
            return int(value)
    return -1
