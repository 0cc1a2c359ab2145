"""One instance on the node, running or on standby, and what every kind of start works with.

In: a sandbox from the pool, a function, its layers. Out: :class:`Instance`, owned by :mod:`agent.node`; the sequences in
:mod:`agent.cold` and :mod:`agent.restore` fill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass, field
from pathlib import Path

from agent.api.function import Function
from agent.api.records import StartMode
from agent.errors import SandboxError
from agent.furnish import Furnisher
from agent.pager.client import PagerClient
from agent.sandbox.protocol import Sandbox, Sandboxes
from agent.store.cache import CachedImage
from infra import probe
from infra.settings import AgentSettings
from infra.tasks import TaskGroup


@dataclass(frozen=True)
class Workshop:
    """What the sequences work with; one per agent."""

    settings: AgentSettings
    furnisher: Furnisher
    pool: Sandboxes
    tasks: TaskGroup


@dataclass
class Instance:
    """A process tree of a function in its sandbox."""

    #: As reported; a pod's own name is that of its instance.
    id: str
    function: Function
    sandbox: Sandbox
    #: Its output; :meth:`keep_log` gives it a name that people find.
    log: Path
    start_mode: StartMode = "cold"
    root_pid: int = 0
    #: Of a donor: names of its outputs.
    outputs: tuple[str, ...] = ()
    image: CachedImage | None = None
    pager: PagerClient | None = None
    #: When it first answered; 0 on standby.
    started_ns: int = 0
    command_id: str = ""
    #: On standby: when it was made, and its memory then.
    made_ns: int = 0
    pss_bytes: int = 0
    #: Wait status of the main process, when it ends.
    ended: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    #: Set by whoever ends it on purpose, so that its end is not reported twice.
    releasing: bool = False
    #: Set when it is to end now, whatever requests are in progress.
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set by whoever has ended it.
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def standby(self) -> bool:
        """Restored, and never resumed yet."""
        return self.started_ns == 0 and self.made_ns > 0

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.sandbox.address}:{self.function.spec.port}"

    def watch(self) -> None:
        """Complete :attr:`ended` when the main process, or the whole sandbox, ends; call it when :attr:`root_pid` is known."""

        def exited(pid: int, status: int) -> None:
            if pid == self.root_pid and not self.ended.done():
                self.ended.set_result(status)

        def gone(_: object) -> None:
            if not self.ended.done():
                self.ended.set_result(signal.SIGKILL)

        status = self.sandbox.ended(self.root_pid)
        if status is not None and not self.ended.done():
            self.ended.set_result(status)  # it was quicker than the answer to the order that started it
        self.sandbox.on_exit = exited
        self.sandbox.gone.add_done_callback(gone)

    def keep_log(self, path: Path) -> None:
        """Keep the output at ``path``, also when the sandbox is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.log.rename(path)
        self.log = path

    def measure(self) -> int:
        """Memory of its processes, in bytes: proportional set sizes, each read from /proc/PID/smaps_rollup. Blocking."""
        total = 0
        for pid in self.sandbox.processes():
            with contextlib.suppress(OSError):
                total += probe.pss_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
        return total

    async def stop(self, workshop: Workshop, grace_s: float = 0.0) -> None:
        """End the instance: SIGTERM, then after ``grace_s`` everything; nothing of it is left when this returns."""
        self.releasing = True
        self.sandbox.retire()
        if grace_s > 0 and not self.standby and not self.ended.done() and not self.sandbox.gone.done():
            with contextlib.suppress(TimeoutError, SandboxError):
                self.sandbox.signal_all(signal.SIGTERM)
                async with asyncio.timeout(grace_s):
                    await asyncio.shield(self.ended)
        # To the end, also when whoever waits is out of time in this moment: a start's own deadline and that of its command are the same.
        removal = workshop.tasks.spawn(self._remove(workshop), f"removal of {self.id}")
        try:
            await asyncio.shield(removal)
        except asyncio.CancelledError:
            await asyncio.wait([removal])
            raise

    async def _remove(self, workshop: Workshop) -> None:
        await workshop.pool.give_back(self.sandbox)
        if self.pager is not None:
            await self.pager.release(self.id)
        if self.image is not None:
            self.image.users -= 1
            self.image = None
