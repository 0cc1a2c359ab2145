"""Instances restored by CRIU while the pager's worker is killed again and again: no wrong answer, no thread that hangs, no leak."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from agent.api.messages import CheckpointPublished, MakeCheckpoint, Release, StartDone
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, a_function, host_leftovers, running_agent

pytestmark = [pytest.mark.root, pytest.mark.stack]
KILLS = int(os.environ.get("THAW_TEST_PAGER_KILLS", "12"))

#: Answers ``true`` when every page it looks at is as it should be after what it did with its memory.
SERVER = """
import ctypes, http.server, json, mmap, os, struct, sys, threading, urllib.parse
PAGE, COUNT = 4096, 8000
libc = ctypes.CDLL(None, use_errno=True)
for name in ("mmap", "mremap"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def page(seed): return struct.pack("<Q", seed) * 512
def fresh(first, count):
    address = libc.mmap(None, count * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(address, b"".join(page(first + n) for n in range(count)), count * PAGE)
    return address
def right(address, first, count): return ctypes.string_at(address, count * PAGE) == b"".join(page(first + n) for n in range(count))
BLOCKS = [bytes(page(n + 1)) for n in range(COUNT)]
AREAS = [fresh(n * 1000, 16) for n in range(300)]
LOCK = threading.Lock()
def work(kind, n):
    if kind == "read": return all(BLOCKS[(n * 37 + step) % COUNT] == page((n * 37 + step) % COUNT + 1) for step in range(0, 200, 9))
    if kind == "fork":
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            ok = work("read", n + 1)
            os.write(write_fd, b"y" if ok else b"n"); os._exit(0)
        os.close(write_fd); said = os.read(read_fd, 1); os.close(read_fd); os.waitpid(pid, 0)
        return said == b"y"
    with LOCK:
        if not AREAS: return True
        index = len(AREAS) - 1; address = AREAS.pop()
    first = index * 1000
    if kind == "drop":
        libc.madvise(address + 4 * PAGE, 4 * PAGE, mmap.MADV_DONTNEED)
        dropped = ctypes.string_at(address + 4 * PAGE, 4 * PAGE) == bytes(4 * PAGE)
        return dropped and right(address, first, 4) and right(address + 8 * PAGE, first + 8, 8)
    if kind == "move":
        target = libc.mremap(address, 16 * PAGE, 64 * PAGE, 1)
        ok = right(target, first, 16) and ctypes.string_at(target + 16 * PAGE, 48 * PAGE) == bytes(48 * PAGE)
        libc.munmap(target, 64 * PAGE); return ok
    if kind == "unmap":
        libc.munmap(address + 8 * PAGE, 8 * PAGE)
        other = libc.mmap(address + 8 * PAGE, 8 * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        ok = right(address, first, 8) and ctypes.string_at(other, 8 * PAGE) == bytes(8 * PAGE)
        libc.munmap(other, 8 * PAGE); return ok
    return False
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        n = int(url.query or 0)
        kind = ("read", "fork", "drop", "move", "unmap")[n % 5] if url.path == "/work" else "read"
        body = json.dumps([kind, work(kind, n)]).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
Server(("0.0.0.0", 8080), Handler).serve_forever()
"""


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def pager_of(agent: AgentUnderTest) -> tuple[int, int]:
    """Keeper and worker."""
    assert agent.process is not None
    keeper = next(pid for pid in children(agent.process.pid) if b"agent.pager.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
    found = children(keeper)
    return keeper, found[0] if found else 0


class Load:
    """Requests of a few clients to a few instances."""

    def __init__(self, reports: list[StartDone]) -> None:
        self.addresses = [report.instance.address for report in reports]
        self.wrong: list[str] = []
        self.right = 0
        self.slowest_s = 0.0
        self.running = True

    def client(self, number: int) -> None:
        turn = number
        while self.running:
            address = self.addresses[turn % len(self.addresses)]
            begun = time.monotonic()
            try:
                with urllib.request.urlopen(f"http://{address}/work?{turn}", timeout=20) as answer:
                    kind, ok = json.loads(answer.read())
                if ok:
                    self.right += 1
                else:
                    self.wrong.append(f"{kind} {turn}")
            except OSError as error:
                self.wrong.append(f"{turn}: {error!r}")
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            turn += 7


async def test_the_worker_is_killed_under_load(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "pagerload")
    (tmp_path / "pagerload.py").write_text(SERVER)
    async with running_agent(stack_settings, tmp_path / "pagerload") as agent:
        published = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(published, CheckpointPublished), published
        reports = [await agent.start_instance(function) for _ in range(2)]
        assert [report.record.start_mode for report in reports] == ["restore"] * 2
        keeper, _ = pager_of(agent)
        before = len(os.listdir(f"/proc/{keeper}/fd"))
        load = Load(reports)
        clients = [asyncio.create_task(asyncio.to_thread(load.client, number)) for number in range(6)]
        killed: set[int] = set()
        try:
            for _ in range(KILLS):
                await asyncio.sleep(0.15)
                while (worker := pager_of(agent)[1]) == 0 or worker in killed:
                    await asyncio.sleep(0.002)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            third = await agent.start_instance(function)
            assert third.record.start_mode == "restore", "a restore after, and during, all this"
        finally:
            load.running = False
            await asyncio.gather(*clients)
        assert load.wrong == [] and load.right > 50
        print(f"{len(killed)} kills, {load.right} right answers, slowest {load.slowest_s:.2f} s")
        assert load.slowest_s < 5
        await agent.call(Release, instance=third.instance.instance)
        await asyncio.sleep(2.5)
        assert pager_of(agent)[0] == keeper and len(os.listdir(f"/proc/{keeper}/fd")) <= before
        await agent.stop()
    assert host_leftovers(agent) == []
