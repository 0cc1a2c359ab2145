"""A hostile function: runs inside a sandbox and tries what it must not be able to do. Standard library only.

In: ``GET /attacks?name=value&…``: addresses and names that an attacker may know (see :data:`GIVEN`). Out: JSON, attempt to what came of it:
``refused: …`` with the kernel's word, or ``SUCCEEDED: …``. Each attempt is made by a child of its own.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

#: What the caller tells: addresses are comma-separated ``host:port``.
GIVEN: dict[str, str] = {}
LIMIT_S = 8
libc = ctypes.CDLL(None, use_errno=True)
ATTACKS: dict[str, Callable[[], str]] = {}
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID = 0x20000, 0x10000000, 0x40000000, 0x20000000


def attack(function: Callable[[], str]) -> Callable[[], str]:
    ATTACKS[function.__name__] = function
    return function


def syscall(number: int, *arguments: object) -> int:
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def targets(name: str) -> list[tuple[str, int]]:
    return [(host, int(port)) for host, _, port in (item.rpartition(":") for item in GIVEN.get(name, "").split(",") if item)]


def any_of(attempts: list[Callable[[], str]]) -> str:
    """All of them must fail; the last failure is told."""
    last: OSError | None = None
    for attempt in attempts:
        try:
            return attempt()
        except OSError as error:
            last = error
    if last is None:
        raise OSError(errno.ENOENT, "nothing was there to try")
    raise last


def connect_any(name: str) -> str:
    def to(host: str, port: int) -> str:
        with socket.create_connection((host, port), 0.5):
            return f"connected to {host}:{port}"

    return any_of([lambda where=where: to(*where) for where in targets(name)])


# The network


@attack
def agent_port() -> str:
    return connect_any("agent")


@attack
def store_and_broker() -> str:
    return connect_any("services")


@attack
def any_port_of_the_node() -> str:
    return connect_any("node")


@attack
def other_instance() -> str:
    return connect_any("peers")


@attack
def metadata_address() -> str:
    with socket.create_connection(("169.254.169.254", 80), 0.5):
        return "connected"


@attack
def node_by_ipv6() -> str:
    host, _, port = GIVEN["ipv6"].rpartition(":")
    with socket.socket(socket.AF_INET6) as client:
        client.settimeout(1)
        client.connect((host, int(port), 0, socket.if_nametoindex("eth0")))
        return "connected"


@attack
def node_by_udp() -> str:
    host, _, port = GIVEN["udp"].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.connect((host, int(port)))
        client.send(b"ping")
        return f"answered {client.recv(100)!r}"


@attack
def raw_packets() -> str:
    return any_of(
        [
            lambda: str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))),
            lambda: str(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))),
            lambda: str(socket.socket(socket.AF_INET, socket.SOCK_RAW, 6)),
            lambda: str(socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58)),
        ]
    )


@attack
def another_route_or_neighbour() -> str:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as client:
        client.settimeout(1)
        route = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 4, 0, 1, 0) + struct.pack("=HHI", 8, 4, socket.if_nametoindex("eth0"))
        client.send(struct.pack("=IHHII", 16 + len(route), 24, 0x605, 1, 0) + route)
        code = struct.unpack_from("=i", client.recv(4096), 16)[0]
        if code:
            raise OSError(-code, os.strerror(-code))
        return "a default route"


@attack
def abstract_sockets() -> str:
    def to(name: str, kind: int) -> str:
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect("\0" + name)
            return f"connected to @{name}"

    return any_of([lambda name=name, kind=kind: to(name, kind) for name in GIVEN["abstract"].split(",") for kind in (1, 2, 5)])


@attack
def sockets_in_the_filesystem() -> str:
    def to(name: str, kind: int) -> str:
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(name)
            return f"connected to {name}"

    return any_of([lambda name=name, kind=kind: to(name, kind) for name in GIVEN["sockets"].split(",") for kind in (1, 2, 5)])


# Files of others


@attack
def files_of_the_node() -> str:
    def read(path: str) -> str:
        if os.path.isdir(path):
            return f"listed {path}: {os.listdir(path)}"
        with open(path, "rb") as file:
            return f"read {path}: {file.read(60)!r}"

    return any_of([lambda path=path: read(path) for path in GIVEN["files"].split(",")])


@attack
def environment_of_others() -> str:
    def look(path: str) -> str:
        if path.endswith("/fd"):
            return f"{path}: {os.listdir(path)}"
        if "/ns/" in path:
            return f"{path}: {os.readlink(path)}"
        with open(path, "rb") as file:
            return f"{path}: {file.read(20)!r}"

    others = [name for name in os.listdir("/proc") if name.isdigit() and os.stat(f"/proc/{name}").st_uid != os.getuid()]
    files = ("environ", "mem", "maps", "root/etc/hostname", "cwd/etc/hostname", "fd", "ns/net")
    return any_of([lambda path=f"/proc/{name}/{file}": look(path) for name in others for file in files])


@attack
def processes_of_others() -> str:
    seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    strangers = [pid for pid in seen if open(f"/proc/{pid}/comm").read().strip() not in ("thaw-init", "python3", "criu")]
    if strangers:
        return f"sees {[(pid, open(f'/proc/{pid}/comm').read()) for pid in strangers]}"
    raise OSError(errno.ESRCH, f"sees {len(seen)} processes, all of its own sandbox")


@attack
def write_to_the_root_below() -> str:
    def write(path: str) -> str:
        with open(path, "ab") as file:
            file.write(b"hostile")
        return f"wrote {path}"

    paths = [
        "/etc/passwd",
        "/srv/hostile.py",
        "/run/thaw/instance.json",
        "/usr/bin/hostile",
        "/sbin/init",
        "/dev/sda",
        "/dev/mem",
        "/run/x",
    ]
    return any_of([lambda path=path: write(path) for path in paths])


# Processes


@attack
def kill_pid_1() -> str:
    os.kill(1, signal.SIGKILL)
    return "sent"


@attack
def trace_pid_1() -> str:
    return any_of(
        [
            lambda: f"attached: {checked(libc.ptrace(16, 1, 0, 0))}",
            lambda: f"seized: {checked(libc.ptrace(0x4206, 1, 0, 0))}",
            lambda: f"read: {read_of(1)}",
            lambda: f"pidfd_getfd: {syscall(438, os.pidfd_open(1), 0, 0)}",
        ]
    )


def read_of(pid: int) -> int:
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    mine, theirs = Vector(ctypes.addressof(buffer), 8), Vector(0x400000, 8)
    return checked(libc.process_vm_readv(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))


# Privileges


@attack
def capabilities() -> str:
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    held = {name: fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(fields[name], 16)}
    if held or fields["NoNewPrivs"] != "1" or os.getuid() == 0:
        return f"{held} NoNewPrivs {fields['NoNewPrivs']} uid {os.getuid()}"
    raise OSError(errno.EPERM, "no capability in any set, no new privileges")


@attack
def mount() -> str:
    return any_of(
        [
            lambda: f"mount: {checked(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))}",
            lambda: f"remount: {checked(libc.mount(None, b'/', None, 32, None))}",
            lambda: f"umount: {checked(libc.umount2(b'/run', 2))}",
            lambda: f"open_tree: {syscall(428, -100, b'/', 1)}",
            lambda: f"fsopen: {syscall(430, b'tmpfs', 0)}",
        ]
    )


@attack
def new_user_namespace() -> str:
    flags = (CLONE_NEWUSER, CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET, CLONE_NEWNET, CLONE_NEWPID)
    return any_of([lambda flag=flag: f"unshare {flag:x}: {checked(libc.unshare(flag))}" for flag in flags] + [clone_user, clone3_user])


def clone_user() -> str:
    pid = syscall(56, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return f"clone: {pid}"


def clone3_user() -> str:
    pid = syscall(435, struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if pid == 0:
        os._exit(0)
    return f"clone3: {pid}"


@attack
def join_a_namespace() -> str:
    return any_of(
        [
            lambda name=name: f"{name}: {checked(libc.setns(os.open(f'/proc/1/ns/{name}', os.O_RDONLY), 0))}"
            for name in ("net", "mnt", "pid")
        ]
    )


@attack
def devices() -> str:
    kinds = ((0o020666, 1, 1), (0o060666, 8, 0), (0o020666, 10, 229))
    return any_of([lambda kind=kind: f"mknod: {os.mknod('/tmp/device', kind[0], os.makedev(*kind[1:]))}" for kind in kinds])


@attack
def userfaultfd_of_the_kernel() -> str:
    return f"descriptor {syscall(323, 0)}"


@attack
def io_uring() -> str:
    return f"descriptor {syscall(425, 4, ctypes.create_string_buffer(120))}"


@attack
def bpf_and_perf() -> str:
    attributes = ctypes.create_string_buffer(128)
    struct.pack_into("=II", attributes, 0, 1, 128)
    return any_of(
        [
            lambda: f"bpf map: {syscall(321, 0, struct.pack('=IIII', 2, 4, 4, 1) + bytes(112), 128)}",
            lambda: f"perf of the node: {syscall(298, attributes, -1, 0, -1, 0)}",
        ]
    )


@attack
def keys_shared_with_others_of_this_user() -> str:
    return any_of([lambda: f"add_key: {syscall(248, b'user', b'thaw', b'secret', 6, -4)}", lambda: f"keyctl: {syscall(250, 0, -4, 1)}"])


@attack
def kernel_settings() -> str:
    def write(path: str) -> str:
        with open(path, "w") as file:
            file.write("1")
        return f"wrote {path}"

    paths = ["/proc/sys/kernel/core_pattern", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/vm/overcommit_memory", "/proc/sysrq-trigger"]
    paths += ["/proc/sys/kernel/ns_last_pid", "/proc/1/oom_score_adj"]
    return any_of([lambda path=path: write(path) for path in paths])


@attack
def hostname() -> str:
    return any_of(
        [
            lambda: f"{checked(libc.sethostname(b'x', 1))}",
            lambda: f"clock: {time.clock_settime(time.CLOCK_REALTIME, 0)}",
            lambda: f"chroot: {os.chroot('/tmp')}",
            lambda: f"priority: {os.setpriority(os.PRIO_PROCESS, 0, -5)}",
        ]
    )


# Limits


@attack
def cgroup_files() -> str:
    def write(path: Path) -> str:
        path.write_text("max")
        return f"wrote {path}"

    groups = Path("/sys/fs/cgroup")
    seen_by_pid_1 = Path("/proc/1", "root", *groups.parts[1:])
    found = [path for top in (groups, seen_by_pid_1) for path in top.glob("*/thaw-*/*/memory.limit_in_bytes")]
    return any_of([lambda path=path: write(path) for path in [*found, groups / "memory" / "memory.limit_in_bytes"]])


@attack
def more_processes_than_allowed() -> str:
    made = []
    try:
        while len(made) < int(GIVEN["pids"]) + 20:
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            made.append(pid)
        return f"{len(made)} processes"
    finally:
        for pid in made:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@attack
def more_files_than_memory() -> str:
    """The writable layer is memory; its own limit ends whoever fills it, or the write."""
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this one than the server
        try:
            with open("/tmp/full", "wb") as file:
                for _ in range(int(GIVEN["memory_mb"]) + 64):
                    file.write(bytes(1 << 20))
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    Path("/tmp/full").unlink(missing_ok=True)
    if status == 0:
        return "wrote more than the limit"
    raise OSError(status if status > 0 else errno.ENOMEM, f"ended with {status}")


@attack
def output_without_end() -> str:
    """Standard output is a file of the node."""
    end = os.fstat(1)
    if os.path.realpath("/proc/self/fd/1").startswith("pipe:"):
        raise OSError(errno.EPIPE, "a pipe")
    return any_of(
        [
            lambda: f"longer: {os.ftruncate(1, 1 << 40)}",
            lambda: f"read: {os.open('/proc/self/fd/1', os.O_RDONLY)}",
            lambda: f"rights: {os.fchmod(1, 0o777)}",
            lambda: f"size: {end.st_size} written at: {far_write()}",
        ]
    )


def far_write() -> int:
    import fcntl

    fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) & ~os.O_APPEND)
    return os.pwrite(1, b"x", 1 << 40)


@attack
def inherited_descriptors() -> str:
    known = {"/dev/null"}
    strange = []
    for name in os.listdir("/proc/self/fd"):
        try:
            to = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if to not in known and not to.startswith(("socket:", "pipe:", "/proc/")) and int(name) > 2:
            strange.append(f"{name} -> {to}")
    if strange:
        return "; ".join(strange)
    raise OSError(errno.EBADF, "only its own")


def run(name: str) -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            said = f"SUCCEEDED: {ATTACKS[name]()}"
        except OSError as error:
            said = f"refused: {errno.errorcode.get(error.errno or 0, error.errno)} {error}"
        except BaseException as error:
            said = f"BROKEN: {type(error).__name__}: {error}"
        os.write(write, said.encode()[:60000])
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + LIMIT_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read)
            return f"refused: ETIMEDOUT nothing came of it in {LIMIT_S} s"
        time.sleep(0.005)
    with os.fdopen(read, "rb") as answer:
        return answer.read().decode(errors="replace") or "BROKEN: the attempt died"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/attacks":
            GIVEN.update(parse_qsl(url.query))
            body = json.dumps({name: run(name) for name in ATTACKS})
        elif url.path == "/plant":
            body = json.dumps(plant())
        elif url.path == "/log":
            body = json.dumps(log(int(dict(parse_qsl(url.query))["mb"])))
        else:
            body = json.dumps(
                {"files": sorted(str(path) for path in Path("/tmp").rglob("*")), "limits": resource.getrlimit(resource.RLIMIT_FSIZE)}
            )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


def plant() -> list[str]:
    """Files that a careless archiver would follow, read without end, or make again with rights."""
    if os.path.exists("/tmp/p"):
        return sorted(os.listdir("/tmp/p"))  # asked again after a restore
    os.makedirs("/tmp/p/deep")
    os.symlink("/etc/shadow", "/tmp/p/shadow")
    os.symlink("../../../../../etc", "/tmp/p/up")
    os.symlink("/proc/self/environ", "/tmp/p/environ")
    os.mkfifo("/tmp/p/pipe")
    with open("/tmp/p/own", "w") as file:
        file.write("x")
    os.link("/tmp/p/own", "/tmp/p/linked")
    os.chmod("/tmp/p/own", 0o6777)
    with open("/tmp/p/bad\udcff\nname", "w") as file:
        file.write("y")
    server = socket.socket(socket.AF_UNIX)
    server.bind("/tmp/p/socket")
    server.close()
    return sorted(os.listdir("/tmp/p"))


def log(mb: int) -> str:
    try:
        for _ in range(mb):
            os.write(1, b"x" * (1 << 20))
    except OSError as error:
        return f"refused: {errno.errorcode[error.errno or 0]}"
    return "SUCCEEDED"


if __name__ == "__main__":
    ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1]) if len(sys.argv) > 1 else 8080), Handler).serve_forever()
