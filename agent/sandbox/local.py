"""One sandbox: pid, mount, network, IPC and UTS namespaces with a PID 1 that takes orders.

In: orders of :mod:`agent.restore`, :mod:`agent.cold` and :mod:`agent.checkpoint`. Out: processes inside, their ends through
:attr:`Sandbox.on_exit`, and nothing at all after :meth:`Sandbox.destroy`. The other side of the socket is ``init.c``. A sandbox outlives
the agent: its folder holds the socket and a record by which the next agent finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.errors import SandboxError
from agent.sandbox import mounts
from agent.sandbox.cgroup import Cgroup, CgroupTree
from agent.sandbox.network import Link, Network, hardware_address

logger = logging.getLogger(__name__)

#: Longest wait for an answer of PID 1; it does nothing that takes long.
ORDER_TIMEOUT_S = 10.0
#: Open files that an instance may have.
OPEN_FILES_MAX = 65536
#: Files in a sandbox's folder.
_CONTROL, _RECORD = "control", "sandbox"
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


class SandboxRecord(msgspec.Struct, frozen=True):
    """What a later agent must know of a sandbox; ``init_started`` (clock ticks since boot) tells PID 1 from a process that took its pid."""

    init_pid: int
    init_started: int
    link: Link


class Sandbox:
    """A live sandbox. Made by :class:`SandboxFactory`."""

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


class SandboxFactory:
    """Makes the sandboxes of one agent, and takes over those of an agent that is gone."""

    def __init__(self, init_path: Path, folders: Path, cgroups: CgroupTree, network: Network, orphan_s: float) -> None:
        """Prepare.

        Args:
            init_path: the compiled ``init.c``.
            folders: gets one folder per sandbox, and an empty one that is mounted over in each.
            cgroups, network: what sandboxes get limits and addresses from.
            orphan_s: sandboxes end when no agent came for so long.
        """
        self._init_path = init_path
        self._folders = folders
        self._mount_point = folders / "mount"
        self._cgroups = cgroups
        self.network = network
        self._orphan_s = max(1, round(orphan_s))
        self._serial = 0
        self._prefix = f"{time.time_ns():x}"  # ids do not meet those of an earlier agent
        self._mount_point.mkdir(parents=True, exist_ok=True)

    async def create(self) -> Sandbox:
        """A sandbox with namespaces, limits (open) and an address, but no root yet.

        Raises:
            SandboxError: the host refuses; nothing is left.
        """
        self._serial += 1
        folder = self._folders / f"{self._prefix}-{self._serial}"
        try:
            cgroup, pid = await asyncio.to_thread(self._spawn, folder)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise SandboxError(f"cannot make a sandbox: {error}", stage="sandbox") from error
        sandbox = Sandbox(folder, pid, _connect(folder), cgroup)
        try:
            await sandbox.ready()
            sandbox.link = await self.network.attach(pid)
            await sandbox.configure_network(sandbox.link, self.network.gateway)
            record = SandboxRecord(pid, process_started(pid), sandbox.link)
            (folder / _RECORD).write_bytes(msgspec.msgpack.encode(record))
        except BaseException:
            await sandbox.destroy(self.network)
            raise
        return sandbox

    def left(self) -> list[Path]:
        """Folders of sandboxes that an agent which is gone has left."""
        return [path for path in sorted(self._folders.iterdir()) if path != self._mount_point]

    async def adopt(self, folder: Path) -> Sandbox:
        """Take over a sandbox.

        Raises:
            SandboxError: it does not live any more, or not rightly.
        """
        try:
            record = msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=SandboxRecord)
            if process_started(record.init_pid) != record.init_started:
                raise SandboxError("its PID 1 has ended", sandbox=folder.name)
            sandbox = Sandbox(folder, record.init_pid, _connect(folder), self._cgroups.existing(folder.name))
        except (OSError, msgspec.MsgspecError) as error:
            raise SandboxError(f"it cannot be taken over: {error}", sandbox=folder.name) from error
        sandbox.link = record.link
        self.network.adopt(record.link)
        await sandbox.ready()
        return sandbox

    async def discard(self, folder: Path) -> None:
        """End what is left of a sandbox that is not taken over."""
        cgroup = self._cgroups.existing(folder.name)
        for pid in cgroup.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            record = msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=SandboxRecord)
            if process_started(record.init_pid) == record.init_started:
                os.kill(record.init_pid, signal.SIGKILL)
        await asyncio.to_thread(cgroup.remove)
        await asyncio.to_thread(shutil.rmtree, folder, True)

    def _spawn(self, folder: Path) -> tuple[Cgroup, int]:
        folder.mkdir(mode=0o700)
        cgroup = self._cgroups.create(folder.name)
        try:
            with _address(folder) as address, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(address)
                listener.listen(4)
                arguments = [str(self._init_path), str(listener.fileno()), str(self._mount_point), str(self._orphan_s)]
                done = subprocess.run(
                    arguments, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, capture_output=True, cwd="/", check=False
                )
            if done.returncode:
                raise SandboxError(f"cannot make a sandbox: {done.stderr.decode(errors='replace').strip()}", stage="sandbox")
            pid = int(done.stdout)
            cgroup.join(pid)
        except BaseException:
            cgroup.remove()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cgroup, pid


def process_started(pid: int) -> int:
    """When a process was started, in clock ticks since boot (field 22 of /proc/PID/stat); 0 when there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """The control socket's address by way of a descriptor: socket paths end at 107 bytes."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{_CONTROL}"
    finally:
        os.close(directory)


def _connect(folder: Path) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _address(folder) as address:
            control.connect(address)
    except BaseException:
        control.close()
        raise
    return control
