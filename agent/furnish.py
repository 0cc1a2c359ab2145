"""What is in a sandbox: before demand, whatever every start needs; at a start, what makes it the function's.

In: sandboxes of :mod:`agent.sandbox.pool`. Out: sandboxes in which :mod:`agent.cold` runs a command or :mod:`agent.restore` an image. What
can be there before the function is known is put there before: the root, CRIU's feature cache, a waiting CRIU worker, an output file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from agent.api.function import Function
from agent.criu import tool
from agent.sandbox import rootfs
from agent.sandbox.local import Sandbox
from agent.sandbox.rootfs import RootLayers

_WORK = "work"


@dataclass(frozen=True)
class Furnisher:
    """Furnishes sandboxes; one per agent."""

    #: Open CRIU executable.
    criu_fd: int
    #: CRIU's kernel feature cache (criu.kdat); without it each restore would probe the kernel for 10 ms.
    kdat: bytes
    #: Directory of all images of the node.
    images: Path
    #: Output of instances, one file each.
    logs: Path
    #: User that functions run as.
    run_as: int

    async def prepare(self, sandbox: Sandbox, root: str) -> None:
        """Before demand: root, feature cache, output file, waiting worker."""
        kdat = sandbox.layer / "run" / "criu.kdat"
        kdat.write_bytes(self.kdat)
        kdat.chmod(0o600)
        (sandbox.layer / "run" / "thaw").mkdir(mode=0o755)
        await sandbox.mount_root(root)
        work = work_directory(sandbox)
        work.mkdir()
        # Under a name of its own: the instance's is given when there is time, because renaming takes the disk 0.4 ms.
        sandbox.output = self.logs / f".{sandbox.id}"
        output = open_output(sandbox.output)
        try:
            await tool.start_worker(sandbox, self.criu_fd, self.images, work, output)
        finally:
            os.close(output)

    async def furnish(self, sandbox: Sandbox, function: Function, layers: RootLayers, instance_id: str, checkpoint: str) -> None:
        """At a start: limits, identity, name and the function's files."""
        limits = function.spec.limits
        sandbox.cgroup.limit(limits.memory_mb << 20, limits.pids + 1)
        rootfs.write_identity(sandbox.layer_fd, instance=instance_id, function=function.name, checkpoint=checkpoint, user=self.run_as)
        await sandbox.bind_files(f"{function.name}-{instance_id[-6:]}"[:63], layers.binds)

    def log(self, instance_id: str) -> Path:
        """Where an instance's output is kept."""
        return self.logs / f"{instance_id}.log"


def work_directory(sandbox: Sandbox) -> Path:
    """Where the sandbox's CRIU worker writes."""
    return sandbox.folder / _WORK


def open_output(path: Path) -> int:
    """A descriptor that an instance writes its output to; the caller closes its copy."""
    return os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o640)


def last_output(log: Path, size: int = 400) -> str:
    """The end of an instance's output on one line, for error messages."""
    try:
        text = log.read_bytes()[-size:].decode(errors="replace").strip()
    except OSError:
        return ""
    return " | ".join(line for line in text.splitlines() if line)
