"""A process whose memory comes from a pager, without CRIU: registers a userfaultfd, speaks CRIU's part, obeys on standard input.

usage: lazy_process.py DIRECTORY PAGES...   (DIRECTORY holds lazy-pages.socket). Page n of the image holds the number n + 1, over and over;
those divisible by 7 are zeros. Orders: check, drop A N, move, unmap A N, fork, finish. Answers: ok, or what is wrong.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

PAGE, BASE, ELSEWHERE = 4096, 0x10_0000_0000, 0x20_0000_0000
PID = 1000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def content(number: int) -> bytes:
    """Of a page of the image."""
    return struct.pack("<Q", number + 1) * 512 if (number + 1) % 7 else b"\0" * PAGE


def done(result: int) -> None:
    if result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def open_userfault(pages: int) -> int:
    fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
    done(fd)
    events = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 6)
    api = ctypes.create_string_buffer(struct.pack("QQQ", 0xAA, events, 0), 24)
    done(libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), api))
    register = ctypes.create_string_buffer(struct.pack("QQQQ", BASE, pages * PAGE, 1, 0), 32)
    done(libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), register))
    return fd


def main() -> None:
    directory, pages = sys.argv[1], int(sys.argv[2])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    done(libc.mmap(BASE, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0))
    os.chdir(directory)
    criu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    criu.connect("lazy-pages.socket")
    fd = open_userfault(pages)
    criu.send(struct.pack("<i", PID))
    socket.send_fds(criu, [b"\0"], [fd])
    os.close(fd)
    #: Address of each page that is mapped, and what it must hold.
    model = {BASE + number * PAGE: content(number) for number in range(pages)}

    def check(addresses: list[int]) -> str:
        for address in addresses:
            if ctypes.string_at(address, PAGE) != model[address]:
                return f"wrong page at {address:#x}: {ctypes.string_at(address, 16)!r}, not {model[address][:16]!r}"
        return "ok"

    print("ready", flush=True)
    for line in sys.stdin:
        order, *arguments = line.split()
        numbers = [int(item) for item in arguments]
        answer = "ok"
        if order == "finish":
            criu.send(struct.pack("<I", 0x52535446))
            criu.close()
        elif order == "check":
            first, count, step = numbers
            answer = check(sorted(model)[first : first + count : step])
        elif order == "drop":
            start, size = BASE + numbers[0] * PAGE, numbers[1] * PAGE
            done(libc.madvise(start, size, mmap.MADV_DONTNEED))
            model.update({address: b"\0" * PAGE for address in model if start <= address < start + size})
        elif order == "unmap":
            start, size = BASE + numbers[0] * PAGE, numbers[1] * PAGE
            done(libc.munmap(start, size))
            model = {address: page for address, page in model.items() if not start <= address < start + size}
        elif order == "move":
            start, size = BASE + numbers[0] * PAGE, numbers[1] * PAGE
            target = ELSEWHERE + numbers[0] * PAGE
            done(libc.mremap(start, size, size, 3, target))
            moved = {address - start + target: page for address, page in model.items() if start <= address < start + size}
            model = {address: page for address, page in model.items() if not start <= address < start + size} | moved
        elif order == "fork":
            read_fd, write_fd = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    os.write(write_fd, check(sorted(model)[:: numbers[0]]).encode())
                finally:
                    os._exit(0)
            os.close(write_fd)
            answer = os.read(read_fd, 1000).decode() or "the child said nothing"
            os.close(read_fd)
            os.waitpid(pid, 0)
        elif order == "threads":
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(check, [sorted(model)[at::16] for at in range(8)]))
            answer = next((item for item in answers if item != "ok"), "ok")
        print(answer, flush=True)


if __name__ == "__main__":
    main()
