"""A function that does to its memory what a pager has to follow, and checks each byte of it: a server, and what it must answer.

In: ``GET /do?row=N``; the row chooses a slab of memory and what is done to it. Out: JSON with a digest of the slab afterwards. A slab's
content follows from its number and from the token drawn at start-up. Each operation leaves it as it was, so that they may come in any
order and at once. Run as a program it is the server (standard library only); imported it is :func:`value`.
"""

import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PAGE = 4096
SLABS = 512
SLAB_PAGES = 16
SIZE = SLAB_PAGES * PAGE
HALF = SIZE // 2
BLANK_PAGES = 4096
BIG_BYTES = 4 << 20
MAP_FIXED, MREMAP_MAYMOVE, MREMAP_FIXED, PROT_NONE, MADV_DONTNEED = 0x10, 1, 2, 0, 4
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p


def content(token: str, slab: int) -> bytes:
    return b"".join(hashlib.sha256(f"{token}:{slab}:{page}".encode()).digest() * (PAGE // 32) for page in range(SLAB_PAGES))


def slab_of(row: int) -> int:
    return row * 7919 % SLABS


def value(token: str, row: int) -> str:
    """What the answer to ``row`` must hold."""
    return hashlib.sha256(content(token, slab_of(row))).hexdigest()


def map_pages(size: int, address: int = 0, protection: int = READ_WRITE) -> int:
    flags = PRIVATE | (MAP_FIXED if address else 0)
    return checked(libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), protection, flags, -1, ctypes.c_long(0)))


def checked(address: int) -> int:
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address


def remap(old: int, old_size: int, new_size: int, to: int = 0) -> int:
    flags = MREMAP_MAYMOVE | (MREMAP_FIXED if to else 0)
    return checked(
        libc.mremap(ctypes.c_void_p(old), ctypes.c_size_t(old_size), ctypes.c_size_t(new_size), ctypes.c_int(flags), ctypes.c_void_p(to))
    )


def unmap(address: int, size: int) -> None:
    if libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), "munmap")


def forget(address: int, size: int) -> None:
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")


def read(address: int, size: int = SIZE) -> bytes:
    return ctypes.string_at(address, size)


def write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


class Wrong(Exception):
    """Memory does not hold what it must."""


def expect(found: bytes, wanted: bytes, what: str) -> None:
    if found != wanted:
        page = next(at for at in range(0, len(wanted), PAGE) if found[at : at + PAGE] != wanted[at : at + PAGE])
        raise Wrong(f"{what}: page {page // PAGE} begins with {found[page : page + 16].hex()}, not {wanted[page : page + 16].hex()}")


class Slab:
    def __init__(self, number: int, token: str) -> None:
        self.number = number
        self.token = token
        self.lock = threading.Lock()
        self.address = map_pages(SIZE)
        write(self.address, self.content)

    @property
    def content(self) -> bytes:
        return content(self.token, self.number)

    def read_it(self) -> None:
        """Pages that only the image has."""

    def read_by_threads(self) -> None:
        """Many threads at once, each in an order of its own."""
        wanted, start, problems = self.content, threading.Barrier(8), []

        def look(step: int) -> None:
            start.wait()
            for index in range(SLAB_PAGES):
                at = index * step % SLAB_PAGES * PAGE
                if read(self.address + at, PAGE) != wanted[at : at + PAGE]:
                    problems.append(at)

        threads = [threading.Thread(target=look, args=(2 * number + 1,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise Wrong(f"threads saw another content at {problems[:4]}")

    def fork_twice(self) -> None:
        """Child and grandchild read pages that the parent has not touched, and write copies of their own."""
        wanted = self.content

        def grandchild() -> None:
            expect(read(self.address), wanted, "grandchild")
            write(self.address, bytes(SIZE))
            forget(self.address, HALF)
            expect(read(self.address), bytes(SIZE), "grandchild's own copy")

        def child() -> None:
            expect(read(self.address, HALF), wanted[:HALF], "child")
            in_a_fork(grandchild)
            expect(read(self.address), wanted, "child after its grandchild wrote")
            write(self.address, b"\xff" * SIZE)

        in_a_fork(child)

    def unmap_it(self) -> None:
        """Pages that were never read go; a new mapping, likely in the same place, is empty."""
        expect(read(self.address, PAGE), self.content[:PAGE], "before munmap")
        unmap(self.address, SIZE)
        self.address = map_pages(SIZE)
        expect(read(self.address), bytes(SIZE), "after munmap and mmap")
        write(self.address, self.content)

    def map_over_it(self) -> None:
        """A mapping in the middle is replaced."""
        wanted = self.content
        middle = self.address + SIZE // 4
        map_pages(HALF, middle)
        expect(read(middle, HALF), bytes(HALF), "mapped over")
        self.renew(wanted)

    def renew(self, wanted: bytes) -> None:
        """One mapping again: mremap refuses a range that a fork has left in three."""
        old, self.address = self.address, map_pages(SIZE)
        write(self.address, wanted)
        unmap(old, SIZE)

    def grow_it(self) -> None:
        """mremap to twice the size, and back."""
        self.address = remap(self.address, SIZE, 2 * SIZE)
        expect(read(self.address), self.content, "grown")
        expect(read(self.address + SIZE), bytes(SIZE), "the new half")
        write(self.address + SIZE, b"\x5a" * SIZE)
        expect(read(self.address + SIZE), b"\x5a" * SIZE, "the new half, written")
        self.address = remap(self.address, 2 * SIZE, SIZE)

    def move_it(self) -> None:
        """mremap to another place, before anything of it was read."""
        self.address = remap(self.address, SIZE, SIZE, to=map_pages(SIZE, protection=PROT_NONE))
        expect(read(self.address), self.content, "moved")

    def forget_it(self) -> None:
        """madvise(MADV_DONTNEED): zeros afterwards, not the image again."""
        wanted = self.content
        forget(self.address + HALF, HALF)
        expect(read(self.address), wanted[:HALF] + bytes(HALF), "after MADV_DONTNEED")
        write(self.address + HALF, wanted[HALF:])

    def write_part(self) -> None:
        """A write of a few bytes to a page that was not there keeps the rest of it."""
        wanted = self.content
        for at in range(100, SIZE, PAGE):
            write(self.address + at, wanted[at : at + 8])


def in_a_fork(work) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print("in a fork:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise Wrong(f"fork {pid} failed")


class Blank:
    """Memory that was mapped and never touched."""

    def __init__(self) -> None:
        self.address = map_pages(BLANK_PAGES * PAGE)
        self.written: set[int] = set()
        self.lock = threading.Lock()

    def visit(self, page: int) -> None:
        stamp = page.to_bytes(4, "little") * (PAGE // 4)
        with self.lock:
            found = read(self.address + page * PAGE, PAGE)
            expect(found, stamp if page in self.written else bytes(PAGE), f"blank page {page}")
            write(self.address + page * PAGE, stamp)
            self.written.add(page)


def allocate(byte: int) -> None:
    """Memory that did not exist at the checkpoint, in pieces so that no copy of it is needed."""
    address = map_pages(BIG_BYTES)
    for start in range(address, address + BIG_BYTES, SIZE):
        expect(read(start), bytes(SIZE), "new memory")
        write(start, bytes([byte]) * SIZE)
    for start in range(address, address + BIG_BYTES, SIZE):
        expect(read(start), bytes([byte]) * SIZE, "new memory, written")
    unmap(address, BIG_BYTES)


#: The two that take long come half as often.
OPERATIONS = [
    *(Slab.read_it, Slab.unmap_it, Slab.map_over_it, Slab.grow_it, Slab.move_it, Slab.forget_it, Slab.write_part) * 2,
    *(Slab.read_by_threads, Slab.fork_twice),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    token = ""
    slabs: list[Slab]
    blank: Blank

    def do_GET(self) -> None:
        row = int(parse_qs(urlsplit(self.path).query).get("row", ["0"])[0])
        slab = self.slabs[slab_of(row)]
        operation = OPERATIONS[row % len(OPERATIONS)]
        try:
            with slab.lock:
                operation(slab)
                digest = hashlib.sha256(read(slab.address)).hexdigest()
            self.blank.visit(row % BLANK_PAGES)
            if row % 64 == 0:
                allocate(row % 255 + 1)
            self.answer(200, {"token": self.token, "row": row, "operation": operation.__name__, "value": digest})
        except (Wrong, OSError) as error:
            self.answer(500, {"row": row, "operation": operation.__name__, "problem": str(error)})

    def answer(self, status: int, body: dict) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    Handler.token = os.urandom(16).hex()
    Handler.slabs = [Slab(number, Handler.token) for number in range(SLABS)]
    Handler.blank = Blank()
    Server(("0.0.0.0", 8080), Handler).serve_forever()
