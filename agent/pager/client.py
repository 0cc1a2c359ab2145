"""The agent's side of the pager: takes over a living one or starts one, gives orders, learns what cannot be served.

In: calls of :mod:`agent.restore` and :mod:`agent.checkpoint`. Out: orders to :mod:`agent.pager.worker`; its events as callbacks. A worker
that dies is replaced within milliseconds, and orders that it did not answer are repeated (each is idempotent). Only when its keeper ends
nobody serves any more: :attr:`PagerClient.lost` tells the node, which ends those instances and starts a new pager.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from agent.errors import PagerError
from agent.pager import outside
from agent.pager.worker import ORDER_BYTES_MAX, PROTOCOL
from infra.settings import AgentSettings, S3Settings

logger = logging.getLogger(__name__)
ORDER_TIMEOUT_S = 10.0
LISTENER_NAME = "lazy-pages.socket"
_CLOSE_TIMEOUT_S = 5.0


@dataclasses.dataclass
class Served:
    """Callbacks of one restore."""

    #: A fault cannot be served; the reason.
    stalled: Callable[[str], None]


@dataclasses.dataclass
class _Order:
    payload: bytes
    fd: int | None
    answer: asyncio.Future[dict[str, Any]]


class PagerClient:
    """One pager."""

    def __init__(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        self._pidfd = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._serial = 0
        self._orders: dict[int, _Order] = {}
        self._served: dict[str, Served] = {}
        #: Pid of the keeper, as long as it lives the pager does.
        self.pid = 0
        #: Pid of the process that serves; another one after each accident.
        self.worker_pid = 0
        #: Whether it was there before: it may serve instances.
        self.taken_over = False
        loop = asyncio.get_running_loop()
        #: Completed when the pager is gone, or has another agent.
        self.lost: asyncio.Future[None] = loop.create_future()
        loop.add_reader(control.fileno(), self._readable)

    @classmethod
    async def start(cls, s3: S3Settings, image_keys: Path, settings: AgentSettings, path: Path, log: Path) -> PagerClient:
        """Take over the pager that listens at ``path``, or start one.

        Args:
            s3: where chunks are.
            image_keys: folder of the keys that open them, absolute.
            settings: of the agent.
            path: of the pager's socket.
            log: what it has to say.

        Raises:
            PagerError: it does not come up.
        """
        client = await cls._take_over(path)
        if client is None:
            client = await cls._launch(path, log)
        try:
            await client._call(
                "configure",
                settings={
                    "s3": dataclasses.asdict(s3),
                    "image_keys": str(image_keys),
                    "parallel": settings.store_parallel,
                    "fill_after_s": settings.fill_after_s,
                    "fill_mb_per_s": settings.fill_mb_per_s,
                    "orphan_s": settings.orphan_s,
                },
            )
        except PagerError as error:
            if client.taken_over:  # it serves instances
                client.abandon()
            else:
                await client.close()
            raise PagerError(f"the pager did not come up: {error}; see {log}") from error
        return client

    @classmethod
    async def _take_over(cls, path: Path) -> PagerClient | None:
        """A living pager that speaks this protocol. One that does not is left alone: it serves its instances until they are gone."""
        control = _socket()
        try:
            with _short(path) as name:
                control.connect(name)
        except OSError:
            control.close()
            return None
        client = cls(control)
        try:
            protocol = await client._greet()
        except PagerError as error:
            logger.warning("the pager at %s does not answer, and is replaced: %s", path, error)
            client.abandon()
            return None
        if protocol != PROTOCOL:
            logger.warning("the pager at %s is of another version, and is replaced", path)
            client.abandon()
            return None
        client.taken_over = True
        return client

    @classmethod
    async def _launch(cls, path: Path, log: Path) -> PagerClient:
        listener, control = _socket(), _socket()
        try:
            _listen(listener, path)
            with _short(path) as name:
                control.connect(name)
            arguments = [*outside.command_prefix(), sys.executable, "-m", "agent.pager.process", str(listener.fileno())]
            with log.open("ab") as output:
                process = await asyncio.to_thread(
                    subprocess.Popen,
                    arguments,
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a Ctrl-C for the agent must not end the pager first
                )
        except OSError as error:
            control.close()
            raise PagerError(f"the pager cannot be started: {error}") from error
        finally:
            listener.close()
        outside.leave_pod(process.pid)
        client = cls(control)
        client._process = process
        client._follow(process.pid)
        try:
            await client._greet()
        except PagerError as error:
            await client.close()
            raise PagerError(f"the pager did not come up: {error}; see {log}") from error
        return client

    async def _greet(self) -> int:
        answer = await self._call("hello")
        self.worker_pid = answer["worker"]
        if self._pidfd < 0:
            self._follow(answer["keeper"])
        return int(answer["protocol"])

    def _follow(self, keeper_pid: int) -> None:
        """Learn when the keeper ends."""
        self.pid = keeper_pid
        try:
            self._pidfd = os.pidfd_open(keeper_pid)
        except OSError as error:
            raise PagerError(f"the pager is gone: {error}") from error
        asyncio.get_running_loop().add_reader(self._pidfd, self._end)

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

    async def serve(
        self,
        restore: str,
        image: str,
        work_directory: Path,
        served: Served,
        *,
        record: bool,
        prefetch: bool,
        opened: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Wait for CRIU on ``lazy-pages.socket`` in ``work_directory`` and serve the memory of what it restores.

        Args:
            restore, image: names of the restore and of the image.
            work_directory: CRIU's.
            served: callbacks.
            record: note what is touched.
            prefetch: put fresh memory in place that is touched early.
            opened: awaited when CRIU can connect already: makes sure that the image is open.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short(work_directory / LISTENER_NAME) as name:
                listener.bind(name)
            listener.listen(16)
            self._served[restore] = served
            if opened is not None:
                await opened()
            await self._call("serve", listener.fileno(), restore=restore, image=image, record=record, prefetch=prefetch)
        except BaseException:
            self._served.pop(restore, None)
            raise
        finally:
            listener.close()

    async def restores(self) -> list[dict[str, Any]]:
        """What is served: ``restore``, ``image``, ``finished`` (CRIU is done with it), ``stalled`` (the reason, if so)."""
        found: list[dict[str, Any]] = (await self._call("restores"))["restores"]
        return found

    def adopt(self, restore: str, served: Served) -> None:
        """Take over the callbacks of a restore that an agent before began."""
        self._served[restore] = served

    async def prefetched(self, restore: str, timeout_s: float) -> None:
        """Wait until the working set is in place in every process of a restore.

        Raises:
            PagerError: not within ``timeout_s``, or it was released.
        """
        await self._call("prefetched", timeout_s=timeout_s, restore=restore)

    async def stats(self, restore: str) -> dict[str, Any]:
        """Counters of one restore."""
        return await self._call("stats", restore=restore)

    async def touched(self, restore: str) -> list[tuple[int, int]]:
        """Of a restore that is recorded, (pid, address) of every page that was touched.

        Raises:
            PagerError: a worker died in the meantime, and what it had seen is lost.
        """
        answer = await self._call("stats", restore=restore, touched=True)
        numbers = array("Q")
        with os.fdopen(answer["fd"], "rb") as file:
            file.seek(0)
            numbers.frombytes(file.read())
        return list(zip(numbers[0::2], numbers[1::2], strict=True))

    async def release(self, restore: str) -> None:
        """Stop serving; the processes must be gone or about to go."""
        self._served.pop(restore, None)
        with contextlib.suppress(PagerError):
            await self._call("release", restore=restore)

    async def close(self) -> None:
        """End the pager; every instance it serves must be gone."""
        with contextlib.suppress(PagerError):
            await self._call("quit", timeout_s=_CLOSE_TIMEOUT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.shield(self.lost)
        if not self.lost.done() and self._pidfd >= 0:
            for pid in (self.pid, self.worker_pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.shield(self.lost)
        self._end()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    def abandon(self) -> None:
        """Leave the pager to the next agent."""
        self._end()

    async def _call(self, operation: str, fd: int | None = None, *, timeout_s: float = ORDER_TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
        if self.lost.done():
            raise PagerError("the pager is gone")
        self._serial += 1
        number = self._serial
        payload = msgpack.packb({"op": operation, "n": number, **arguments})
        order = _Order(payload, fd, asyncio.get_running_loop().create_future())
        self._orders[number] = order
        try:
            self._send(order)
            async with asyncio.timeout(timeout_s):
                result = await order.answer
        except TimeoutError as error:
            raise PagerError(f"the pager did not answer {operation} within {timeout_s:.0f} s") from error
        except OSError as error:
            raise PagerError(f"the pager takes no orders: {error}") from error
        finally:
            self._orders.pop(number, None)
        if "error" in result:
            raise PagerError(f"{operation}: {result['error']}")
        return result

    def _send(self, order: _Order) -> None:
        socket.send_fds(self._control, [order.payload], [] if order.fd is None else [order.fd])

    def _readable(self) -> None:
        while self._control.fileno() >= 0:
            try:
                payload, fds, _, _ = socket.recv_fds(self._control, ORDER_BYTES_MAX, 1)
            except BlockingIOError:
                return
            except OSError:
                payload, fds = b"", []
            if not payload:
                self._end()
                return
            message = msgpack.unpackb(payload)
            if "re" in message:
                order = self._orders.get(message["re"])
                if order is not None and not order.answer.done():
                    order.answer.set_result(message | {"fd": fds.pop()} if fds else message)
                for fd in fds:
                    os.close(fd)
            elif message["event"] == "worker":
                self._replaced(message["pid"])
            elif message["event"] == "stalled" and message["restore"] in self._served:
                self._served[message["restore"]].stalled(message["reason"])

    def _replaced(self, worker_pid: int) -> None:
        """A new worker: what the old one did not answer it may never have seen."""
        logger.warning("the pager's worker died; process %d goes on in its place", worker_pid)
        self.worker_pid = worker_pid
        for order in self._orders.values():
            try:
                self._send(order)
            except OSError as error:
                if not order.answer.done():
                    order.answer.set_exception(PagerError(f"the pager takes no orders: {error}"))

    def _end(self) -> None:
        """The pager is gone, or somebody else's."""
        loop = asyncio.get_running_loop()
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            if self._process is not None:
                self._process.poll()
        if self._control.fileno() >= 0:
            loop.remove_reader(self._control.fileno())
            self._control.close()
        for order in self._orders.values():
            if not order.answer.done():
                order.answer.set_exception(PagerError("the pager is gone"))
        if not self.lost.done():
            self.lost.set_result(None)


def _listen(listener: socket.socket, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with _short(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen(4)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of at most 107 bytes, where socket paths end, for a path in a folder that exists."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
