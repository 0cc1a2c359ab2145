"""One instance on the node, and what every kind of start has in common.

In: a sandbox from the pool, a function, its layers. Out: :class:`Instance`, owned by :mod:`agent.node`; the sequences in
:mod:`agent.cold` and :mod:`agent.restore` fill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from agent.api.function import Function
from agent.api.records import StartMode
from agent.pager.client import PagerClient
from agent.sandbox import rootfs
from agent.sandbox.local import Sandbox
from agent.sandbox.pool import SandboxPool
from agent.sandbox.rootfs import RootLayers
from agent.store.cache import CachedImage
from infra.settings import AgentSettings


@dataclass(frozen=True)
class Workshop:
    """What the sequences work with; one per agent."""

    settings: AgentSettings
    #: Open CRIU executable.
    criu_fd: int
    #: CRIU's kernel feature cache (criu.kdat); without it each restore would probe the kernel for 10 ms.
    kdat: bytes
    pool: SandboxPool
    #: Scratch directories of restores.
    work: Path
    #: Output of instances, one file each.
    logs: Path


@dataclass
class Instance:
    """A process tree of a function in its sandbox."""

    id: str
    function: Function
    sandbox: Sandbox
    log: Path
    start_mode: StartMode = "cold"
    root_pid: int = 0
    image: CachedImage | None = None
    pager: PagerClient | None = None
    started_ns: int = 0
    command_id: str = ""
    #: Wait status of the main process, when it ends.
    ended: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    #: Set by whoever ends it on purpose, so that its end is not reported twice.
    releasing: bool = False

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

    async def stop(self, workshop: Workshop, grace_s: float = 0.0) -> None:
        """End the instance: SIGTERM, then after ``grace_s`` everything; nothing of it is left when this returns."""
        self.releasing = True
        if grace_s > 0 and not self.ended.done() and not self.sandbox.gone.done():
            self.sandbox.signal_all(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await asyncio.shield(self.ended)
        await workshop.pool.give_back(self.sandbox)
        if self.pager is not None:
            await self.pager.release(self.id)
        if self.image is not None:
            self.image.users -= 1
            self.image = None
        await asyncio.to_thread(shutil.rmtree, workshop.work / self.id, True)


def last_output(log: Path, size: int = 400) -> str:
    """The end of an instance's output on one line, for error messages."""
    try:
        text = log.read_bytes()[-size:].decode(errors="replace").strip()
    except OSError:
        return ""
    return " | ".join(line for line in text.splitlines() if line)


def open_log(path: Path) -> int:
    """A descriptor that an instance writes its output to; the caller closes its copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o640)


async def furnish(sandbox: Sandbox, workshop: Workshop, function: Function, layers: RootLayers, instance_id: str, checkpoint: str) -> None:
    """Limits, identity, CRIU's feature cache and the root, in an empty sandbox whose writable layer is already filled."""
    limits = function.spec.limits
    sandbox.cgroup.limit(limits.memory_mb << 20, limits.pids + 1)
    rootfs.write_identity(
        sandbox.layer,
        instance=instance_id,
        function=function.name,
        checkpoint=checkpoint,
        user=workshop.settings.run_as,
    )
    kdat = sandbox.layer / "run" / "criu.kdat"
    kdat.write_bytes(workshop.kdat)
    kdat.chmod(0o600)
    await sandbox.mount_root(layers.root, f"{function.name}-{instance_id[-6:]}"[:63], layers.binds)
