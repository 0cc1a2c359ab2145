"""The PID 1 of placeholder pods and the entry into them, without a cluster: in namespaces of unshare(1)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import agent.sandbox
from agent.errors import SandboxError
from agent.sandbox.pod import Pod, PodRecord, PodSandbox
from agent.sandbox.protocol import Process
from infra.local import native
from infra.local.processes import Identity, identity_of
from infra.settings import load

pytestmark = pytest.mark.root
Make = Callable[..., Awaitable[PodSandbox]]


class Told:
    """Remembers what the cluster would be told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def answers(self, pod: Pod) -> None:
        self.words.append("answers")

    def holds(self, pod: Pod, what: str) -> None:
        self.words.append(what)

    def waits(self, pod: Pod) -> None:
        self.words.append("waits")

    def ended(self, pod: Pod) -> None:
        self.words.append("ended")

    async def unrouted(self, pod: Pod) -> None:
        self.words.append("unrouted")


def program(name: str) -> Path:
    return native.build(Path(agent.sandbox.__file__).with_name(name), load().paths.cache_dir)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def make(tmp_path: Path, told: Told) -> AsyncIterator[Make]:
    """Makes placeholders of a command, as user 65534."""
    made: list[subprocess.Popen[bytes]] = []
    inits: list[Identity] = []

    async def one(*command: str) -> PodSandbox:
        words = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts", "--kill-child", "--"]
        words += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--", str(program("placeholder.c"))]
        process = subprocess.Popen([*words, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        made.append(process)
        init = 0
        for _ in range(200):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "thaw-init\n":
                init = int(children[0])
                break
            await asyncio.sleep(0.01)
        identity = identity_of(init)
        assert identity is not None
        inits.append(identity)
        folder = tmp_path / f"pod-{len(made)}"
        folder.mkdir(exist_ok=True)
        pod = Pod("space", "name", f"uid-{len(made)}", "function", "digest", "127.0.0.1", "container", "image")
        sandbox = PodSandbox(PodRecord(pod, identity), folder, program("enter.c"), told)
        await sandbox.greet()
        return sandbox

    yield one
    for identity in inits:  # whose parent's end they don't notice: what it was to send is forgotten when the user changes
        if identity.alive():
            os.kill(identity.pid, signal.SIGKILL)
    for process in made:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def start(sandbox: PodSandbox, tmp_path: Path) -> int:
    return (await sandbox.start_application(Process([], {}, "/"), tmp_path / "log", donor=False)).pid


async def eventually(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_the_command_gets_a_high_pid_and_its_end_is_reported(make: Make, tmp_path: Path) -> None:
    sandbox = await make("/bin/sh", "-c", "exit 7")
    ends: list[tuple[int, int]] = []
    sandbox.on_exit = lambda pid, status: ends.append((pid, status))
    pid = await start(sandbox, tmp_path)
    assert pid >= 1000
    await eventually(lambda: ends)
    assert ends == [(pid, 7 << 8)] and sandbox.ended(pid) == 7 << 8
    assert not sandbox.gone.done(), "it never answered: the container goes on"


async def test_the_container_ends_with_a_complete_instance(make: Make, tmp_path: Path, told: Told) -> None:
    sandbox = await make("/bin/sh", "-c", "sleep 0.3; exit 7")
    sandbox.complete(await start(sandbox, tmp_path))
    await asyncio.wait_for(sandbox.gone, 5)
    assert told.words == ["answers"]


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_request_to_end_reaches_all_and_stopped_ones_do_not_delay_it(make: Make, tmp_path: Path, stopped: bool) -> None:
    sandbox = await make("/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
    await start(sandbox, tmp_path)
    if stopped:
        sandbox.signal_all(signal.SIGSTOP)
        children = Path(f"/proc/{sandbox.init_pid}/task/{sandbox.init_pid}/children")
        await eventually(lambda: state(int(children.read_text().split()[0])) == "T")
    os.kill(sandbox.init_pid, signal.SIGTERM)
    await asyncio.wait_for(sandbox.gone, 5)


async def test_tools_run_inside_as_root_and_are_reaped_there(make: Make, tmp_path: Path) -> None:
    sandbox = await make("/bin/sleep", "60")
    script = 'import os; link = os.readlink("/proc/self/ns/net"); say = f"{os.getpid()} {os.getuid()} {link} "'
    script += "; os.write(100, say.encode() + os.read(101, 99))"
    out, given = tmp_path / "out", tmp_path / "given"
    given.write_text("a line\n")
    python = os.open("/usr/bin/python3", os.O_RDONLY | os.O_CLOEXEC)
    # Numbers that are those the tool shall have, in the wrong order.
    first, second = os.open(given, os.O_RDONLY), os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(first, 100)
    os.dup2(second, 101)
    try:
        assert await sandbox.run_tool(python, ["python3", "-c", script], [101, 100], 5) == 0
    finally:
        for fd in (python, first, second, 100, 101):
            os.close(fd)
    pid, user, network, *said = out.read_text().split()
    assert int(pid) < 100 and user == "0" and said == ["a", "line"]
    assert network == str(Path(f"/proc/{sandbox.init_pid}/ns/net").readlink())
    assert Path(f"/proc/{sandbox.init_pid}/task/{sandbox.init_pid}/children").read_text() == ""


async def test_another_agent_goes_on_where_one_was(make: Make, tmp_path: Path, told: Told) -> None:
    sandbox = await make("/bin/sh", "-c", "exit 3")
    pid = await start(sandbox, tmp_path)
    await eventually(lambda: sandbox.ended(pid) is not None)
    identity = identity_of(sandbox.init_pid)
    assert identity is not None
    sandbox.close()
    later = PodSandbox(PodRecord(sandbox.pod, identity), tmp_path, program("enter.c"), told)
    await later.greet()
    await eventually(lambda: later.ended(pid) == 3 << 8)
    later.close()


async def test_what_is_no_placeholder_is_refused(tmp_path: Path, told: Told) -> None:
    process = subprocess.Popen(["/bin/sleep", "60"])
    try:
        identity = identity_of(process.pid)
        assert identity is not None
        pod = Pod("space", "name", "uid", "function", "digest", "127.0.0.1", "container", "image")
        with pytest.raises(SandboxError, match="space/name is no placeholder"):
            PodSandbox(PodRecord(pod, identity), tmp_path, program("enter.c"), told)
    finally:
        process.kill()
        process.wait()


def test_it_does_not_run_where_it_would_signal_everybody() -> None:
    done = subprocess.run([program("placeholder.c"), "/bin/true"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not PID 1" in done.stderr


def test_it_installs_itself(tmp_path: Path) -> None:
    subprocess.run([program("placeholder.c"), "--install", str(tmp_path / "init")], check=True)
    assert (tmp_path / "init").read_bytes() == program("placeholder.c").read_bytes()
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o555
