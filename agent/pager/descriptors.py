"""Sockets that are plain numbers of a descriptor table, because they outlive the process that works on them.

In: numbers. Out: messages and further numbers. Used by :mod:`agent.pager.worker`; a Python socket object would close its number with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
from collections.abc import Iterator, Sequence

_DATA_BYTES = 4


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    borrowed = socket.socket(fileno=fd)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def accept(listener: int) -> int | None:
    """A new connection, which does not block; None when there is none after all."""
    with _borrowed(listener) as sock:
        try:
            connection, _ = sock.accept()
        except OSError:
            return None
    connection.setblocking(False)
    return connection.detach()


def receive(fd: int, size_max: int) -> tuple[bytes, list[int]] | None:
    """The next message and the descriptors that came with it; None when there is none, no bytes at the end."""
    with _borrowed(fd) as sock:
        try:
            payload, fds, _, _ = socket.recv_fds(sock, size_max, 4)
        except BlockingIOError:
            return None
        except OSError:
            return b"", []
    return payload, list(fds)


def send(fd: int, payload: bytes, passed: Sequence[int]) -> None:
    """Send one message.

    Raises:
        OSError: the other side does not take it.
    """
    with _borrowed(fd) as sock:
        socket.send_fds(sock, [payload], passed)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.recvmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.recvmsg.restype = ctypes.c_ssize_t


def receive_into(fd: int, view: memoryview, control_at: int) -> int | None:
    """Receive 4 bytes, and what comes with them (``struct cmsghdr``, from ``control_at`` on), straight into ``view``.

    Returns:
        Bytes received; None when there is nothing, 0 at the end.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    vector = _Vector(address, _DATA_BYTES)
    message = _Message(None, 0, ctypes.pointer(vector), 1, address + control_at, len(view) - control_at, 0)
    received = int(_libc.recvmsg(fd, ctypes.byref(message), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC))
    if received < 0:
        return None if ctypes.get_errno() in (errno.EAGAIN, errno.EINTR) else 0
    return received
