"""Makes sandboxes, and takes over or ends those that an agent which is gone has left.

In: a folder for the records, what gives limits and addresses. Out: :class:`~agent.sandbox.local.LocalSandbox`. A sandbox's folder holds the
socket of its PID 1 and, once it has an address, a record that tells a later agent which process that is. Used by :mod:`agent.sandbox.pool`
and :mod:`agent.adoption`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.errors import SandboxError
from agent.sandbox.cgroup import Cgroup, CgroupTree
from agent.sandbox.local import LocalSandbox
from agent.sandbox.network import Link, Network
from infra.local.processes import Identity, identity_of

#: Files in a sandbox's folder.
_CONTROL, _RECORD = "control", "sandbox"
#: The folder beside those of sandboxes that is mounted over in each of them.
MOUNT_POINT = "mount"


class SandboxRecord(msgspec.Struct, frozen=True):
    """What a later agent must know of a sandbox: its PID 1 and where it is reached."""

    init: Identity
    link: Link


class SandboxFactory:
    """Makes the sandboxes of one agent, and takes over those of an agent that is gone."""

    def __init__(self, init_path: Path, folders: Path, cgroups: CgroupTree, network: Network, orphan_s: float, user: int) -> None:
        """Prepare.

        Args:
            init_path: the compiled ``init.c``.
            folders: gets one folder per sandbox, and an empty one that is mounted over in each.
            cgroups, network: what sandboxes get limits and addresses from.
            orphan_s: sandboxes end when no agent came for so long.
            user: whom functions run as.
        """
        self._init_path = init_path
        self._folders = folders
        self._mount_point = folders / MOUNT_POINT
        self._cgroups = cgroups
        self._network = network
        self._user = user
        self._orphan_s = max(1, round(orphan_s))
        self._serial = 0
        self._prefix = f"{time.time_ns():x}"  # ids do not meet those of an earlier agent
        self._mount_point.mkdir(parents=True, exist_ok=True)

    async def create(self) -> LocalSandbox:
        """A sandbox with namespaces, limits (open) and an address, but no root yet.

        Raises:
            SandboxError: the host refuses; nothing is left.
        """
        self._serial += 1
        folder = self._folders / f"{self._prefix}-{self._serial}"
        spawning = asyncio.get_running_loop().run_in_executor(None, self._spawn, folder)
        try:
            cgroup, pid = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # The thread can't be stopped: what it makes would be nobody's.
            await asyncio.wait([spawning])
            if spawning.exception() is None:
                await self._undo(folder, *spawning.result())
            raise
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise SandboxError(f"cannot make a sandbox: {error}", stage="sandbox") from error
        sandbox = LocalSandbox(folder, pid, _connect(folder), cgroup, self._network, self._user)
        try:
            await sandbox.ready()
            sandbox.link = await self._network.attach(pid)
            await sandbox.configure_network(sandbox.link, self._network.gateway)
            init = identity_of(pid)
            if init is None:
                raise SandboxError("its PID 1 has ended", sandbox=folder.name)
            (folder / _RECORD).write_bytes(msgspec.msgpack.encode(SandboxRecord(init, sandbox.link)))
        except BaseException:
            await sandbox.destroy()
            raise
        return sandbox

    def left(self) -> list[Path]:
        """Folders of sandboxes that an agent which is gone has left."""
        return [path for path in sorted(self._folders.iterdir()) if path != self._mount_point]

    async def adopt(self, folder: Path) -> LocalSandbox:
        """Take over a sandbox.

        Raises:
            SandboxError: it does not live any more, or not rightly.
        """
        try:
            record = msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=SandboxRecord)
            if not record.init.alive():
                raise SandboxError("its PID 1 has ended", sandbox=folder.name)
            cgroup = self._cgroups.existing(folder.name)
            sandbox = LocalSandbox(folder, record.init.pid, _connect(folder), cgroup, self._network, self._user)
        except (OSError, msgspec.MsgspecError) as error:
            raise SandboxError(f"it cannot be taken over: {error}", sandbox=folder.name) from error
        sandbox.link = record.link
        self._network.adopt(record.link)
        await sandbox.ready()
        return sandbox

    async def discard(self, folder: Path) -> None:
        """End what is left of a sandbox that is not taken over."""
        cgroup = self._cgroups.existing(folder.name)
        for pid in cgroup.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        record = read_record(folder)
        if record is not None and record.init.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.init.pid, signal.SIGKILL)
        await asyncio.to_thread(cgroup.remove)
        await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _undo(self, folder: Path, cgroup: Cgroup, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
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


def read_record(folder: Path) -> SandboxRecord | None:
    """What was written down of a sandbox; None while it is being made."""
    try:
        return msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=SandboxRecord)
    except (OSError, msgspec.MsgspecError):
        return None


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
