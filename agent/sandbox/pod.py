"""A sandbox that Kubernetes makes: the container of a placeholder pod, whose PID 1 is ``placeholder.c``.

In: a running pod of :mod:`agent.sandbox.placeholders`. Out: processes inside that have the pod's cgroups, namespaces, user and limits.
PID 1 is unprivileged: it starts the function's command, reaps and signals. What needs privileges (CRIU) enters from outside (``enter.c``).
Files, limits and name are the pod's; what the API server shall know goes to :class:`Gate`, which nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from agent.api.function import Function
from agent.errors import NotFreezable, SandboxError
from agent.sandbox import cgroup, confinement, podfiles, rootfs
from agent.sandbox.control import ORDER_TIMEOUT_S, Control
from agent.sandbox.protocol import Process, Started, Worker
from agent.sandbox.rootfs import RootLayers
from agent.store import archive
from infra.local.processes import Identity

logger = logging.getLogger(__name__)
#: Where PID 1 keeps the agent's end of its socket pair (placeholder.c).
_AGENT_FD = 3
#: Processes of an instance have pids from here on; lower ones stay free for CRIU where it is restored.
_FIRST_PID = 1000
#: Longest wait for killed processes to be gone.
_END_S = 5.0
_PIDFD_GETFD = 438
_IDENTITY_PART = "%2Frun%2Fthaw"
_libc = ctypes.CDLL(None, use_errno=True)


class Pod(msgspec.Struct, frozen=True):
    """What an agent must know of a placeholder pod.

    Attributes:
        digest: of the Function document that it was made for.
        container: id of its function container.
        image: what that container's image really is.
        shared: paths in it of volumes that other containers of the pod have too: what they hold is theirs as well.
        alone: whether the pod is ready as soon as an instance answers in it: no other container and no other gate has a say.
    """

    namespace: str
    name: str
    uid: str
    function: str
    digest: str
    address: str
    container: str
    image: str
    shared: tuple[str, ...] = ()
    alone: bool = False


class PodRecord(msgspec.Struct, frozen=True):
    """What a later agent must know of a placeholder pod in use."""

    pod: Pod
    init: Identity


class Gate(Protocol):
    """What other parts of the cluster are told of a pod, in the end; calls return at once."""

    def answers(self, pod: Pod) -> None:
        """An instance serves in it: Services may route there."""

    def holds(self, pod: Pod, what: str) -> None:
        """Something is in it that does not serve: ``Standby``, ``Freezing``."""

    def waits(self, pod: Pod) -> None:
        """It is empty and can be used (again)."""

    def ended(self, pod: Pod) -> None:
        """What was in it has ended or is about to: no new requests there, and nobody else will use it."""

    async def unrouted(self, pod: Pod) -> None:
        """Wait until that is so everywhere."""


class PodSandbox:
    """A live placeholder pod; see :class:`agent.sandbox.protocol.Sandbox`."""

    def __init__(self, record: PodRecord, folder: Path, enter: Path, gate: Gate) -> None:
        """Take hold of the pod's PID 1.

        Args:
            record: which pod, and its PID 1.
            folder: the sandbox's own.
            enter: the compiled ``enter.c``.
            gate: is told what becomes of it.

        Raises:
            SandboxError: PID 1 is gone or is no placeholder.
        """
        self.pod = record.pod
        self.id = record.pod.uid
        self.folder = folder
        self.init_pid = record.init.pid
        self.output: Path | None = None
        self.worker: Worker | None = None
        #: An instance has answered here, or something was left that cannot be taken away.
        self.spent = False
        self._enter = enter
        self._gate = gate
        pidfd = -1
        try:
            pidfd = os.pidfd_open(self.init_pid)
            taken = _libc.syscall(_PIDFD_GETFD, pidfd, _AGENT_FD, 0)
            if taken < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            connection = socket.socket(fileno=taken)
            self._cgroups = cgroup.directories_of(self.init_pid)
            if not record.init.alive():
                raise ProcessLookupError("it has ended")
        except OSError as error:
            raise SandboxError(f"PID 1 of pod {self.pod.namespace}/{self.pod.name} is no placeholder: {error}", sandbox=self.id) from error
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        self._group = cgroup.limited(self._cgroups)
        self._control = Control(self.id, self.init_pid, connection)
        self._before: archive.Stamps = {}

    @property
    def address(self) -> str:
        """The pod's address."""
        return self.pod.address

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

    def name(self, proposed: str) -> str:
        """The pod's: people and the scaler find the instance by it."""
        return self.pod.name

    async def greet(self) -> None:
        """Make sure that PID 1 listens to this agent; what it had to say to an earlier one is old.

        Raises:
            SandboxError: it does not.
        """
        self._control.send(b"R")
        while (await self._control.reply(b""))[0] != b"R":
            if self.gone.done():
                raise SandboxError("the container has ended", sandbox=self.id)

    async def set_up(self, root: str, logs: Path) -> None:
        """Note what is in the writable places before an instance is."""
        self._before = await asyncio.to_thread(lambda: archive.stamps(self._places().parts))

    async def furnish(self, function: Function, layers: RootLayers, hostname: str) -> None:
        """Nothing: limits, name and files are the pod's."""

    def write_identity(self, content: bytes) -> None:
        """Put ``/run/thaw/instance.json``, for the user of PID 1."""
        user = confinement.read(self.init_pid).users[0]
        folder = podfiles.open_place(self.init_pid, _IDENTITY_PART)
        try:
            rootfs.put_identity(folder, content, user)
        finally:
            os.close(folder)

    def open_outputs(self) -> list[int]:
        """Standard output and error of PID 1, which the container runtime keeps for ``kubectl logs``."""
        return [os.open(f"/proc/{self.init_pid}/fd/{number}", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK) for number in (1, 2)]

    async def start_application(self, process: Process, log: Path, *, donor: bool) -> Started:
        """Have PID 1 start the command that is in the pod's manifest, with the pod's environment and output."""
        if donor:
            self._gate.holds(self.pod, "Freezing")
        outputs = tuple(os.readlink(f"/proc/{self.init_pid}/fd/{number}") for number in (1, 2)) if donor else ()  # noqa: PTH115
        if any(not name.startswith("pipe:[") for name in outputs):
            raise NotFreezable("the function cannot be frozen: its container has a terminal (tty: true)", sandbox=self.id)
        await self._enter_pod("L", [str(_FIRST_PID - 1)], [], join=False)
        reply, _ = await self._control.order(b"A", expect=b"P")
        return Started(_number(reply), outputs)

    async def run_tool(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int], timeout_s: float) -> int:
        """Run a tool by descriptor inside, wait for it and return its wait status; ``fds`` are its 100, 101, …

        It stays in the agent's cgroups: what a dump writes is not the function's.
        """
        pid, _ = await self._enter_pod("T", arguments, [executable_fd, *fds], join=False)
        return await self._control.wait(pid, timeout_s)

    async def start_worker(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int]) -> None:
        """Start a tool that serves requests on its descriptor 3, and keep it as :attr:`worker`; ``fds`` are its 100, 101, …

        It joins the pod's cgroups now, so that what it restores is in them, and no start waits for that.
        """
        pid, worker = await self._enter_pod("W", arguments, [executable_fd, *fds], join=True)
        if worker is None:
            raise SandboxError("the worker has no socket", sandbox=self.id)
        worker.setblocking(False)
        self.worker = Worker(worker, pid)

    def foreign(self, path: str) -> bool:
        """Yes, if it is of a volume or of the kubelet (/etc/hosts, tokens): each pod has its own."""
        return self._places().foreign(path)

    def pack_files(self, layers: RootLayers) -> bytes:
        """What was written since :meth:`set_up`."""
        return archive.pack_layer(self._places().parts, before=self._before)

    def unpack_files(self, layer: Path) -> None:
        """Write it again, seen as the container sees it."""
        places = self._places()
        archive.unpack_layer(layer, places.parts, lambda part: podfiles.open_place(self.init_pid, part), places.closed)

    def confine(self) -> None:
        """Compare what was restored with PID 1, and give it the pod's rank for the kernel's OOM killer.

        Raises:
            SandboxError: it has more than the pod.
        """
        own = confinement.read(self.init_pid)
        rank = Path(f"/proc/{self.init_pid}/oom_score_adj").read_text()
        for pid in self._restored():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                more = confinement.excess(own, confinement.read(pid))
                if more:
                    raise SandboxError(f"a restored process has more than its pod: {', '.join(more)}", sandbox=self.id)
                with contextlib.suppress(PermissionError):  # to lower it takes CAP_SYS_RESOURCE
                    Path(f"/proc/{pid}/oom_score_adj").write_text(rank)

    def complete(self, pid: int) -> None:
        """From now on the container ends with the process ``pid``, and Services route to it."""
        self.spent = True
        with contextlib.suppress(SandboxError):  # it has ended meanwhile, which is reported elsewhere
            self._control.send(b"G", [str(pid)])
        self._gate.answers(self.pod)

    def rest(self) -> None:
        """What is in here waits as a standby."""
        self._gate.holds(self.pod, "Standby")

    def retire(self) -> None:
        """What is in here is about to end."""
        if self.spent:
            self._gate.ended(self.pod)

    async def unrouted(self, timeout_s: float) -> None:
        """Services go by the pod's condition, and take their time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._gate.unrouted(self.pod)

    def lift_memory_limit(self) -> None:
        """Nothing: CRIU's output is not charged here."""

    def was_oom_killed(self) -> bool:
        """Whether the kernel killed a process here because of the memory limit."""
        return self._group.was_oom_killed()

    def ended(self, pid: int) -> int | None:
        """Wait status of a process inside that has ended and that nobody waited for."""
        return self._control.ended(pid)

    def processes(self) -> list[int]:
        """Host pids of everything inside but PID 1."""
        return [pid for pid in self._group.processes() if pid != self.init_pid]

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process inside but PID 1."""
        self._control.send(b"S", [str(int(number))])

    def signal_handler(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to process ``pid`` (inside) if it has a handler for it: without one the signal would end it."""
        self._control.send(b"H", [str(pid), str(int(number))])

    async def empty(self) -> bool:
        """End what is inside, PID 1 excepted; whether the pod is then as it was before."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None
        if self.gone.done():
            return False
        try:
            self._control.send(b"G", ["0"])  # the container goes on
            if not await asyncio.to_thread(self._empty):
                return False
            await self._control.order(b"F", expect=b"k")
        except (SandboxError, OSError):
            return False
        self._control.forget()
        return True

    def close(self) -> None:
        """Let go of the pod as it is."""
        self._control.close()

    async def destroy(self) -> None:
        """End what is inside and let go of the pod, which whoever made it deletes. Safe to call twice."""
        await self.empty()
        self._gate.ended(self.pod)
        self._control.close()
        await asyncio.to_thread(shutil.rmtree, self.folder, True)

    def _places(self) -> podfiles.Places:
        return podfiles.find(self.init_pid, self.pod.shared)

    def _empty(self) -> bool:
        """Kill everything; whether nothing of it is left in processes or files."""
        deadline = time.monotonic() + _END_S
        children = Path(f"/proc/{self.init_pid}/task/{self.init_pid}/children")
        # Those that ended are PID 1's children until it has reaped and reported them.
        while (pids := self.processes()) or children.read_text().strip():
            if time.monotonic() > deadline:
                logger.error("processes of pod %s/%s do not end: %s", self.pod.namespace, self.pod.name, pids)
                return False
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        if self.spent:
            return False
        parts = self._places().parts
        return archive.wipe(parts, self._before, lambda part: podfiles.open_place(self.init_pid, part))

    def _restored(self) -> list[int]:
        """Host pids of what CRIU has restored: all but PID 1 and the worker, which may not have ended yet."""
        worker = self.worker.pid if self.worker else 0
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                inside = re.search(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
                if inside and int(inside[1]) != worker:
                    found.append(pid)
        return found

    async def _enter_pod(self, mode: str, arguments: Sequence[str], fds: Sequence[int], *, join: bool) -> tuple[int, socket.socket | None]:
        """Run ``enter`` once; the pid inside of what it started, and the socket that it made."""
        if self.gone.done():
            raise SandboxError("the container has ended", sandbox=self.id)
        groups = [os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for path in self._cgroups.values()] if join else []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.dup(self._control.pidfd)

        def run() -> tuple[bytes, list[int]]:
            numbers = [",".join(map(str, some)) for some in (groups, fds)]
            done = subprocess.run(
                [self._enter, mode, str(pidfd), str(theirs.fileno()), *numbers, *arguments],
                pass_fds=[*groups, *fds, pidfd, theirs.fileno()], stdin=subprocess.DEVNULL, capture_output=True, check=False,
            )  # fmt: skip
            theirs.close()
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip()
                raise SandboxError(f"cannot enter pod {self.pod.namespace}/{self.pod.name}: {said}", sandbox=self.id)
            if mode == "L":
                return b"P 0", []
            ours.settimeout(ORDER_TIMEOUT_S)
            message, received, _, _ = socket.recv_fds(ours, 64, 1)
            return message, list(received)

        try:
            message, received = await asyncio.to_thread(run)
        except OSError as error:
            raise SandboxError(f"cannot enter pod {self.pod.namespace}/{self.pod.name}: {error}", sandbox=self.id) from error
        finally:
            ours.close()
            theirs.close()
            for fd in (*groups, pidfd):
                os.close(fd)
        return _number(message), socket.socket(fileno=received[0]) if received else None


def init_of(container: str) -> int | None:
    """Host pid of the PID 1 of a container: found by the container's id in its cgroups' names. Blocking; some ms."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if container not in (entry / "cgroup").read_text():
                continue
            if re.search(r"^NSpid:(\s+\d+)+\s+1$", (entry / "status").read_text(), re.MULTILINE):
                return int(entry.name)
    return None


def _number(message: bytes) -> int:
    try:
        return int(message.split()[1])
    except (IndexError, ValueError) as error:
        raise SandboxError(f"an answer of a pod is not understood: {message[:80]!r}") from error
