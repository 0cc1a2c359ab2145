"""Start, stop and inspect the embedded stack.

In: settings. Out: running servers on loopback and ``<state_dir>/stack.json`` with their addresses and credentials.
Next: :func:`infra.settings.load` reads that file, so that every other command of Thaw finds the stack by itself.

What holds at any moment, also after Ctrl-C, SIGKILL or a reboot: a process that runs has its record in
``<state_dir>/stack``; stack.json names only servers that answered a health check; :func:`up` turns any state into a
working one, and :func:`down` turns any state into one without processes.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.errors import InfraError, StackError
from infra.local import criu, install, processes
from infra.local.install import Report
from infra.local.parts import Part, parts, write_private
from infra.settings import Settings, with_embedded_stack

#: Below this the broker would die in the middle of a start, unable even to log why, MB.
_LEAST_DISK_MB = 64

State = Literal["running", "stopped", "dead", "unhealthy", "external"]


@dataclass(frozen=True)
class PartStatus:
    """How one part of the stack is."""

    name: str
    #: ``running``: healthy. ``stopped``: never started or stopped by ``down``. ``dead``: started, but its process is
    #: gone. ``unhealthy``: its process runs and does not do its job. ``external``: the user's own, and healthy.
    state: State
    address: str
    pid: int | None
    #: What is wrong and what to do; empty when nothing is.
    detail: str = ""


def up(settings: Settings, report: Report) -> Settings:
    """Install what is missing, start what does not run, and return when everything has answered a health check.

    A second call changes nothing. Blocks; call it from a thread inside an event loop.

    Args:
        settings: ports, folders and time-outs; parts with an address of their own are checked and not started.
        report: gets the progress.

    Returns:
        The settings with the addresses and credentials of the running stack.

    Raises:
        InstallError: a tool is missing and can't be installed.
        StackError: a part does not start or answer; parts that this call started are stopped again.
        KafkaUnavailable: the user's own broker does not answer.
        StoreUnavailable: the user's own object store does not answer.
    """
    criu.ensure(settings, report)
    with _locked(settings, report):
        settings = _without_own(settings)
        started: list[Part] = []
        try:
            embedded = [part for part in parts(settings) if not _checked_external(part, report)]
            waiting = [part for part in embedded if not _already_healthy(part, settings, report)]
            for part in waiting:
                part.install(report)
            for part in waiting:
                started.append(part)
                _start(part, report)
            for part in waiting:
                _await_start(part, settings, report)
        except BaseException:
            # Also on Ctrl-C: what this call began is taken back, what was there before stays.
            for part in started:
                processes.stop(part.identity)
                processes.forget(part.record)
            _publish(settings)
            raise
        _publish(settings)
    return with_embedded_stack(settings)


def down(settings: Settings, report: Report, *, purge: bool = False) -> None:
    """Stop every part that runs and wait until each process is gone.

    Args:
        settings: names the state folder.
        report: gets the progress.
        purge: also remove all data, credentials and remembered ports of the stack.

    Raises:
        StackError: a process can't be stopped.
    """
    with _locked(settings, report):
        # First, so that nobody finds the address of a server that is about to go.
        settings.stack_file.unlink(missing_ok=True)
        stopped = 0
        for part in parts(settings):
            identity = part.identity
            if identity is not None and identity.alive():
                report(f"{part.name}: stopping (pid {identity.pid})")
                processes.stop(identity)
                stopped += 1
            processes.forget(part.record)
        if not stopped:
            report("nothing was running")
        home = settings.paths.state_dir / "stack"
        if purge and home.exists():
            shutil.rmtree(home)
            report(f"removed {home}")


def status(settings: Settings) -> list[PartStatus]:
    """Ask each part how it is. Starts and changes nothing."""
    return [_status(part) for part in parts(settings)]


def logs(settings: Settings, name: str | None = None, lines: int = 50) -> Iterator[tuple[Path, list[str]]]:
    """Yield each log file of the stack with its last lines.

    Args:
        settings: names the state folder.
        name: only this part, ``kafka`` or ``s3``.
        lines: how many lines of each file.

    Raises:
        StackError: there is no part of that name.
    """
    known = parts(settings)
    if name is not None and name not in {part.name for part in known}:
        raise StackError(f"the stack has no part {name!r}; it has {', '.join(part.name for part in known)}")
    for part in known:
        if name in (None, part.name):
            for path in part.logs():
                yield path, path.read_text(errors="replace").splitlines()[-lines:]


def _without_own(settings: Settings) -> Settings:
    """Forget what stack.json said: ports and address may become others."""
    external = {part.name for part in parts(settings) if part.external}
    if "kafka" not in external:
        settings = dataclasses.replace(settings, kafka=dataclasses.replace(settings.kafka, bootstrap_servers=""))
    if "s3" not in external:
        settings = dataclasses.replace(settings, s3=dataclasses.replace(settings.s3, endpoint_url=""))
    return settings


def _locked(settings: Settings, report: Report) -> AbstractContextManager[None]:
    return install.exclusive(settings.paths.state_dir / ".stack.lock", report, timeout_s=600)


def _checked_external(part: Part, report: Report) -> bool:
    if not part.external:
        return False
    part.check_external()
    report(f"{part.name}: using yours at {part.configured}")
    return True


def _already_healthy(part: Part, settings: Settings, report: Report) -> bool:
    """Adopt a part that runs; stop one that runs and does not work."""
    identity = part.identity
    if identity is None or not identity.alive():
        return False
    if part.host != settings.stack.listen_host:
        report(f"{part.name}: moves from {part.host} to {settings.stack.listen_host}")
        processes.stop(identity)
        return False
    # An interrupted `up` may have started it a moment ago: it gets the time of a start.
    failure = _wait_healthy(part, settings.stack.start_timeout_s)
    if failure is None:
        report(f"{part.name}: already running at {part.address} (pid {identity.pid})")
        return True
    report(f"{part.name}: runs but does not work ({failure}), starting it again")
    processes.stop(identity)
    return False


def _start(part: Part, report: Report) -> None:
    was_there = part.identity is not None
    part.home.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(part.home).free // 2**20
    if free_mb < _LEAST_DISK_MB:
        raise StackError(f"{part.name}: no space, {free_mb} MB are left for {part.home}; {_LEAST_DISK_MB} MB are needed")
    part.choose_ports(report)
    report(f"{part.name}: {'was dead, starting again' if was_there else 'starting'}")
    part.launch()


def _await_start(part: Part, settings: Settings, report: Report) -> None:
    began = time.monotonic()
    failure = _wait_healthy(part, settings.stack.start_timeout_s)
    if failure is not None and not part.alive and not all(part.port_free(name) for name in part.port_names):
        # Someone took the port between the choice and the start: once more with another one.
        _start(part, report)
        failure = _wait_healthy(part, settings.stack.start_timeout_s)
    if failure is not None:
        raise StackError(f"{part.name} did not start: {failure}. Its log ends: {part.last_words()}")
    identity = part.identity
    pid = identity.pid if identity else "?"
    report(f"{part.name}: healthy at {part.address} after {time.monotonic() - began:.1f} s (pid {pid})")


def _wait_healthy(part: Part, timeout_s: float) -> str | None:
    """Wait until a part passes its check; return what is wrong when it does not, or when its process ends."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            part.check()
            return None
        except InfraError as error:
            failure = str(error)
        if not part.alive:
            return "its process ended"
        if time.monotonic() > deadline:
            return f"{failure} (waited {timeout_s:.0f} s)"
        time.sleep(0.05)


def _publish(settings: Settings) -> None:
    """Write stack.json from what runs now, or remove it when nothing does."""
    value = {}
    for part in parts(settings):
        identity = part.identity
        if not part.external and identity is not None and identity.alive():
            value[part.name] = {**part.entry(), "pid": identity.pid}
    if value:
        write_private(settings.stack_file, value)
    else:
        settings.stack_file.unlink(missing_ok=True)


def _status(part: Part) -> PartStatus:
    identity = part.identity
    pid = identity.pid if identity else None
    address = part.configured if part.external else part.address
    if not part.external and identity is None:
        return PartStatus(part.name, "stopped", "", None, "start it with `thaw stack up`")
    if not part.external and not part.alive:
        detail = f"its process (pid {pid}) is gone; `thaw stack up` starts it again. Its log ends: {part.last_words(1)}"
        return PartStatus(part.name, "dead", address, None, detail)
    check: Callable[[], None] = part.check_external if part.external else part.check
    try:
        check()
    except InfraError as error:
        return PartStatus(part.name, "unhealthy", address, None if part.external else pid, str(error))
    return PartStatus(part.name, "external", address, None) if part.external else PartStatus(part.name, "running", address, pid)
