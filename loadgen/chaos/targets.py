"""Finds the processes of one installation by role.

In: the mark that every process of the installation has in its environment, the agent's node name. Out: pids, read from /proc at the moment
of asking. Nothing else on the machine is ever named. Used by :mod:`loadgen.chaos.faults` and :mod:`loadgen.chaos.supervision`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infra.local.parts import Part

_PAGER = "agent.pager.process"


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        pid, parent: numbers.
        state: letter of /proc/PID/stat; T: stopped.
        arguments: its command line.
        inner_pid: its number in the innermost pid namespace.
        cgroup: text of /proc/PID/cgroup.
        marked: it has the installation's mark in its environment.
    """

    pid: int
    parent: int
    state: str
    arguments: tuple[str, ...]
    inner_pid: int
    cgroup: str
    marked: bool


class Targets:
    """The processes of one installation."""

    def __init__(self, mark: str, node: str, broker: Part, store: Part) -> None:
        """Name the installation.

        Args:
            mark: in the environment of scalers, agent and pager.
            node: its agent's name.
            broker, store: parts of the embedded stack.
        """
        self._mark = mark.encode()
        self._cgroup = f"/thaw-{node}/"
        self._parts = {"broker": broker, "store": store}

    def find(self, role: str) -> list[list[int]]:
        """Everything of a role, each with its pids; empty when nothing of it runs. Takes some 10 ms; blocking."""
        if role in self._parts:
            identity = self._parts[role].identity
            return [[identity.pid]] if identity is not None and identity.alive() else []
        found = [process for process in processes(self._mark) if process.state not in "ZX"]
        if role == "instance":
            return self._instances(found)
        ours = [process for process in found if process.marked]
        pagers = {process.pid for process in ours if _PAGER in process.arguments}
        chosen = {
            "scaler": [process for process in ours if process.arguments[-1:] == ("scaler",)],
            "agent": [process for process in ours if process.arguments[-1:] == ("agent",)],
            "pager-keeper": [process for process in ours if process.pid in pagers and process.parent not in pagers],
            "pager-worker": [process for process in ours if process.pid in pagers and process.parent in pagers],
        }[role]
        return [[process.pid] for process in chosen]

    def _instances(self, found: list[Process]) -> list[list[int]]:
        """By sandbox: what runs in it, but for its PID 1, CRIU, and what is stopped: standbys."""
        by_sandbox: dict[str, list[int]] = {}
        for process in found:
            if self._cgroup not in process.cgroup or process.inner_pid == 1 or process.state == "T":
                continue
            if not any("criu" in word for word in process.arguments[:1]):
                sandbox = process.cgroup.partition(self._cgroup)[2].split()[0]
                by_sandbox.setdefault(sandbox, []).append(process.pid)
        return [pids for _, pids in sorted(by_sandbox.items())]


def processes(mark: bytes = b"") -> list[Process]:
    """Every process of this machine that can be read."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            arguments = (folder / "cmdline").read_bytes().rstrip(b"\0")
            status = (folder / "status").read_text()
            inner = next((line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")), folder.name)
            found.append(
                Process(
                    pid=int(folder.name),
                    parent=int(fields[1]),
                    state=fields[0],
                    arguments=tuple(word.decode(errors="replace") for word in arguments.split(b"\0")),
                    inner_pid=int(inner),
                    cgroup=(folder / "cgroup").read_text(),
                    marked=bool(mark) and mark in (folder / "environ").read_bytes(),
                )
            )
        except (OSError, ValueError, IndexError):
            continue  # it has just ended
    return found
