"""The userfaultfd of one restored process: events in, pages out.

In: a descriptor that CRIU handed over. Out: :class:`Event` values and :class:`CopyResult`. Blocking ioctls, so it lives in the pager
process. Source: Documentation/admin-guide/mm/userfaultfd.rst and include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from enum import Enum

PAGE = 4096
_COPY, _ZEROPAGE, _WAKE = 0xC028AA03, 0xC020AA04, 0x8010AA02
_PAGEFAULT, _FORK, _REMAP, _REMOVE, _UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
_MESSAGE_BYTES = 32

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


@dataclass(frozen=True)
class Fault:
    """A thread waits for the page at ``address``."""

    address: int


@dataclass(frozen=True)
class Fork:
    """The process forked; ``fd`` is the child's userfaultfd."""

    fd: int


@dataclass(frozen=True)
class Remap:
    """``size`` bytes moved from ``source`` to ``target``."""

    source: int
    target: int
    size: int


@dataclass(frozen=True)
class Remove:
    """``[start, end)`` was dropped or unmapped; it reads as zeros from now on."""

    start: int
    end: int


Event = Fault | Fork | Remap | Remove


class Outcome(Enum):
    """How a copy ended."""

    DONE = "done"
    #: The range is not registered (yet): CRIU registers after it hands the descriptor over.
    NOT_REGISTERED = "not registered"
    #: An event is unread; nothing can be copied before it is handled.
    EVENT_PENDING = "event pending"
    #: The process is gone.
    GONE = "gone"


@dataclass(frozen=True)
class CopyResult:
    """What a copy did: bytes that it put in place, bytes that it got past (present ones included), and why it stopped."""

    copied: int
    passed: int
    outcome: Outcome


class Userfault:
    """One userfaultfd. Closing it without a duplicate elsewhere turns missing pages into zeros: see ``init.c``, order K."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._arguments = (ctypes.c_longlong * 5)()
        self._pointer = ctypes.addressof(self._arguments)

    def events(self) -> list[Event] | None:
        """Everything unread; None when the process is gone."""
        try:
            data = os.read(self.fd, _MESSAGE_BYTES * 64)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        found: list[Event] = []
        for at in range(0, len(data), _MESSAGE_BYTES):
            kind = data[at]
            if kind == _PAGEFAULT:
                found.append(Fault(struct.unpack_from("<Q", data, at + 16)[0] & -PAGE))
            elif kind == _FORK:
                found.append(Fork(struct.unpack_from("<I", data, at + 8)[0]))
            elif kind == _REMAP:
                found.append(Remap(*struct.unpack_from("<QQQ", data, at + 8)))
            elif kind in (_REMOVE, _UNMAP):
                found.append(Remove(*struct.unpack_from("<QQ", data, at + 8)))
        return found

    def copy(self, target: int, source: int, size: int) -> CopyResult:
        """Copy ``size`` bytes from address ``source`` of this process to ``target``; pages that are there stay and their waiters wake."""
        copied = passed = 0
        arguments = self._arguments
        while passed < size:
            arguments[0], arguments[1], arguments[2], arguments[3], arguments[4] = (
                target + passed,
                source + passed,
                size - passed,
                0,
                0,
            )
            if _ioctl(self.fd, _COPY, self._pointer) == 0:
                return CopyResult(copied + size - passed, size, Outcome.DONE)
            error, done = ctypes.get_errno(), arguments[4]
            if done > 0:
                copied += done
                passed += done
                continue
            if error == errno.EEXIST or done == -errno.EEXIST:
                self.wake(target + passed, PAGE)
                passed += PAGE
            elif error == errno.EAGAIN:
                return CopyResult(copied, passed, Outcome.EVENT_PENDING)
            elif error == errno.ENOENT:
                return CopyResult(copied, passed, Outcome.NOT_REGISTERED)
            elif error == errno.ESRCH:
                return CopyResult(copied, passed, Outcome.GONE)
            else:
                raise OSError(error, f"UFFDIO_COPY of {size} bytes to {target:#x}: {os.strerror(error)}")
        return CopyResult(copied, passed, Outcome.DONE)

    def zero(self, target: int) -> Outcome:
        """Put one page of zeros at ``target``."""
        arguments = (ctypes.c_longlong * 4)(target, PAGE, 0, 0)
        if _ioctl(self.fd, _ZEROPAGE, ctypes.addressof(arguments)) == 0:
            return Outcome.DONE
        error = ctypes.get_errno()
        if error == errno.EEXIST:
            self.wake(target, PAGE)
            return Outcome.DONE
        if error == errno.EAGAIN:
            return Outcome.EVENT_PENDING
        if error == errno.ENOENT:
            return Outcome.NOT_REGISTERED
        if error == errno.ESRCH:
            return Outcome.GONE
        raise OSError(error, f"UFFDIO_ZEROPAGE at {target:#x}: {os.strerror(error)}")

    def wake(self, target: int, size: int) -> None:
        """Wake whoever waits for a page that is there."""
        arguments = (ctypes.c_longlong * 2)(target, size)
        _ioctl(self.fd, _WAKE, ctypes.addressof(arguments))

    def close(self) -> None:
        """Close this descriptor."""
        os.close(self.fd)
