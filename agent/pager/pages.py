"""Page contents of one image on the node: a sparse copy of CRIU's pages file, and which pages of it are here.

In: an image directory of :mod:`agent.store.cache` and chunks that arrive. Out: addresses to copy from, for
:mod:`agent.pager.process`. Only verified bytes are ever marked as here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from agent.errors import PagerError

PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class PagesFile:
    """One pages file.

    Attributes:
        address: where it is mapped in this process.
        size: its bytes.
    """

    def __init__(self, path: Path, *, complete: bool) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size
        self._here = bytearray((b"\1" if complete else b"\0") * (self.size // PAGE))
        self._missing = 0 if complete else len(self._here)
        # mmap.mmap hides its address; UFFDIO_COPY needs it.
        self.address = _libc.mmap(None, max(self.size, PAGE), mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0) or 0
        if self.address == _MAP_FAILED:
            error = ctypes.get_errno()
            os.close(self.fd)
            raise PagerError(f"cannot map {path}: {os.strerror(error)}")

    @property
    def complete(self) -> bool:
        """Whether every page is here."""
        return self._missing == 0

    def available(self, offset: int, size: int) -> int:
        """How many of the ``size`` bytes at ``offset`` are here without a gap; both multiples of the page size."""
        first, last = offset // PAGE, (offset + size) // PAGE
        gap = self._here.find(0, first, last)
        return size if gap < 0 else gap * PAGE - offset

    def missing_chunks(self, chunk_bytes: int) -> list[int]:
        """Indexes of chunks with a page that is not here."""
        step = chunk_bytes // PAGE
        return [index for index, at in enumerate(range(0, len(self._here), step)) if self._here.find(0, at, at + step) >= 0]

    def mark(self, offset: int, size: int) -> None:
        """Declare the pages of ``[offset, offset + size)`` here."""
        first, last = offset // PAGE, (offset + size) // PAGE
        self._missing -= self._here.count(0, first, last)
        self._here[first:last] = b"\1" * (last - first)

    def fill(self, offset: int, data: bytes) -> None:
        """Write verified ``data`` at ``offset`` and declare it here. Pages that are here already hold the same bytes."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset + len(data) - len(view))
            view = view[written:]
        self.mark(offset, len(data))

    def close(self) -> None:
        """Unmap and close."""
        _libc.munmap(self.address, max(self.size, PAGE))
        os.close(self.fd)


class ImagePages:
    """All pages files of one image."""

    def __init__(
        self,
        directory: Path,
        chunks: dict[int, Sequence[bytes | None]],
        chunk_bytes: int,
        here: Sequence[tuple[int, int, int]],
        *,
        complete: bool,
    ) -> None:
        """Open the files.

        Args:
            directory: holds ``pages-<id>.img``.
            chunks: per pages id the digest of each chunk; None is a chunk of zeros.
            chunk_bytes: size of a chunk.
            here: (pages id, offset, bytes) that are on the node already: the working set.
            complete: everything is on the node.
        """
        self.chunks = chunks
        self.chunk_bytes = chunk_bytes
        self.files = {pages_id: PagesFile(directory / f"pages-{pages_id}.img", complete=complete) for pages_id in chunks}
        for pages_id, offset, size in here:
            self.files[pages_id].mark(offset, size)
        for pages_id, digests in chunks.items():
            file = self.files[pages_id]
            for index, digest in enumerate(digests):
                if digest is None:  # a hole of the sparse file reads as zeros
                    file.mark(index * chunk_bytes, min(chunk_bytes, file.size - index * chunk_bytes))

    @property
    def complete(self) -> bool:
        """Whether every page of every file is here."""
        return all(file.complete for file in self.files.values())

    def missing(self) -> list[tuple[int, int]]:
        """(pages id, chunk index) of chunks that are not wholly here."""
        return [(pages_id, index) for pages_id, file in self.files.items() for index in file.missing_chunks(self.chunk_bytes)]

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()
