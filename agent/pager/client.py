"""The agent's side of the pager: starts the process, gives orders, passes userfaultfds on to the sandboxes that keep them.

In: calls of :mod:`agent.restore` and :mod:`agent.checkpoint`. Out: orders to :mod:`agent.pager.process`; its events as callbacks. A pager
that ends takes no page along (PID 1 of each sandbox holds the descriptors), but nobody serves them any more: :attr:`PagerClient.lost`
tells the node, which ends those instances and starts a new pager.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from agent.errors import PagerError
from agent.pager.process import MESSAGE_BYTES_MAX
from infra.settings import S3Settings

logger = logging.getLogger(__name__)
ORDER_TIMEOUT_S = 10.0
LISTENER_NAME = "lazy-pages.socket"


@dataclasses.dataclass
class Served:
    """Callbacks of one restore."""

    #: (key, descriptor): an address space came up; the callee owns the descriptor.
    space: Callable[[int, int], None]
    #: An address space ended.
    space_gone: Callable[[int], None]
    #: A fault cannot be served; the reason.
    stalled: Callable[[str], None]


class PagerClient:
    """One pager process."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._pidfd = os.pidfd_open(process.pid)
        self._serial = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._served: dict[str, Served] = {}
        loop = asyncio.get_running_loop()
        #: Completed when the process has ended.
        self.lost: asyncio.Future[None] = loop.create_future()
        loop.add_reader(control.fileno(), self._readable)
        loop.add_reader(self._pidfd, self._ended)

    @property
    def pid(self) -> int:
        """Of the pager process."""
        return self._process.pid

    @classmethod
    async def start(cls, s3: S3Settings, parallel: int, log: Path) -> PagerClient:
        """Start a pager process.

        Raises:
            PagerError: it does not come up.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                # SO_SNDBUFFORCE and SO_RCVBUFFORCE are 32 and 33: a recording of a large working set is one message.
                forced = 32 if option == socket.SO_SNDBUF else 33
                try:
                    sock.setsockopt(socket.SOL_SOCKET, forced, MESSAGE_BYTES_MAX)
                except PermissionError:
                    sock.setsockopt(socket.SOL_SOCKET, option, MESSAGE_BYTES_MAX)
        ours.setblocking(False)
        arguments = [sys.executable, "-m", "agent.pager.process", str(theirs.fileno())]
        with log.open("ab") as output:
            process = await asyncio.to_thread(
                subprocess.Popen,
                arguments,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C for the agent must not end the pager first
            )
        theirs.close()
        client = cls(process, ours)
        try:
            await client._call("configure", s3=dataclasses.asdict(s3), parallel=parallel)
        except PagerError as error:
            await client.close()
            raise PagerError(f"the pager did not come up: {error}; see {log}") from error
        return client

    async def open_image(self, image: str, directory: Path, *, complete: bool) -> None:
        """Make an image of the node's cache known."""
        await self._call("open", image=image, directory=str(directory), complete=complete)

    async def close_image(self, image: str) -> None:
        """Forget an image that nothing is restored from any more."""
        await self._call("close", image=image)

    async def complete_image(self, image: str, timeout_s: float) -> None:
        """Fetch every chunk that is missing.

        Raises:
            PagerError: one cannot be fetched or kept.
        """
        await self._call("complete", timeout_s=timeout_s, image=image)

    async def serve(self, restore: str, image: str, work_directory: Path, served: Served, *, record: bool, prefetch: bool) -> None:
        """Wait for CRIU on ``lazy-pages.socket`` in ``work_directory`` and serve the memory of what it restores."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            directory = os.open(work_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{directory}/{LISTENER_NAME}")  # socket paths end at 107 bytes
            finally:
                os.close(directory)
            listener.listen(16)
            self._served[restore] = served
            await self._call("serve", listener.fileno(), restore=restore, image=image, record=record, prefetch=prefetch)
        except BaseException:
            self._served.pop(restore, None)
            raise
        finally:
            listener.close()

    async def stats(self, restore: str, *, touched: bool = False) -> dict[str, Any]:
        """Counters of one restore, and with ``touched`` the (pid, address) of pages in order of first touch."""
        return await self._call("stats", restore=restore, touched=touched)

    async def restores(self) -> set[str]:
        """Names of what it serves."""
        return set()

    async def release(self, restore: str) -> None:
        """Stop serving; the processes must be gone or about to go."""
        self._served.pop(restore, None)
        with contextlib.suppress(PagerError):
            await self._call("release", restore=restore)

    async def close(self) -> None:
        """End the process; every instance it serves must be gone."""
        self._control.close() if self.lost.done() else self._shut()
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.shield(self.lost)
        if not self.lost.done():
            self._process.kill()
            await asyncio.shield(self.lost)

    def _shut(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()

    async def _call(self, operation: str, fd: int | None = None, *, timeout_s: float = ORDER_TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
        if self.lost.done():
            raise PagerError("the pager is gone")
        self._serial += 1
        number = self._serial
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            payload = msgpack.packb({"op": operation, "n": number, **arguments})
            socket.send_fds(self._control, [payload], [] if fd is None else [fd])
            async with asyncio.timeout(timeout_s):
                result = await answer
        except TimeoutError as error:
            raise PagerError(f"the pager did not answer {operation} within {timeout_s:.0f} s") from error
        except OSError as error:
            raise PagerError(f"the pager takes no orders: {error}") from error
        finally:
            self._answers.pop(number, None)
        if "error" in result:
            raise PagerError(f"{operation}: {result['error']}")
        return result

    def _readable(self) -> None:
        while True:
            try:
                payload, fds, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES_MAX, 1)
            except BlockingIOError:
                return
            except OSError:
                payload, fds = b"", []
            if not payload:
                self._shut()
                return
            message = msgpack.unpackb(payload)
            if "re" in message:
                answer = self._answers.get(message["re"])
                if answer is not None and not answer.done():
                    answer.set_result(message)
            else:
                self._event(message, list(fds))

    def _event(self, message: dict[str, Any], fds: list[int]) -> None:
        served = self._served.get(message["restore"])
        if served is None:
            for fd in fds:
                os.close(fd)
        elif message["event"] == "space":
            served.space(message["key"], fds[0])
        elif message["event"] == "space_gone":
            served.space_gone(message["key"])
        elif message["event"] == "stalled":
            served.stalled(message["reason"])

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        if self._control.fileno() >= 0:
            self._readable()
        if self._control.fileno() >= 0:
            self._shut()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PagerError("the pager is gone"))
        if not self.lost.done():
            self.lost.set_result(None)
