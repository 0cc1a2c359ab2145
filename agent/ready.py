"""Asks an instance whether it answers.

In: an address, the function's readiness rule and warm-up requests. Out: the times at which the port accepted and the first response came;
or an error when it does not come in time or the instance ends first. A small HTTP/1.1 client of its own: one request, no reuse, because
what is measured here is the first response.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.api.function import Function, WarmUp
from agent.errors import InstanceGone, NotReady

RESPONSE_BYTES_MAX = 1 << 20
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
    data = b""
    while len(data) < RESPONSE_BYTES_MAX:
        piece = await loop.sock_recv(sock, 65536)
        if not piece:
            break
        data += piece
        if _complete(data):
            break
    if not data.startswith(b"HTTP/1."):
        raise ValueError(f"{data[:40]!r}" if data else "an empty answer")
    return int(data.split(None, 2)[1])


def _complete(data: bytes) -> bool:
    """Whether a response with a Content-Length is all here; without one it ends with the connection."""
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return False
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            with contextlib.suppress(ValueError):
                return len(body) >= int(value)
    return False
