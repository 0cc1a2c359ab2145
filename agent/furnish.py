"""What is in a sandbox: before demand, whatever every start needs; at a start, what makes it the function's.

In: sandboxes of either kind. Out: sandboxes in which :mod:`agent.cold` runs a command or :mod:`agent.restore` an image. What can be there
before the function is known is put there before: the root, a waiting CRIU worker, an output file.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from agent.api.function import Function
from agent.criu import tool
from agent.sandbox import rootfs
from agent.sandbox.protocol import Sandbox
from agent.sandbox.rootfs import RootLayers

_WORK = "work"


@dataclass(frozen=True)
class Furnisher:
    """Furnishes sandboxes; one per agent."""

    #: Open CRIU executable.
    criu_fd: int
    #: Descriptor of the folder of CRIU's kernel feature cache; without it each restore would probe the kernel for 10 ms.
    features: int
    #: Directory of all images of the node.
    images: Path
    #: Output of instances, one file each.
    logs: Path

    async def prepare(self, sandbox: Sandbox, root: str = "") -> None:
        """Before demand: root, output, waiting worker."""
        await sandbox.set_up(root, self.logs)
        work = work_directory(sandbox)
        shutil.rmtree(work, ignore_errors=True)  # of an instance before, in a sandbox that can be used again
        work.mkdir()
        outputs = sandbox.open_outputs()
        try:
            await tool.start_worker(sandbox, self.criu_fd, self.features, self.images, work, outputs)
        finally:
            for fd in outputs:
                os.close(fd)

    async def furnish(self, sandbox: Sandbox, function: Function, layers: RootLayers, instance_id: str, checkpoint: str) -> None:
        """At a start: identity, and what the sandbox takes from the document."""
        sandbox.write_identity(rootfs.identity(instance=instance_id, function=function.name, checkpoint=checkpoint))
        await sandbox.furnish(function, layers, f"{function.name}-{instance_id[-6:]}"[:63])

    def log(self, instance_id: str) -> Path:
        """Where an instance's output is kept."""
        return self.logs / f"{instance_id}.log"


def work_directory(sandbox: Sandbox) -> Path:
    """Where the sandbox's CRIU worker writes."""
    return sandbox.folder / _WORK


def last_output(log: Path, size: int = 400) -> str:
    """The end of an instance's output on one line, for error messages."""
    try:
        with log.open("rb") as file:  # as long as the function wanted it to be
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            text = file.read(size).decode(errors="replace").strip()
    except OSError:
        return ""
    return " | ".join(line for line in text.splitlines() if line)
