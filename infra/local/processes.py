"""Detached processes that are found again after any crash, and never mistaken for another one.

In: commands of :mod:`infra.local.broker` and :mod:`infra.local.objectstore`. Out: an :class:`Identity` on disk for each
that is written before the program itself starts, so that no moment exists in which a process runs that nothing knows.
Next: :mod:`infra.local.stack` checks, adopts and stops them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import StackError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The shell records /proc/self/stat of the very process that becomes the program: exec keeps both pid and start time.
_LAUNCH = 'cat "/proc/$$/stat" /proc/sys/kernel/random/boot_id >"$1.new" && mv "$1.new" "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Identity:
    """One process, distinguishable from a later one that got the same number."""

    pid: int
    #: Clock ticks since boot, from /proc/PID/stat.
    start_ticks: int
    boot_id: str

    def alive(self) -> bool:
        """Tell whether this very process still runs; a zombie does not."""
        if self.boot_id != boot_id():
            return False
        try:
            found, state = parse_stat(Path(f"/proc/{self.pid}/stat").read_text())
        except (OSError, ValueError):
            return False
        return found == (self.pid, self.start_ticks) and state not in "ZX"


def boot_id() -> str:
    """Name the time since this machine was started."""
    return _BOOT_ID.read_text().strip()


def parse_stat(text: str) -> tuple[tuple[int, int], str]:
    """Read ``/proc/PID/stat``.

    Returns:
        ``((pid, start time in ticks since boot), state letter)``.

    Raises:
        ValueError: it is no such line.
    """
    # The command name may hold spaces and parentheses: the fields go on after the last one.
    head, separator, tail = text.rpartition(")")
    fields = tail.split()
    if not separator or len(fields) < 20:
        raise ValueError("not a line of /proc/PID/stat")
    return (int(head.split(" ", 1)[0]), int(fields[19])), fields[0]


def identity_of(pid: int) -> Identity | None:
    """Return the identity of a running process, None when there is none."""
    try:
        (number, ticks), _ = parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (OSError, ValueError):
        return None
    return Identity(number, ticks, boot_id())


def read(record: Path) -> Identity | None:
    """Return the identity that :func:`start` recorded, None when there is none."""
    try:
        stat, boot = record.read_text().splitlines()
        (pid, ticks), _ = parse_stat(stat)
    except (OSError, ValueError):
        return None
    return Identity(pid, ticks, boot)


def start(command: Sequence[str | Path], *, record: Path, output: Path, cwd: Path, environment: Mapping[str, str]) -> Identity:
    """Start a process that outlives this one, in a session of its own.

    Args:
        command: program and arguments.
        record: file that holds its identity from before the program runs until :func:`forget`.
        output: file that gets its standard output and error; an earlier one is kept as ``*.previous``.
        cwd: its working directory.
        environment: its whole environment.

    Raises:
        StackError: it could not be started.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    keep_previous(output)
    words = ["setsid", "--fork", "sh", "-c", _LAUNCH, "sh", str(record), *(str(word) for word in command)]
    with output.open("ab") as file:
        try:
            subprocess.run(words, check=True, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StackError(f"cannot start {command[0]}: {error}") from error
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        identity = read(record)
        if identity is not None:
            return identity
        time.sleep(0.005)
    raise StackError(f"{command[0]} did not start, see {output}")


def stop(identity: Identity | None, *, grace_s: float = 20.0) -> None:
    """End one process and wait until it is gone: TERM first, KILL after ``grace_s``.

    Raises:
        StackError: it still runs after KILL (stuck in the kernel), or belongs to someone else.
    """
    if identity is None or not identity.alive():
        return
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        # From here on the number can't be reused behind our back: the pidfd names the process that was just checked.
        if not identity.alive():
            return
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            try:
                signal.pidfd_send_signal(pidfd, number)
                # A stopped process only acts on TERM once it goes on.
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            except ProcessLookupError:
                return
            except PermissionError as error:
                raise StackError(f"process {identity.pid} belongs to another user") from error
            if _gone(pidfd, wait_s):
                return
        raise StackError(f"process {identity.pid} does not end, not even by SIGKILL")
    finally:
        os.close(pidfd)


def keep_previous(log: Path) -> None:
    """Move the log of an earlier process aside, so that its errors are not taken for those of the next."""
    with contextlib.suppress(FileNotFoundError):
        log.rename(log.with_name(f"{log.name}.previous"))


def forget(record: Path) -> None:
    """Remove the record of a process that was stopped."""
    record.unlink(missing_ok=True)


def _gone(pidfd: int, wait_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(wait_s * 1000))
