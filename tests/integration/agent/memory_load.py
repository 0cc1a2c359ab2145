"""A server that does everything with its memory, two instances of it, and clients that ask them all the time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from agent.api.function import Function
from agent.api.messages import CheckpointPublished, MakeCheckpoint, StartDone
from tests.integration.agent.harness import AgentUnderTest, a_function

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

    @contextlib.asynccontextmanager
    async def asking(self, clients: int) -> AsyncIterator[None]:
        """For as long as the body runs."""
        tasks = [asyncio.create_task(asyncio.to_thread(self.client, number)) for number in range(clients)]
        try:
            yield
        finally:
            self.running = False
            await asyncio.gather(*tasks)


def a_busy_function(folder: Path, name: str) -> Function:
    function = a_function(folder, name)
    (folder / f"{name}.py").write_text(SERVER)
    return function


async def two_restored(agent: AgentUnderTest, function: Function) -> list[StartDone]:
    published = await agent.call(MakeCheckpoint, function=function)
    assert isinstance(published, CheckpointPublished), published
    reports = [await agent.start_instance(function) for _ in range(2)]
    assert [report.record.start_mode for report in reports] == ["restore"] * 2
    return reports
