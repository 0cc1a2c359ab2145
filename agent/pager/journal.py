"""What a pager that is killed leaves behind for the next one: records in shared memory. Pure over a writable buffer.

In: records of :mod:`agent.pager.worker`. Out: the same records to the worker that takes over. A record is ``kind (1 byte), 3 unused,
size (4 bytes), payload``, aligned to 8 bytes; its kind is written last, so that a record is there wholly or not at all.

What the kernel hands out only once (messages of a userfaultfd with the descriptors of forked children, descriptors that CRIU sends) is read
*into* the journal by one system call: :meth:`Journal.reserve` makes the record first, open-ended, and whatever the call brings is in it
even if the caller is killed before it returns.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

_HEAD_BYTES, _ALIGN = 8, 8


class JournalFull(Exception):
    """No room: a new journal that begins with a snapshot must take this one's place."""


class Journal:
    """A journal over ``buffer``, which is all zeros behind its last record."""

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self._view = memoryview(buffer)
        self._at = 0
        for at, kind, _, size in self._scan():
            self._at = at if size == 0 and kind else at + _aligned(_HEAD_BYTES + size)

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self._at

    def records(self) -> Iterator[tuple[int, bytes]]:
        """(kind, payload) of each record, in order; an open-ended one comes last and ends in zeros."""
        for _, kind, payload, _ in self._scan():
            yield kind, bytes(payload)

    def append(self, kind: int, payload: bytes) -> None:
        """Write one record.

        Raises:
            JournalFull: it does not fit.
        """
        size = len(payload)
        if size == 0 or kind == 0:
            raise ValueError("a record has a kind and a payload")
        self._make_room(size)
        self._write(self._at + _HEAD_BYTES, payload)
        self._write(self._at + 4, struct.pack("<I", size))
        self._write(self._at, bytes((kind,)))
        self._at += _aligned(_HEAD_BYTES + size)

    def reserve(self, kind: int, key: int, size: int) -> memoryview:
        """Begin an open-ended record; its payload is ``key`` (8 bytes) and what the caller's system call writes into the returned memory.

        Raises:
            JournalFull: it does not fit.
        """
        self._make_room(8 + size)
        start = self._at + _HEAD_BYTES
        self._write(start, struct.pack("<Q", key))
        self._write(self._at, bytes((kind,)))
        return self._view[start + 8 : start + 8 + size]

    def keep(self, size: int) -> None:
        """The open record got ``size`` bytes; it stays."""
        self._write(self._at + 4, struct.pack("<I", 8 + size))
        self._at += _aligned(_HEAD_BYTES + 8 + size)

    def drop(self, size: int) -> None:
        """The open record got ``size`` bytes that nobody needs to remember."""
        self._write(self._at, b"\0")
        self._write(self._at + _HEAD_BYTES, b"\0" * (8 + size))

    def close(self) -> None:
        """Let go of the buffer."""
        self._view.release()

    def _make_room(self, size: int) -> None:
        # One header's worth of zeros stays behind the last record.
        if self._at + _aligned(_HEAD_BYTES + size) + _HEAD_BYTES > len(self._view):
            raise JournalFull

    def _write(self, at: int, data: bytes) -> None:
        self._view[at : at + len(data)] = data

    def _scan(self) -> Iterator[tuple[int, int, memoryview, int]]:
        at, view = 0, self._view
        while at + _HEAD_BYTES <= len(view) and view[at]:
            (size,) = struct.unpack_from("<I", view, at + 4)
            start = at + _HEAD_BYTES
            if size == 0:
                yield at, view[at], view[start:], 0
                return
            yield at, view[at], view[start : start + size], size
            at += _aligned(_HEAD_BYTES + size)


class JournalFile:
    """A journal in a memory file at a fixed descriptor number, where the next worker finds it."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._memory: mmap.mmap | None = None
        self.journal = Journal(bytearray(_HEAD_BYTES))

    def load(self) -> None:
        """Map what is there."""
        self._map(self._fd)

    def renew(self, kind: int, snapshot: bytes) -> None:
        """Take the place of the old journal, in one step, with one that begins with a snapshot."""
        size = max(self._size, 2 * len(snapshot))
        fd = os.memfd_create("thaw-pager-journal", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            memory, journal = self._memory, self.journal
            self._map(fd)
            self.journal.append(kind, snapshot)
            os.dup2(fd, self._fd, inheritable=False)
        finally:
            os.close(fd)
        journal.close()
        if memory is not None:
            memory.close()

    def _map(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        # Every page is there from the start: the kernel must be able to write into it whatever state this process is in.
        self._memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.journal = Journal(self._memory)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
