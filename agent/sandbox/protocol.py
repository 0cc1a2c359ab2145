"""What the start, restore and checkpoint sequences need of a sandbox, whatever kind it is.

In: nothing. Out: :class:`Sandbox` and :class:`Sandboxes`. There are two kinds: namespaces that the agent makes itself
(:mod:`agent.sandbox.local`) and placeholder pods that Kubernetes makes (:mod:`agent.sandbox.pod`).
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.api.function import Function
from agent.sandbox.rootfs import RootLayers


@dataclass(frozen=True)
class Process:
    """How to start the application. A pod knows all of it already from its manifest."""

    command: Sequence[str]
    environment: dict[str, str]
    working_directory: str


@dataclass(frozen=True)
class Started:
    """An application that was started.

    Attributes:
        pid: inside.
        outputs: of a donor: names by which CRIU knows its standard output and error (``pipe:[123]``).
    """

    pid: int
    outputs: tuple[str, ...] = ()


@dataclass
class Worker:
    """A tool that waits inside for one request on its socket; ``pid`` is its pid inside."""

    socket: socket.socket
    pid: int

    def close(self) -> None:
        """Let it go; it exits when its socket closes."""
        self.socket.close()


class Sandbox(Protocol):
    """Namespaces with a PID 1 that takes orders, for one instance."""

    id: str
    #: On the node, for as long as the sandbox lives; the owner of the sandbox may keep files in it.
    folder: Path
    #: Gets what is written in it; goes with the sandbox unless somebody moves it. None: others keep it (``kubectl logs``).
    output: Path | None
    #: Waits to restore something here; taken by the start.
    worker: Worker | None
    #: PID 1 on the host.
    init_pid: int

    @property
    def address(self) -> str:
        """Its IPv4 address."""

    @property
    def on_exit(self) -> Callable[[int, int], None]:
        """Called with the pid (inside) and wait status of each process that nobody waits for."""

    @on_exit.setter
    def on_exit(self, call: Callable[[int, int], None]) -> None: ...

    @property
    def gone(self) -> asyncio.Future[None]:
        """Completed when PID 1 is gone, whatever the reason."""

    def name(self, proposed: str) -> str:
        """What the instance in it is called, if not as the sandbox is."""

    async def set_up(self, root: str, logs: Path) -> None:
        """Before anything is known of the instance: the root ``root``, and an output among ``logs``."""

    async def furnish(self, function: Function, layers: RootLayers, hostname: str) -> None:
        """At a start: limits, name and files of the function."""

    def write_identity(self, content: bytes) -> None:
        """Put ``/run/thaw/instance.json``."""

    def open_outputs(self) -> list[int]:
        """Descriptors that take a restored instance's standard output and error, one for both or one each; the caller closes them."""

    async def start_application(self, process: Process, log: Path, *, donor: bool) -> Started:
        """Start the function's command, unprivileged, as leader of its own session; ``log`` gets its output unless others keep it.

        Args:
            process: what to run.
            log: output file.
            donor: it will be dumped: its output must be something for which CRIU can put another.
        """

    async def run_tool(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int], timeout_s: float) -> int:
        """Run a tool by descriptor inside, wait for it and return its wait status; ``fds`` are its 100, 101, …"""

    async def start_worker(self, executable_fd: int, arguments: Sequence[str], fds: Sequence[int]) -> None:
        """Start a tool that serves requests on its descriptor 3, and keep it as :attr:`worker`; ``fds`` are its 100, 101, …"""

    def foreign(self, path: str) -> bool:
        """Whether the file at ``path`` inside is there in every sandbox, each time as others make it. Blocking."""

    def pack_files(self, layers: RootLayers) -> bytes:
        """What was written inside, as :func:`agent.store.archive.pack_layer` packs it. Blocking."""

    def unpack_files(self, layer: Path) -> None:
        """Write again what another sandbox of the function has packed. Blocking."""

    def confine(self) -> None:
        """Check that restored processes are no more than the sandbox allows, and set what CRIU takes from the image.

        Raises:
            SandboxError: they are more.
        """

    def complete(self, pid: int) -> None:
        """An instance with the main process ``pid`` (inside) has answered: from now on the sandbox is its own."""

    def rest(self) -> None:
        """What is in it is on standby."""

    def retire(self) -> None:
        """What is in it is about to end: nobody should send requests there any more."""

    def lift_memory_limit(self) -> None:
        """Before CRIU's dump, whose output may be charged here."""

    def was_oom_killed(self) -> bool:
        """Whether the kernel killed a process here because of the memory limit."""

    def ended(self, pid: int) -> int | None:
        """Wait status of a process inside that has ended and that nobody waited for."""

    def processes(self) -> list[int]:
        """Host pids of everything inside but PID 1."""

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process inside but PID 1."""

    def signal_handler(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to process ``pid`` (inside) if it has a handler for it: without one the signal would end it."""

    async def destroy(self) -> None:
        """End everything inside and remove every trace. Safe to call twice."""


class Sandboxes(Protocol):
    """Sandboxes that are ready before they are needed."""

    async def take(self, function: Function, layers: RootLayers) -> Sandbox:
        """A prepared sandbox, owned by the caller, who gives it back.

        Raises:
            NoRoom: there is none. SandboxError: the host refuses to make one.
        """

    async def give_back(self, sandbox: Sandbox) -> None:
        """End what is in a used sandbox."""

    def check_room(self, function: Function, memory_mb: int) -> None:
        """Whether an instance that may use ``memory_mb`` can be taken in now.

        Raises:
            NoRoom: it can't; another node may.
        """


class Keeper(Protocol):
    """Finds sandboxes that an agent which is gone has left."""

    def left(self) -> list[Path]:
        """Their folders."""

    async def adopt(self, folder: Path) -> Sandbox:
        """Take one over.

        Raises:
            SandboxError: it does not live any more, or not rightly.
        """

    async def discard(self, folder: Path) -> None:
        """End what is left of one that is not taken over."""
