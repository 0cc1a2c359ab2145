"""The agent's side of PID 1's socket: orders and answers, and the ends of processes that PID 1 reports.

In: a connected socket, PID 1's host pid. Out: answers; ends through :attr:`Control.on_exit`; :attr:`Control.gone` when PID 1 is gone. The
other side is ``init.c`` or ``placeholder.c``, which say what the orders are. Used by the sandboxes of both kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence

from agent.errors import SandboxError

#: Longest wait for an answer of PID 1; it does nothing that takes long.
ORDER_TIMEOUT_S = 10.0


class Control:
    """A connection to the PID 1 of a sandbox."""

    def __init__(self, sandbox: str, init_pid: int, connection: socket.socket) -> None:
        """Take over the connection.

        Args:
            sandbox: its id, for messages.
            init_pid: host pid of PID 1.
            connection: SOCK_SEQPACKET.
        """
        self._sandbox = sandbox
        self.on_exit: Callable[[int, int], None] = lambda pid, status: None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self.pidfd = os.pidfd_open(init_pid)
        self._lock = asyncio.Lock()
        self._replies: asyncio.Queue[tuple[bytes, list[int]]] = asyncio.Queue()
        self._waiters: dict[int, asyncio.Future[int]] = {}
        self._ended: dict[int, int] = {}
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(connection.fileno(), self._readable)
        loop.add_reader(self.pidfd, self._died)

    async def order(
        self, letter: bytes, arguments: Sequence[str] = (), fds: Sequence[int] = (), *, expect: bytes
    ) -> tuple[bytes, list[int]]:
        """Give an order and wait for its answer, which begins with ``expect``.

        Raises:
            SandboxError: PID 1 refuses, says something else, does not answer, or is gone.
        """
        async with self._lock:
            self.send(letter, arguments, fds)
            return await self.reply(expect)

    def send(self, letter: bytes, arguments: Sequence[str] = (), fds: Sequence[int] = ()) -> None:
        """Give an order that has no answer.

        Raises:
            SandboxError: PID 1 is gone.
        """
        payload = letter + b"".join(part.encode() + b"\0" for part in arguments)
        try:
            socket.send_fds(self._connection, [payload], list(fds))
        except OSError as error:
            raise SandboxError(f"PID 1 takes no orders: {error}", sandbox=self._sandbox) from error

    async def reply(self, expected: bytes) -> tuple[bytes, list[int]]:
        """The next answer; see :meth:`order`."""
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_S):
                message, fds = await self._replies.get()
        except TimeoutError as error:
            raise SandboxError("PID 1 does not answer", sandbox=self._sandbox) from error
        if not message.startswith(expected):
            for fd in fds:
                os.close(fd)
            reason = message[2:].decode(errors="replace") if message.startswith(b"e") else f"answered {message!r}"
            raise SandboxError(f"PID 1: {reason}", sandbox=self._sandbox)
        return message, fds

    async def wait(self, pid: int, timeout_s: float) -> int:
        """Wait for a process inside; returns its wait status.

        Raises:
            SandboxError: it does not end in time (it is left to the sandbox's end), or the sandbox is gone.
        """
        if pid in self._ended:
            return self._ended.pop(pid)
        waiter = self._waiters.setdefault(pid, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError as error:
            raise SandboxError(f"process {pid} did not end within {timeout_s:.0f} s", sandbox=self._sandbox) from error
        finally:
            self._waiters.pop(pid, None)

    def ended(self, pid: int) -> int | None:
        """Wait status of a process inside that has ended and that nobody waited for."""
        return self._ended.get(pid)

    def forget(self) -> None:
        """Forget all ends: pids will be used again."""
        self._ended.clear()
        self.on_exit = lambda pid, status: None

    async def kill(self) -> None:
        """End PID 1, and with it everything inside."""
        if self.gone.done():
            return
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(self.gone)

    def _readable(self) -> None:
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._connection, 1024, 4)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                asyncio.get_running_loop().remove_reader(self._connection.fileno())
                return
            if message.startswith(b"E "):
                _, pid, status = message.split()
                self._process_ended(int(pid), int(status))
            else:
                self._replies.put_nowait((message, list(fds)))

    def _process_ended(self, pid: int, status: int) -> None:
        waiter = self._waiters.pop(pid, None)
        if waiter is not None:
            if not waiter.done():
                waiter.set_result(status)
            return
        self._ended[pid] = status
        self.on_exit(pid, status)

    def _died(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        self._close()
        self._replies.put_nowait((b"e sandbox is gone", []))
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(SandboxError("the sandbox is gone", sandbox=self._sandbox))

    def close(self) -> None:
        """Let go of a PID 1 that lives on."""
        if not self.gone.done():
            self._close()

    def _close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.pidfd)
        loop.remove_reader(self._connection.fileno())
        os.close(self.pidfd)
        self._connection.close()
        while not self._replies.empty():
            for fd in self._replies.get_nowait()[1]:
                os.close(fd)
        if not self.gone.done():
            self.gone.set_result(None)
