"""What is on this node that no agent knows: found by comparing the kernel's lists with the agent's journal, and removed.

In: the settings that name the agent's folder, cgroups and bridge. Out: :class:`Leftover` for each thing without an owner. The journal is
the folder of sandboxes: a sandbox belongs to an agent, or waits for the next one, as long as the PID 1 in its record lives. What is being
made or removed at this moment has no owner either, so a thing is only left over when two looks, some time apart, have found it. Used by
``thaw node gc`` (:mod:`thaw.node`), and by the agent on its timer (:mod:`agent.sites`).

Network namespaces have no list: they end with the last process in them, or with the mount that names them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import SandboxError
from agent.sandbox import cgroup, factory, network
from infra import netlink
from infra.files import read_or_empty
from infra.local.processes import identity_of
from infra.netlink import Netlink
from infra.settings import Settings

#: Between two looks, s: longer than a sandbox takes to be made or removed.
PAUSE_S = 3.0
_KILL_WAIT_S = 5.0
_MNT_DETACH = 2


@dataclass(frozen=True, order=True)
class Leftover:
    """One thing without an owner; equal ones are the same thing.

    Attributes:
        kind: ``process``, ``cgroup``, ``link``, ``mount``, ``folder`` or ``file``.
        name: pid and start time, path, or name.
        what: for people.
    """

    kind: str
    name: str
    what: str = field(compare=False, default="")


@dataclass(frozen=True)
class Journal:
    """What agents know.

    Attributes:
        agent: one of this name lives.
        sandboxes: those whose PID 1 lives, that a living agent is making, or that are pods: id → (its pid, its link), as far as known.
    """

    agent: bool
    sandboxes: dict[str, tuple[int, str]]


def journal(settings: Settings, *, agent: bool) -> Journal:
    """Read what the agent of these settings has written down."""
    known: dict[str, tuple[int, str]] = {}
    folders = _folders(settings.runtime_folder / "sandboxes")
    for path in _groups(settings):
        # By the word of its own PID 1: the folder may be elsewhere than these settings say.
        folders += [folder / path.name for pid in _pids(path) if (folder := _sandboxes_of(pid)) is not None]
    for folder in folders:
        record = factory.read_record(folder)
        if record is not None and record.init.alive():
            known[folder.name] = (record.init.pid, record.link.name)
        elif record is None and agent and folder.exists():
            known.setdefault(folder.name, (0, ""))
    for folder in _folders(settings.runtime_folder / "pods"):
        # The next agent of a Kubernetes node looks which of them live, and the pager serves them until then.
        known.setdefault(folder.name, (0, ""))
    return Journal(agent, known)


def agent_lives(settings: Settings, what: str = "node_name") -> bool:
    """Whether an agent has this node's name, or its bridge."""
    claim = f"@{claim_name(what, getattr(settings.agent, what))}"
    return any(line.rpartition(" ")[2] == claim for line in read_or_empty(Path("/proc/net/unix")).splitlines())


def claim_name(what: str, name: str) -> str:
    """The abstract socket that the agent holds that has this bridge or node name."""
    return f"thaw-agent-{what}-{name}"


@contextlib.contextmanager
def alone(settings: Settings) -> Iterator[bool]:
    """Be in the place of the node's agent for the length of a block, so that none begins meanwhile; False: one lives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        try:
            claim.bind(f"\0{claim_name('node_name', settings.agent.node_name)}")
        except OSError:
            yield False
        else:
            yield True


def look(settings: Settings, *, agent: bool, processes: bool = True) -> set[Leftover]:
    """All things that nobody has written down, at this moment.

    Args:
        settings: of the node's agent.
        agent: it lives.
        processes: also look at every process of the machine, which takes tens of ms.
    """
    known = journal(settings, agent=agent)
    found = {*_cgroups(settings, known), *_links(settings, known), *_mounts(settings), *_files(settings, known)}
    found.update(_processes_in_cgroups(settings, known))
    if processes:
        found.update(_processes(settings, known))
    return found


def remove(item: Leftover) -> None:
    """Remove one thing; no error when it is gone.

    Raises:
        OSError: it cannot be removed.
    """
    match item.kind:
        case "process":
            _kill(item.name)
        case "cgroup":
            for pid in _pids(Path(item.name)):
                _kill(_name_of(pid))
            cgroup.Cgroup([(cgroup.Hierarchy(Path(item.name).parent, 1, frozenset()), Path(item.name))]).remove()
        case "link":
            with Netlink() as connection, contextlib.suppress(OSError):
                connection.request(netlink.no_link(socket.if_nametoindex(item.name)))
        case "mount":
            _unmount(item.name)
        case "folder":
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(item.name)
        case "file":
            Path(item.name).unlink(missing_ok=True)


def order(items: Collection[Leftover]) -> list[Leftover]:
    """In which order they can be removed: nothing before what is in it."""
    kinds = ("process", "mount", "cgroup", "link", "file", "folder")
    return sorted(items, key=lambda item: (kinds.index(item.kind), -item.name.count("/"), item.name))


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and path.name != factory.MOUNT_POINT)
    except OSError:
        return []


def _groups(settings: Settings) -> list[Path]:
    return [path for base in _bases(settings) for path in _folders(base)]


def _bases(settings: Settings) -> list[Path]:
    return [item.path / f"thaw-{settings.agent.node_name}" for item in cgroup.hierarchies()]


def _sandboxes_of(pid: int) -> Path | None:
    """The folder of sandboxes that a process is the PID 1 of one of."""
    for argument in read_or_empty(Path(f"/proc/{pid}/cmdline")).split("\0"):
        if argument.endswith(f"/sandboxes/{factory.MOUNT_POINT}"):
            return Path(argument).parent
    return None


def _group_of(pid: int, settings: Settings) -> str:
    """The sandbox in whose cgroup a process is."""
    found = re.search(rf"/thaw-{re.escape(settings.agent.node_name)}/([^/\n]+)$", read_or_empty(Path(f"/proc/{pid}/cgroup")), re.MULTILINE)
    return found[1] if found else ""


def _cgroups(settings: Settings, known: Journal) -> Iterator[Leftover]:
    for path in _groups(settings):
        if path.name not in known.sandboxes:
            yield Leftover("cgroup", str(path), f"of sandbox {path.name}")
    if not known.agent and not known.sandboxes:
        yield from (Leftover("cgroup", str(base), "of the node's agent") for base in _bases(settings) if base.is_dir())


def _processes_in_cgroups(settings: Settings, known: Journal) -> Iterator[Leftover]:
    for path in _groups(settings):
        if path.name not in known.sandboxes:
            for pid in _pids(path):
                yield from _process(pid, f"in the cgroup of sandbox {path.name}")


def _processes(settings: Settings, known: Journal) -> Iterator[Leftover]:
    """PID 1 of sandboxes that are not in the journal, and a pager that serves nobody."""
    sandboxes = settings.runtime_folder / "sandboxes"
    ours = {pid for pid, _ in known.sandboxes.values()}
    idle = not known.agent and not known.sandboxes
    pager = _socket_inode(settings.runtime_folder / "pager.sock") if idle else ""
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        arguments = read_or_empty(folder / "cmdline").split("\0")
        if pid not in ours and _sandboxes_of(pid) == sandboxes and _group_of(pid, settings) not in known.sandboxes:
            yield from _process(pid, "PID 1 of a sandbox")
        elif pager and "agent.pager.process" in arguments and _holds(folder, pager):
            yield from _process(pid, "pager that serves nobody")


def _links(settings: Settings, known: Journal) -> Iterator[Leftover]:
    bridge = settings.agent.bridge
    try:
        index = socket.if_nametoindex(bridge)
    except OSError:
        return
    if not known.agent and agent_lives(settings, "bridge"):
        return  # an agent of another name has it
    if known.agent and any(not link for _, link in known.sandboxes.values()):
        return  # one is being made: which link is its own is not known yet
    names = {link for _, link in known.sandboxes.values()}
    with Netlink() as connection:
        links = connection.links()
    for link in links:
        if link.master == index and link.name.startswith(network.prefix(bridge)) and link.name not in names:
            yield Leftover("link", link.name, f"on {bridge}")
    if not known.agent and not known.sandboxes and any(link.name == bridge and link.kind == "bridge" for link in links):
        yield Leftover("link", bridge, "bridge without an agent")


def _mounts(settings: Settings) -> Iterator[Leftover]:
    """The agent mounts nothing in the node's own namespace."""
    ours = [f"{folder}/" for folder in (settings.runtime_folder, settings.paths.state_dir / "agent")]
    for line in read_or_empty(Path("/proc/self/mountinfo")).splitlines():
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4])
        if any(path.startswith(folder) for folder in ours):
            yield Leftover("mount", path, line.rpartition(" - ")[2].split()[0])


def _files(settings: Settings, known: Journal) -> Iterator[Leftover]:
    runtime = settings.runtime_folder
    for path in _folders(runtime / "sandboxes"):
        if path.name not in known.sandboxes:
            yield Leftover("folder", str(path), "of a sandbox")
    for path in (settings.paths.state_dir / "logs" / "instances").glob(".*"):
        if path.name[1:] not in known.sandboxes:
            yield Leftover("file", str(path), "output of a sandbox without an instance")
    if known.agent or known.sandboxes:
        return
    if settings.agent_file.exists():
        yield Leftover("file", str(settings.agent_file), "address of an agent that is gone")
    if runtime.exists():
        yield Leftover("folder", str(runtime), "sockets and records of an agent that is gone")


def _process(pid: int, what: str) -> Iterator[Leftover]:
    if name := _name_of(pid):
        command = read_or_empty(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()[:80]
        yield Leftover("process", name, f"{what}: {command}")


def _name_of(pid: int) -> str:
    """Empty when it has ended, also when nobody has looked at its end yet."""
    identity = identity_of(pid)
    return f"{pid}@{identity.start_ticks}" if identity is not None and identity.alive() else ""


def _pids(directory: Path) -> list[int]:
    return [int(line) for line in read_or_empty(directory / "cgroup.procs").split()]


def _kill(name: str) -> None:
    """SIGKILL to this very process, and wait for its end."""
    pid = int(name.partition("@")[0] or 0)
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # The descriptor holds the number: what it names now cannot be replaced by another one any more.
        if pid > 1 and _name_of(pid) == name:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not select.select([descriptor], [], [], _KILL_WAIT_S)[0]:
                raise SandboxError(f"process {pid} does not end")
    finally:
        os.close(descriptor)


def _unmount(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) and os.path.ismount(path):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _socket_inode(path: Path) -> str:
    """Of a bound Unix socket; empty when nobody has bound it."""
    for line in read_or_empty(Path("/proc/net/unix")).splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[7] == str(path):
            return fields[6]
    return ""


def _holds(process: Path, inode: str) -> bool:
    wanted = f"socket:[{inode}]"
    with contextlib.suppress(OSError):
        for item in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(item.readlink()) == wanted:
                    return True
    return False


class Sweeper:
    """The agent's own look on its timer: what was left over twice in a row is removed.

    Args:
        settings: of the agent.
        tell: is told of what was removed, and of what could not be.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._before: set[Leftover] = set()

    def sweep(self) -> int:
        """Look once more; blocks for a few ms. Returns how many things were removed."""
        found = look(self._settings, agent=True, processes=False)
        due, self._before = found & self._before, found
        removed = 0
        for item in order(due):
            try:
                remove(item)
                removed += 1
                self._tell(f"{item.kind} {item.name} had no owner and was removed ({item.what})")
            except (OSError, SandboxError) as error:
                self._tell(f"{item.kind} {item.name} has no owner and cannot be removed: {error}")
        return removed
