"""What Thaw needs from a host, each thing with what to do when it is missing.

In: settings, and facts from :mod:`infra.probe`. Out: a list of :class:`Check`. Next: :mod:`thaw.stack` draws it and
turns a lack into an exit code.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra import probe
from infra.errors import InstallError
from infra.local import criu, debian, ports
from infra.local.parts import parts, read_json
from infra.local.processes import identity_of
from infra.settings import Settings

#: Smallest amounts that the demo runs in: the broker, and a few functions of 512 MB of which some start cold.
MEMORY_MB = 3000
DISK_MB = 6000
OLDEST_KERNEL = (5, 11)
_NEEDED_CAPABILITIES = set(probe.CAPABILITIES) - {"SYS_RESOURCE"}


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    #: What was found.
    detail: str
    #: What to do about it; empty when it is fine.
    remedy: str = ""
    #: False: Thaw runs without it, with the loss that ``remedy`` names.
    needed: bool = True


def run(settings: Settings) -> list[Check]:
    """Look at everything. Takes about a second; changes nothing."""
    return [
        _architecture(),
        _kernel(),
        _root(),
        *_capabilities(),
        _tried("userfaultfd", probe.userfaultfd, "set sysctl vm.unprivileged_userfaultfd=1 or give CAP_SYS_PTRACE"),
        _criu(settings),
        _cgroups(),
        _tried("overlayfs", probe.overlay, "load the module: modprobe overlay"),
        _tried("bridge and veth", probe.bridge, "load the modules: modprobe bridge veth; iproute2 must be installed"),
        _connections(),
        _tried("time namespaces", probe.time_namespace, "use a kernel with CONFIG_TIME_NS"),
        *_tools(),
        _memory(),
        *_disk(settings),
        *_ports(settings),
        _addresses(settings),
    ]


def _tried(name: str, trial: Callable[[], str], remedy: str) -> Check:
    failure = trial()
    return Check(name, not failure, failure or "works", remedy if failure else "")


def _connections() -> Check:
    failure = probe.connection_states()
    remedy = "use a kernel with CONFIG_INET_DIAG; until then a released instance does not wait for the requests in progress"
    return Check("connection states", not failure, failure or "works", remedy if failure else "", needed=False)


def _architecture() -> Check:
    machine = platform.machine()
    return Check("architecture", machine == "x86_64", machine, "" if machine == "x86_64" else "use an x86_64 machine")


def _kernel() -> Check:
    release = platform.release()
    ok = probe.kernel_version(release) >= OLDEST_KERNEL
    return Check("kernel", ok, release, "" if ok else "boot a kernel of version 5.11 or newer")


def _root() -> Check:
    uid = os.geteuid()
    remedy = "" if uid == 0 else "run it as root (sudo -E): only the agent's privileges can freeze and restore"
    return Check("root", uid == 0, f"uid {uid}", remedy)


def _capabilities() -> list[Check]:
    held = probe.capabilities(Path("/proc/self/status").read_text())
    lacking = sorted(_NEEDED_CAPABILITIES - held)
    detail = f"missing: {', '.join(lacking)}" if lacking else f"all {len(_NEEDED_CAPABILITIES)} needed ones"
    remedy = "start the container with --privileged, or with --cap-add for each" if lacking else ""
    checks = [Check("capabilities", not lacking, detail, remedy)]
    if "SYS_RESOURCE" not in held:
        loss = "not needed: CRIU is patched to read limits from /proc; functions can't get more than the agent's limits"
        checks.append(Check("CAP_SYS_RESOURCE", False, "missing", loss, needed=False))
    return checks


def _criu(settings: Settings) -> Check:
    try:
        program = criu.criu_path(settings)
    except InstallError as error:
        return Check("CRIU", False, str(error), "thaw stack install")
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
    version = shown[1] if len(shown) > 1 else "unknown"
    failure = probe.trial(str(program), "check")
    if failure:
        return Check("CRIU", False, f"{version}: criu check: {failure}", "see the line above; root is needed for it")
    return Check("CRIU", version == criu.VERSION, f"{version}, criu check passes")


def _cgroups() -> Check:
    kind, memory = probe.memory_controller(Path("/proc/self/mountinfo").read_text())
    if memory is not None:
        return Check("cgroups", True, f"{kind}, memory can be limited in {memory}")
    remedy = "mount a writable cgroup tree with the memory controller; until then memory limits are not enforced"
    return Check("cgroups", False, f"{kind}, no writable memory controller", remedy, needed=False)


def _tools() -> list[Check]:
    checks = []
    for group, commands in (("compile", ["gcc"]), ("broker", ["java", "mvn"]), ("host", ["ip", "setpriv", "unshare"])):
        lacking = [command for command in commands if shutil.which(command) is None]
        detail = f"missing: {', '.join(lacking)}" if lacking else ", ".join(commands)
        remedy = f"make setup, or: apt-get install --no-install-recommends {' '.join(debian.missing(group))}"
        checks.append(Check(f"tools: {group}", not lacking, detail, remedy if lacking else ""))
    return checks


def _memory() -> Check:
    found = probe.available_mb(Path("/proc/meminfo").read_text())
    remedy = "" if found >= MEMORY_MB else f"free memory until {MEMORY_MB} MB are available"
    return Check("free memory", found >= MEMORY_MB, f"{found} MB", remedy)


def _disk(settings: Settings) -> list[Check]:
    checks = []
    for name, path in (("state", settings.paths.state_dir), ("cache", settings.paths.cache_dir)):
        found = probe.free_disk_mb(path)
        remedy = f"free {DISK_MB} MB there, or set THAW_PATHS_{name.upper()}_DIR to another disk"
        checks.append(Check(f"free disk: {name}", found >= DISK_MB, f"{found} MB for {path}", "" if found >= DISK_MB else remedy))
    return checks


def _ports(settings: Settings) -> list[Check]:
    wanted = [("stack.kafka_port", settings.stack.kafka_port, _own_stack(settings, "kafka"))]
    wanted.append(("stack.s3_port", settings.stack.s3_port, _own_stack(settings, "s3")))
    wanted.append(("agent.listen_port", settings.agent.listen_port, _own_agent(settings)))
    checks = []
    for name, port, own in wanted:
        if port == 0:
            checks.append(Check(f"port: {name}", True, "any free one"))
        elif own or ports.is_free(port):
            checks.append(Check(f"port: {name}", True, f"{port}, {'in use by Thaw itself' if own else 'free'}"))
        else:
            remedy = f"stop it, or set THAW_{name.upper().replace('.', '_')} to another port (0: any)"
            checks.append(Check(f"port: {name}", False, f"{port} is taken by {ports.holder(port)}", remedy))
    return checks


def _own_stack(settings: Settings, name: str) -> bool:
    return any(part.alive for part in parts(settings) if part.name == name)


def _own_agent(settings: Settings) -> bool:
    pid = read_json(settings.agent_file).get("pid")
    identity = identity_of(pid) if isinstance(pid, int) else None
    return identity is not None and identity.alive()


def _addresses(settings: Settings) -> Check:
    subnet = settings.agent.subnet
    clashes = probe.overlapping_routes(Path("/proc/net/route").read_text(), subnet, settings.agent.bridge)
    if clashes:
        remedy = "set THAW_AGENT_SUBNET to a network that this host has no route to"
        return Check("instance addresses", False, f"{subnet} overlaps {', '.join(clashes)}", remedy)
    return Check("instance addresses", True, f"{subnet} is unused")
