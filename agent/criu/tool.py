"""CRIU inside a sandbox.

In: a :class:`~agent.sandbox.local.Sandbox`, directories by descriptor. Out: image files (:func:`dump`) or a running process tree
(:class:`RestoreWorker`). CRIU reaches every directory through /proc/self/fd, so nothing is mounted into the sandbox for it.
Next: :mod:`agent.checkpoint` and :mod:`agent.restore`. Field numbers: images/rpc.proto of CRIU 4.2.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent.criu import protobuf
from agent.errors import CriuError, NotFreezable
from agent.sandbox.local import Sandbox

#: Log level 2 is errors and warnings; more costs milliseconds.
LOG_LEVEL = 2
_RESTORE = 2
_OPTION = {
    "images_dir_fd": 1, "images_dir": 68, "ext_unix_sk": 4, "file_locks": 8, "log_level": 9, "log_file": 10,
    "work_dir_fd": 17, "link_remap": 18, "inherit_fd": 27, "manage_cgroups_mode": 34, "lazy_pages": 48,
    "tcp_close": 52, "network_lock": 64, "leave_stopped": 69,
}  # fmt: skip
_NETWORK_LOCK_SKIP = 3

#: Said on every host without CAP_SYS_RESOURCE, also when all goes well.
_HARMLESS = "Can't setup RLIMIT_NOFILE"
#: What CRIU says, and what it means for the function's owner.
_NOT_FREEZABLE = [
    (re.compile(r"Unsupported proto 262"), "it uses multipath TCP; for Go set GODEBUG=multipathtcp=0"),
    (re.compile(r"Can't lookup mount|Can't get mount"), "it holds a file of a mount outside its sandbox"),
    (re.compile(r"connected TCP socket|Connected TCP"), "it holds an open connection"),
]


def work_log(work_directory: Path, name: str) -> str:
    """The errors of a CRIU log, newest last; the whole tail when it marks none."""
    try:
        lines = (work_directory / name).read_text(errors="replace").splitlines()
    except OSError:
        return "no log was written"
    marked = [line for line in lines if "Error" in line and _HARMLESS not in line]
    return " | ".join(line.strip() for line in (marked or lines)[-6:]) or "the log is empty"


async def dump(sandbox: Sandbox, criu_fd: int, pid: int, images: Path, timeout_s: float) -> None:
    """Freeze the process tree of ``pid`` (a pid inside) into ``images`` and end it.

    Raises:
        NotFreezable: the function holds something that CRIU cannot freeze. CriuError: anything else.
    """
    arguments = [
        "criu", "dump", "-t", str(pid), "-D", "/proc/self/fd/100", "-o", "dump.log", f"-v{LOG_LEVEL}", "--tcp-close",
        "--network-lock", "skip", "--manage-cgroups=ignore", "--file-locks", "--link-remap", "--ext-unix-sk",
    ]  # fmt: skip
    directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = await sandbox.run_tool(criu_fd, arguments, [directory], timeout_s)
    finally:
        os.close(directory)
    if status:
        log = work_log(images, "dump.log")
        for pattern, meaning in _NOT_FREEZABLE:
            if pattern.search(log):
                raise NotFreezable(f"the function cannot be frozen: {meaning} (CRIU: {log})", stage="criu.dump")
        raise CriuError(f"criu dump failed: {log}", stage="criu.dump")


class RestoreWorker:
    """A CRIU process that waits in a sandbox for one restore request."""

    def __init__(self, sock: socket.socket, work_directory: Path) -> None:
        self._socket = sock
        self._work_directory = work_directory

    @classmethod
    async def start(
        cls, sandbox: Sandbox, criu_fd: int, images: Path, work_directory: Path, extra_fds: Sequence[int] = ()
    ) -> RestoreWorker:
        """Start a worker whose descriptors 100 and 101 are the image and work directories; ``extra_fds`` become 102, …"""
        directories = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in (images, work_directory)]
        try:
            sock, _ = await sandbox.start_worker(criu_fd, ["criu", "swrk", "3"], [*directories, *extra_fds])
        finally:
            for fd in directories:
                os.close(fd)
        return cls(sock, work_directory)

    async def restore(self, inherit: Mapping[str, int], *, lazy: bool, timeout_s: float, leave_stopped: bool = False) -> None:
        """Restore the image.

        Args:
            inherit: names of descriptors at dump time (``pipe:[123]``) to descriptors of the worker that take their place.
            lazy: leave lazy pages to the pager behind ``lazy-pages.socket`` in the work directory.
            timeout_s: longest wait.
            leave_stopped: do not let the restored processes run.

        Raises:
            CriuError: with the errors of restore.log.
        """
        options: dict[str, protobuf.Scalar | list[protobuf.Scalar]] = {
            "images_dir_fd": -1, "images_dir": "/proc/self/fd/100", "work_dir_fd": 101, "log_level": LOG_LEVEL,
            "log_file": "restore.log", "tcp_close": True, "manage_cgroups_mode": 0, "network_lock": _NETWORK_LOCK_SKIP,
            "file_locks": True, "link_remap": True, "ext_unix_sk": True, "lazy_pages": lazy, "leave_stopped": leave_stopped,
            "inherit_fd": [protobuf.encode({1: key, 2: fd}) for key, fd in inherit.items()],
        }  # fmt: skip
        encoded = protobuf.encode({_OPTION[name]: value for name, value in options.items()})
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_sendall(self._socket, protobuf.encode({1: _RESTORE, 2: encoded}))
                answer = protobuf.decode(await loop.sock_recv(self._socket, 65536))
        except TimeoutError as error:
            raise CriuError(f"criu restore did not end within {timeout_s:.0f} s", stage="criu.restore") from error
        except (OSError, ValueError) as error:
            raise CriuError(f"the CRIU worker is gone: {error}", stage="criu.restore") from error
        if not protobuf.integer(answer, 2):
            said = protobuf.text(answer, 8) or work_log(self._work_directory, "restore.log")
            log = work_log(self._work_directory, "restore.log")
            raise CriuError(f"criu restore failed: {log or said}", stage="criu.restore")

    def close(self) -> None:
        """Let the worker go; it exits when its socket closes."""
        self._socket.close()
