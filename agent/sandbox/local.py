"""A sandbox that the agent makes itself: pid, mount, network, IPC and UTS namespaces with a PID 1 that takes orders.

In: orders of :mod:`agent.restore`, :mod:`agent.cold` and :mod:`agent.checkpoint`. Out: processes inside, their ends through
:attr:`LocalSandbox.on_exit`, and nothing at all after :meth:`LocalSandbox.destroy`. The other side of the socket is ``init.c``. A sandbox
outlives the agent: its folder holds the socket and a record by which the next agent finds it. Made by :mod:`agent.sandbox.factory`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.api.function import Function
from agent.errors import SandboxError
from agent.sandbox import confinement, mounts, rootfs
from agent.sandbox.cgroup import Cgroup
from agent.sandbox.control import Control
from agent.sandbox.network import Link, Network, hardware_address
from agent.sandbox.output import OutputPipe, open_output
from agent.sandbox.protocol import Process, Started, Worker
from agent.sandbox.rootfs import RootLayers
from agent.store import archive

#: Open files that an instance may have.
OPEN_FILES_MAX = 65536
#: Length of a file that it writes, its output too; more if it may have more memory. Output is cut every :attr:`AgentSettings.reconcile_s`.
FILE_BYTES_MAX = 1 << 30
#: Mounts that one message to PID 1 carries (messages.h: FDS_MAX).
_MOUNTS_MAX = 30
#: Parts of the writable layer that travel with a checkpoint, made anew for each instance, and where the root is not the layer's.
_PARTS, _OWN, _CLOSED = ("upper", "tmp", "shm", "run"), frozenset({"run/thaw"}), frozenset({"proc", "dev", "tmp", "run"})


class LocalSandbox:
    """A live sandbox; see :class:`agent.sandbox.protocol.Sandbox`."""

    def __init__(self, folder: Path, init_pid: int, connection: socket.socket, cgroup: Cgroup, network: Network, user: int) -> None:
        """Take over a sandbox.

        Args:
            folder: the sandbox's own.
            init_pid: host pid of its PID 1.
            connection: to its PID 1.
            cgroup, network: what it has limits and its address from.
            user: whom the function runs as.
        """
        self.id = folder.name
        self.folder = folder
        self.init_pid = init_pid
        self.link: Link | None = None
        self.output: Path | None = None
        self.worker: Worker | None = None
        #: Directory descriptor of the writable layer: ``upper``, ``tmp``, ``shm``, ``run``.
        self.layer_fd = -1
        self._file_bytes_max = FILE_BYTES_MAX
        self._cgroup = cgroup
        self._network = network
        self._user = user
        self._control = Control(self.id, init_pid, connection)
        self._control.gone.add_done_callback(self._close_layer)

    @property
    def address(self) -> str:
        """The sandbox's IPv4 address."""
        return self.link.address if self.link else "127.0.0.1"

    @property
    def gone(self) -> asyncio.Future[None]:
        """Completed when PID 1 is gone, whatever the reason."""
        return self._control.gone

    @property
    def on_exit(self) -> Callable[[int, int], None]:
        """Called with the pid (inside) and wait status of each process that nobody waits for."""
        return self._control.on_exit

    @on_exit.setter
    def on_exit(self, call: Callable[[int, int], None]) -> None:
        self._control.on_exit = call

    @property
    def layer(self) -> Path:
        """The writable layer, reachable only through this process."""
        return Path(f"/proc/self/fd/{self.layer_fd}")

    def name(self, proposed: str) -> str:
        """As proposed."""
        return proposed

    async def set_up(self, root: str, logs: Path) -> None:
        """Mount the directory ``root`` of the node as root, read-only under the writable layer, and name an output file."""
        if any(char in root for char in ":,\\"):
            raise SandboxError(f"the path {root!r} holds a character that overlay mounts cannot take", stage="rootfs")
        (self.layer / "run" / "thaw").mkdir(mode=0o755)
        await self._control.order(b"M", [root], expect=b"k")
        # Under a name of its own: the instance's is given when there is time, because renaming takes the disk 0.4 ms.
        self.output = logs / f".{self.id}"

    async def furnish(self, function: Function, layers: RootLayers, hostname: str) -> None:
        """Set limits and name, and put the function's files over the root, read-only."""
        limits, binds = function.spec.limits, layers.binds
        self._cgroup.limit(limits.memory_mb << 20, limits.pids + 1)
        self._file_bytes_max = max(FILE_BYTES_MAX, limits.memory_mb << 20)  # files inside are memory
        for at in range(0, len(binds) or 1, _MOUNTS_MAX):
            some = binds[at : at + _MOUNTS_MAX]
            fds: list[int] = []
            try:
                fds.extend(mounts.detached(source) for source, _ in some)
                await self._control.order(b"B", [hostname, *(target for _, target in some)], fds, expect=b"k")
            except OSError as error:
                raise SandboxError(f"cannot bind {error.filename}: {error.strerror}", sandbox=self.id) from error
            finally:
                for fd in fds:
                    os.close(fd)

    def write_identity(self, content: bytes) -> None:
        """Put ``/run/thaw/instance.json``; the folder belongs to the agent."""
        folder = os.open("run/thaw", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.layer_fd)
        try:
            rootfs.put_identity(folder, content, self._user)
        finally:
            os.close(folder)

    def open_outputs(self) -> list[int]:
        """One descriptor, of the output file."""
        return [open_output(self.output)] if self.output is not None else []

    async def start_application(self, process: Process, log: Path, *, donor: bool) -> Started:
        """Start the function's command as an unprivileged session leader; a donor writes to a pipe."""
        user = str(self._user)
        variables = [f"{name}={value}" for name, value in process.environment.items()]
        header = [user, user, str(OPEN_FILES_MAX), str(self._file_bytes_max), process.working_directory, str(len(variables))]
        pipe = OutputPipe(log) if donor else None
        output = pipe.write_fd if pipe else open_output(log)
        try:
            reply, _ = await self._control.order(b"A", [*header, *variables, *process.command], [output], expect=b"P")
        finally:
            os.close(output)
        return Started(int(reply.split()[1]), (pipe.name,) if pipe else ())

    async def run_tool(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int], timeout_s: float) -> int:
        """Run a tool by descriptor inside, wait for it and return its wait status; ``fds`` are its 100, 101, …"""
        reply, _ = await self._control.order(b"X", arguments, [executable_fd, *fds], expect=b"P")
        return await self._control.wait(int(reply.split()[1]), timeout_s)

    async def start_worker(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int]) -> None:
        """Start a tool that serves requests on its descriptor 3, and keep it as :attr:`worker`; ``fds`` are its 100, 101, …"""
        reply, received = await self._control.order(b"W", arguments, [executable_fd, *fds], expect=b"S")
        worker = socket.socket(fileno=received[0])
        worker.setblocking(False)
        self.worker = Worker(worker, int(reply.split()[1]))

    def foreign(self, path: str) -> bool:
        """No: all files are the root's, the function's or the instance's."""
        return False

    def pack_files(self, layers: RootLayers) -> bytes:
        """The writable layer."""
        return archive.pack_layer({part: self.layer / part for part in _PARTS}, layers.targets, _OWN)

    def unpack_files(self, layer: Path) -> None:
        """Write a layer; what is of the root through the mounted root, because the kernel leaves changes under an overlay undefined."""

        def base(part: str) -> int:
            if part == "upper":
                return os.open(f"/proc/{self.init_pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.layer_fd)

        archive.unpack_layer(layer, _PARTS, base, _CLOSED)

    def confine(self) -> None:
        """Look at what was restored: CRIU gives each thread the credentials that are in the image.

        Raises:
            SandboxError: it has any privilege, or is not in the sandbox's namespaces.
        """
        worker = self.worker.pid if self.worker else 0  # which may not have ended yet
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if confinement.pid_inside(pid) == worker:
                    continue
                more = confinement.privileges(pid, self.init_pid, self._user)
                if more:
                    raise SandboxError(f"a restored process has more than a function may: {', '.join(more)}", sandbox=self.id)

    def complete(self, pid: int) -> None:
        """Nothing: PID 1 waits on, for the agent to end it."""

    def rest(self) -> None:
        """Nothing: the agent's reports say so."""

    def retire(self) -> None:
        """Nothing: the agent's reports say so."""

    async def unrouted(self, timeout_s: float) -> None:
        """Nothing: who gets the agent's reports acts on them at once."""

    def lift_memory_limit(self) -> None:
        """CRIU's output is charged here, and may not be reclaimable (tmpfs, a slow disk)."""
        self._cgroup.lift_memory_limit()

    def was_oom_killed(self) -> bool:
        """Whether the kernel killed a process here because of the memory limit."""
        return self._cgroup.was_oom_killed()

    async def configure_network(self, link: Link, gateway: str) -> None:
        """Bring up ``lo``, and ``eth0`` with the address of ``link``; ``gateway`` is the node's."""
        await self._control.order(b"N", [link.address, link.netmask, gateway, hardware_address(gateway)], expect=b"k")

    async def ready(self) -> None:
        """Wait until PID 1 has made its layer."""
        _, fds = await self._control.reply(b"R")
        self.layer_fd = fds[0]

    def ended(self, pid: int) -> int | None:
        """Wait status of a process inside that has ended and that nobody waited for."""
        return self._control.ended(pid)

    def processes(self) -> list[int]:
        """Host pids of everything inside but PID 1."""
        return [pid for pid in self._cgroup.processes() if pid != self.init_pid]

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process inside but PID 1."""
        self._control.send(b"S", [str(int(number))])

    def signal_handler(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to process ``pid`` (inside) if it has a handler for it: without one the signal would end it."""
        self._control.send(b"H", [str(pid), str(int(number))])

    async def destroy(self) -> None:
        """End everything inside and remove every trace. Safe to call twice."""
        if self.worker is not None:
            self.worker.close()
        await self._control.kill()
        link, self.link = self.link, None
        if link:
            await self._network.detach(link)
        await asyncio.to_thread(self._remove)

    def _remove(self) -> None:
        self._cgroup.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.output is not None:
            self.output.unlink(missing_ok=True)

    def _close_layer(self, _: object) -> None:
        if self.layer_fd >= 0:
            os.close(self.layer_fd)
            self.layer_fd = -1
