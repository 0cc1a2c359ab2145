"""The userfaultfd of one restored process: messages in, pages out.

In: a descriptor that CRIU handed over, and messages that were read from it. Out: :class:`Event` values and :class:`CopyResult`. Blocking
ioctls, so it lives in the pager process. Source: Documentation/admin-guide/mm/userfaultfd.rst and include/uapi/linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

PAGE = 4096
#: Size of ``struct uffd_msg``.
MESSAGE_BYTES = 32
_COPY, _ZEROPAGE, _WAKE = 0xC028AA03, 0xC020AA04, 0x8010AA02
_PAGEFAULT, _FORK, _REMAP, _REMOVE, _UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
#: Ends of the address range of a process, largest first: x86-64 with five and with four levels of page tables, 32 bits.
_TASK_SIZES = ((1 << 56) - PAGE, (1 << 47) - PAGE, 0xFFFFE000)

# PyDLL: these calls are short, and giving up the interpreter's lock for each would mean waiting for a downloading thread to return it.
_ioctl = ctypes.PyDLL(None, use_errno=True).ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class Fault:
    """A thread waits for the page at ``address``."""

    address: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked; ``fd`` is the child's userfaultfd."""

    fd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """``size`` bytes moved from ``source`` to ``target``."""

    source: int
    target: int
    size: int


@dataclass(frozen=True, slots=True)
class Remove:
    """``[start, end)`` was dropped or unmapped; it reads as zeros from now on."""

    start: int
    end: int


Event = Fault | Fork | Remap | Remove


def parse(messages: bytes | memoryview) -> Iterator[Event]:
    """Messages as the kernel wrote them; zeros end them."""
    for at in range(0, len(messages) - MESSAGE_BYTES + 1, MESSAGE_BYTES):
        kind = messages[at]
        if kind == _PAGEFAULT:
            yield Fault(struct.unpack_from("<Q", messages, at + 16)[0] & -PAGE)
        elif kind == _FORK:
            yield Fork(struct.unpack_from("<I", messages, at + 8)[0])
        elif kind == _REMAP:
            yield Remap(*struct.unpack_from("<QQQ", messages, at + 8))
        elif kind in (_REMOVE, _UNMAP):
            yield Remove(*struct.unpack_from("<QQ", messages, at + 8))
        elif kind == 0:
            return


def only_faults(messages: bytes | memoryview) -> bool:
    """Whether there is nothing to remember in these messages."""
    return bytes(messages[::MESSAGE_BYTES]).count(_PAGEFAULT) == len(messages) // MESSAGE_BYTES


class Outcome(Enum):
    """How a copy ended."""

    DONE = "done"
    #: The range is not registered (yet): CRIU registers after it hands the descriptor over.
    NOT_REGISTERED = "not registered"
    #: An event is unread; nothing can be copied before it is handled.
    EVENT_PENDING = "event pending"
    #: The process is gone.
    GONE = "gone"
    #: The kernel has no memory for it, or cannot read the source, at the moment.
    REFUSED = "refused"


_OUTCOMES = {
    errno.EAGAIN: Outcome.EVENT_PENDING,
    errno.ENOENT: Outcome.NOT_REGISTERED,
    errno.EINVAL: Outcome.NOT_REGISTERED,
    errno.ESRCH: Outcome.GONE,
}


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy did: bytes that it put in place, bytes that it got past (present ones included), and why it stopped."""

    copied: int
    passed: int
    outcome: Outcome


class Userfault:
    """Operations on one userfaultfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._arguments = (ctypes.c_longlong * 5)()
        self._pointer = ctypes.addressof(self._arguments)

    def copy(self, target: int, source: int, size: int) -> CopyResult:
        """Copy ``size`` bytes from address ``source`` of this process to ``target``; pages that are there stay and their waiters wake."""
        return self._put(_COPY, target, source, size)

    def zero(self, target: int, size: int = PAGE) -> CopyResult:
        """Put zeros at ``target``; they share one page of the kernel until they are written to."""
        return self._put(_ZEROPAGE, target, 0, size)

    def probe(self, address: int) -> Outcome:
        """Put zeros at an address where nothing else can belong: tells a process that is gone, and an event that is unread."""
        return self._put(_ZEROPAGE, address, 0, PAGE).outcome

    def wake(self, target: int, size: int) -> bool:
        """Wake whoever waits for a page in the range."""
        arguments = (ctypes.c_longlong * 2)(target, size)
        return bool(_ioctl(self.fd, _WAKE, ctypes.addressof(arguments)) == 0)

    def wake_all(self, lowest: int) -> None:
        """Wake every waiter, from address ``lowest`` (the kernel's ``vm.mmap_min_addr``): who finds no page faults, and is heard, again."""
        any(self.wake(lowest, end - lowest) for end in _TASK_SIZES)

    def _put(self, request: int, target: int, source: int, size: int) -> CopyResult:
        copied = passed = 0
        arguments = self._arguments
        result_at = 4 if request == _COPY else 3
        while passed < size:
            if request == _COPY:
                arguments[0], arguments[1], arguments[2], arguments[3], arguments[4] = target + passed, source + passed, size - passed, 0, 0
            else:
                arguments[0], arguments[1], arguments[2], arguments[3] = target + passed, size - passed, 0, 0
            if _ioctl(self.fd, request, self._pointer) == 0:
                return CopyResult(copied + size - passed, size, Outcome.DONE)
            error, done = ctypes.get_errno(), arguments[result_at]
            if done > 0:
                copied += done
                passed += done
            elif error == errno.EEXIST or done == -errno.EEXIST:
                self.wake(target + passed, PAGE)
                passed += PAGE
            else:
                return CopyResult(copied, passed, _OUTCOMES.get(error, Outcome.REFUSED))
        return CopyResult(copied, passed, Outcome.DONE)
