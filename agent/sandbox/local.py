"""One sandbox: pid, mount, network, IPC and UTS namespaces with a PID 1 that takes orders.

In: orders of :mod:`agent.restore`, :mod:`agent.cold` and :mod:`agent.checkpoint`. Out: processes inside, their ends through
:attr:`Sandbox.on_exit`, and nothing at all after :meth:`Sandbox.destroy`. The other side of the socket is ``init.c``. A sandbox outlives
the agent: its folder holds the socket and a record by which the next agent finds it. Made by :mod:`agent.sandbox.factory`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import SandboxError
from agent.sandbox import mounts
from agent.sandbox.cgroup import Cgroup
from agent.sandbox.network import Link, Network, hardware_address

#: Longest wait for an answer of PID 1; it does nothing that takes long.
ORDER_TIMEOUT_S = 10.0
#: Open files that an instance may have.
OPEN_FILES_MAX = 65536
#: Mounts that one message to PID 1 carries (init.c: FDS_MAX).
_MOUNTS_MAX = 30


@dataclass(frozen=True)
class Process:
    """How to start the application."""

    command: Sequence[str]
    environment: dict[str, str]
    working_directory: str
    user: int


@dataclass
class Worker:
    """A tool that waits inside for one request on its socket; ``pid`` is its pid inside."""

    socket: socket.socket
    pid: int

    def close(self) -> None:
        """Let it go; it exits when its socket closes."""
        self.socket.close()


class Sandbox:
    """A live sandbox."""

    def __init__(self, folder: Path, init_pid: int, control: socket.socket, cgroup: Cgroup) -> None:
        self.id = folder.name
        #: On the node, for as long as the sandbox lives; the owner of the sandbox may keep files in it.
        self.folder = folder
        #: Host pid of the sandbox's PID 1.
        self.init_pid = init_pid
        self.cgroup = cgroup
        self.link: Link | None = None
        #: Gets what is written in it; goes with the sandbox unless somebody moves it.
        self.output: Path | None = None
        #: Waits to restore something here; taken by the start.
        self.worker: Worker | None = None
        #: Directory descriptor of the writable layer: ``upper``, ``tmp``, ``shm``, ``run``.
        self.layer_fd = -1
        #: Called with the pid (inside) and wait status of each process that nobody waits for.
        self.on_exit: Callable[[int, int], None] = lambda pid, status: None
        #: Completed when PID 1 is gone, whatever the reason.
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._control = control
        self._pidfd = os.pidfd_open(init_pid)
        self._lock = asyncio.Lock()
        self._replies: asyncio.Queue[tuple[bytes, list[int]]] = asyncio.Queue()
        self._waiters: dict[int, asyncio.Future[int]] = {}
        self._ended: dict[int, int] = {}
        control.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(control.fileno(), self._readable)
        loop.add_reader(self._pidfd, self._died)

    @property
    def address(self) -> str:
        """The sandbox's IPv4 address."""
        return self.link.address if self.link else "127.0.0.1"

    @property
    def layer(self) -> Path:
        """The writable layer, reachable only through this process."""
        return Path(f"/proc/self/fd/{self.layer_fd}")

    async def mount_root(self, lower: str) -> None:
        """Mount the root: the directory ``lower`` of the node, read-only under the writable layer."""
        if any(char in lower for char in ":,\\"):
            raise SandboxError(f"the path {lower!r} holds a character that overlay mounts cannot take", stage="rootfs")
        await self._order(b"M", [lower])

    async def bind_files(self, hostname: str, binds: Sequence[tuple[str, str]]) -> None:
        """Set the sandbox's name, and put files or directories of the node over its root, read-only.

        Args:
            hostname: its name.
            binds: (path on the node, path in the root).
        """
        for at in range(0, len(binds) or 1, _MOUNTS_MAX):
            some = binds[at : at + _MOUNTS_MAX]
            fds: list[int] = []
            try:
                fds.extend(mounts.detached(source) for source, _ in some)
                await self._order(b"B", [hostname, *(target for _, target in some)], fds)
            except OSError as error:
                raise SandboxError(f"cannot bind {error.filename}: {error.strerror}", sandbox=self.id) from error
            finally:
                for fd in fds:
                    os.close(fd)

    async def start_application(self, process: Process, output_fd: int) -> int:
        """Start the function's command as an unprivileged session leader; returns its pid inside.

        Args:
            process: what to run.
            output_fd: becomes its standard output and error.
        """
        user = str(process.user)
        variables = [f"{name}={value}" for name, value in process.environment.items()]
        header = [user, user, str(OPEN_FILES_MAX), process.working_directory, str(len(variables))]
        reply, _ = await self._order(b"A", [*header, *variables, *process.command], [output_fd])
        return int(reply.split()[1])

    async def run_tool(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int], timeout_s: float) -> int:
        """Run a tool by descriptor inside, wait for it and return its wait status; ``fds`` are its 100, 101, …"""
        reply, _ = await self._order(b"X", arguments, [executable_fd, *fds])
        return await self.wait(int(reply.split()[1]), timeout_s)

    async def start_worker(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int]) -> None:
        """Start a tool that serves requests on its descriptor 3, and keep it as :attr:`worker`; ``fds`` are its 100, 101, …"""
        async with self._lock:
            self._send(b"W", arguments, [executable_fd, *fds])
            reply, received = await self._reply(b"S")
        worker = socket.socket(fileno=received[0])
        worker.setblocking(False)
        self.worker = Worker(worker, int(reply.split()[1]))

    def open_root(self) -> int:
        """A descriptor of the mounted root, for changes from outside; the caller closes it."""
        return os.open(f"/proc/{self.init_pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    async def wait(self, pid: int, timeout_s: float) -> int:
        """Wait for a process inside; returns its wait status.

        Raises:
            SandboxError: it does not end in time (it is left to :meth:`destroy`), or the sandbox is gone.
        """
        if pid in self._ended:
            return self._ended.pop(pid)
        waiter = self._waiters.setdefault(pid, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError as error:
            raise SandboxError(f"process {pid} did not end within {timeout_s:.0f} s", sandbox=self.id) from error
        finally:
            self._waiters.pop(pid, None)

    async def configure_network(self, link: Link, gateway: str) -> None:
        """Bring up ``lo``, and ``eth0`` with the address of ``link``; ``gateway`` is the node's."""
        await self._order(b"N", [link.address, link.netmask, gateway, hardware_address(gateway)])

    async def ready(self) -> None:
        """Wait until PID 1 has made its layer."""
        _, fds = await self._reply(b"R")
        self.layer_fd = fds[0]

    def ended(self, pid: int) -> int | None:
        """Wait status of a process inside that has ended and that nobody waited for."""
        return self._ended.get(pid)

    def processes(self) -> list[int]:
        """Host pids of everything inside but PID 1."""
        return [pid for pid in self.cgroup.processes() if pid != self.init_pid]

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process inside but PID 1."""
        self._send(b"S", [str(int(number))], [])

    def signal_handler(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to process ``pid`` (inside) if it has a handler for it: without one the signal would end it."""
        self._send(b"H", [str(pid), str(int(number))], [])

    async def destroy(self, network: Network) -> None:
        """End everything inside and remove every trace. Safe to call twice."""
        if self.worker is not None:
            self.worker.close()
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(self.gone)
        link, self.link = self.link, None
        if link:
            await network.detach(link)
        await asyncio.to_thread(self._remove)

    def _remove(self) -> None:
        self.cgroup.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.output is not None:
            self.output.unlink(missing_ok=True)

    async def _order(self, letter: bytes, arguments: Sequence[str], fds: Sequence[int] = ()) -> tuple[bytes, list[int]]:
        async with self._lock:
            self._send(letter, arguments, fds)
            return await self._reply(b"P" if letter in b"AX" else b"k")

    def _send(self, letter: bytes, arguments: Sequence[str], fds: Sequence[int]) -> None:
        payload = letter + b"".join(part.encode() + b"\0" for part in arguments)
        try:
            socket.send_fds(self._control, [payload], list(fds))
        except OSError as error:
            raise SandboxError(f"PID 1 takes no orders: {error}", sandbox=self.id) from error

    async def _reply(self, expected: bytes) -> tuple[bytes, list[int]]:
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_S):
                message, fds = await self._replies.get()
        except TimeoutError as error:
            raise SandboxError("PID 1 does not answer", sandbox=self.id) from error
        if not message.startswith(expected):
            for fd in fds:
                os.close(fd)
            reason = message[2:].decode(errors="replace") if message.startswith(b"e") else f"answered {message!r}"
            raise SandboxError(f"PID 1: {reason}", sandbox=self.id)
        return message, fds

    def _readable(self) -> None:
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._control, 1024, 4)
            except BlockingIOError:
                return
            except OSError:
                message, fds = b"", []
            if not message:
                asyncio.get_running_loop().remove_reader(self._control.fileno())
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
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        loop.remove_reader(self._control.fileno())
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        self._control.close()
        if self.layer_fd >= 0:
            os.close(self.layer_fd)
            self.layer_fd = -1
        while not self._replies.empty():
            for fd in self._replies.get_nowait()[1]:
                os.close(fd)
        self._replies.put_nowait((b"e sandbox is gone", []))
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(SandboxError("the sandbox is gone", sandbox=self.id))
        if not self.gone.done():
            self.gone.set_result(None)
