"""CRIU inside a sandbox.

In: a :class:`~agent.sandbox.protocol.Sandbox`, directories by descriptor. Out: image files (:func:`dump`) or a process tree
(:func:`start_worker`, then :func:`restore`). CRIU reaches every directory through /proc/self/fd, so nothing is mounted into the sandbox
for it. Next: :mod:`agent.checkpoint` and :mod:`agent.restore`. Field numbers: images/rpc.proto of CRIU 4.2.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path

from agent.criu import protobuf
from agent.errors import CriuError, NotFreezable
from agent.sandbox.protocol import Sandbox, Worker

#: Log level 2 is errors and warnings; more costs milliseconds.
LOG_LEVEL = 2
_RESTORE = 2
_OPTION = {
    "images_dir_fd": 1, "images_dir": 68, "ext_unix_sk": 4, "file_locks": 8, "log_level": 9, "log_file": 10,
    "work_dir_fd": 17, "link_remap": 18, "inherit_fd": 27, "manage_cgroups_mode": 34, "lazy_pages": 48,
    "tcp_close": 52, "network_lock": 64, "leave_stopped": 69,
}  # fmt: skip
_NETWORK_LOCK_SKIP = 3
#: Descriptors of a waiting worker. CRIU is built to keep what it knows of the kernel in the third (:mod:`infra.local.criu`).
_IMAGES_FD, _WORK_FD, _FEATURES_FD, _OUTPUT_FD = 100, 101, 102, 103
_FEATURES = "criu.kdat"

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


def probe(criu: Path, features: int) -> None:
    """Have CRIU ask the kernel once what it can, and keep the answers in the folder ``features``. Blocking; 0.1 s.

    The check itself may complain of devices that are missing here; what counts are the answers.

    Args:
        criu: the executable.
        features: descriptor of a folder in memory; CRIU keeps nothing on a disk, where answers of another boot could be.

    Raises:
        CriuError: it wrote none.
    """
    null = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1, 2)]
    actions = [(os.POSIX_SPAWN_DUP2, features, _FEATURES_FD), *null]
    os.waitpid(os.posix_spawn(criu, ["criu", "check"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, file_actions=actions), 0)
    if _FEATURES not in os.listdir(features):
        raise CriuError("criu check found that this kernel cannot be used; run `thaw doctor`", stage="criu.check")


async def dump(sandbox: Sandbox, criu_fd: int, features: int, pid: int, images: Path, timeout_s: float) -> None:
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
        status = await sandbox.run_tool(criu_fd, arguments, [directory, directory, features], timeout_s)
    finally:
        os.close(directory)
    if status:
        log = work_log(images, "dump.log")
        for pattern, meaning in _NOT_FREEZABLE:
            if pattern.search(log):
                raise NotFreezable(f"the function cannot be frozen: {meaning} (CRIU: {log})", stage="criu.dump")
        raise CriuError(f"criu dump failed: {log}", stage="criu.dump")


async def start_worker(sandbox: Sandbox, criu_fd: int, features: int, images: Path, work_directory: Path, outputs: Sequence[int]) -> None:
    """Let a CRIU process wait in the sandbox for :func:`restore`.

    Args:
        sandbox: with its root mounted.
        criu_fd: the open executable.
        features: of :func:`probe`.
        images: directory of all images of the node; which one is said later.
        work_directory: gets CRIU's log and statistics, and holds the pager's socket.
        outputs: what takes the place of the donor's outputs: one for all, or one each.
    """
    directories = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in (images, work_directory)]
    try:
        await sandbox.start_worker(criu_fd, ["criu", "swrk", "3"], [*directories, features, *outputs])
    finally:
        for fd in directories:
            os.close(fd)


async def restore(worker: Worker, images: str, outputs: Sequence[str], work_directory: Path, *, lazy: bool, timeout_s: float) -> None:
    """Have a waiting worker restore an image, and leave its processes stopped; the worker ends with it.

    Args:
        worker: of :func:`start_worker`.
        images: CRIU's image directory, relative to the directory of all images.
        outputs: names at dump time (``pipe:[123]``) of the descriptors that the worker's outputs take the place of.
        work_directory: the worker's.
        lazy: leave lazy pages to the pager behind ``lazy-pages.socket`` in the work directory.
        timeout_s: longest wait.

    Raises:
        CriuError: with the errors of restore.log.
    """
    options: dict[str, protobuf.Scalar | list[protobuf.Scalar]] = {
        "images_dir_fd": -1, "images_dir": f"/proc/self/fd/{_IMAGES_FD}/{images}", "work_dir_fd": _WORK_FD, "log_level": LOG_LEVEL,
        "log_file": "restore.log", "tcp_close": True, "manage_cgroups_mode": 0, "network_lock": _NETWORK_LOCK_SKIP,
        "file_locks": True, "link_remap": True, "ext_unix_sk": True, "lazy_pages": lazy, "leave_stopped": True,
        "inherit_fd": [protobuf.encode({1: name, 2: _OUTPUT_FD + number}) for number, name in enumerate(outputs)],
    }  # fmt: skip
    encoded = protobuf.encode({_OPTION[name]: value for name, value in options.items()})
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            await loop.sock_sendall(worker.socket, protobuf.encode({1: _RESTORE, 2: encoded}))
            answer = protobuf.decode(await loop.sock_recv(worker.socket, 65536))
    except TimeoutError as error:
        raise CriuError(f"criu restore did not end within {timeout_s:.0f} s", stage="criu.restore") from error
    except (OSError, ValueError) as error:
        raise CriuError(f"the CRIU worker is gone: {error}", stage="criu.restore") from error
    finally:
        worker.close()
    if not protobuf.integer(answer, 2):
        said = protobuf.text(answer, 8) or work_log(work_directory, "restore.log")
        log = work_log(work_directory, "restore.log")
        raise CriuError(f"criu restore failed: {log or said}", stage="criu.restore")
