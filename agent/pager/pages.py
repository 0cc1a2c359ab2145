"""Page contents of one image on the node: a sparse copy of CRIU's pages file, and which pages of it are here.

In: an image directory of :mod:`agent.store.cache` and chunks that arrive. Out: addresses to copy from, for :mod:`agent.pager.worker`.
Only verified bytes are ever marked as here. The marks are in a file beside the pages, so that they outlive a pager that is killed; after
the machine has gone down they count for nothing, since they may have reached the disk before the pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from agent.errors import PagerError
from infra.local.processes import boot_id

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
        self._lock = threading.Lock()
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size
        # mmap.mmap hides its address; UFFDIO_COPY needs it.
        self.address = _libc.mmap(None, max(self.size, PAGE), mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0) or 0
        if self.address == _MAP_FAILED:
            error = ctypes.get_errno()
            os.close(self.fd)
            raise PagerError(f"cannot map {path}: {os.strerror(error)}")
        #: One byte a page; None when every page is here.
        self._here: mmap.mmap | None = None
        self._missing = 0
        if not complete and self.size:
            try:
                self._here = _open_marks(path.with_suffix(".here"), self.size // PAGE)
            except OSError:
                self.close()
                raise
            self._missing = self._here[PAGE:].count(0)

    @property
    def complete(self) -> bool:
        """Whether every page is here."""
        return self._missing == 0

    def available(self, offset: int, size: int) -> int:
        """How many of the ``size`` bytes at ``offset`` are here without a gap; both multiples of the page size."""
        if self._missing == 0 or self._here is None:
            return size
        first = PAGE + offset // PAGE
        gap = self._here.find(b"\0", first, first + size // PAGE)
        return size if gap < 0 else (gap - first) * PAGE

    def missing_chunks(self, chunk_bytes: int) -> list[int]:
        """Indexes of chunks with a page that is not here."""
        return [
            index
            for index, offset in enumerate(range(0, self.size, chunk_bytes))
            if self.available(offset, size := min(chunk_bytes, self.size - offset)) < size
        ]

    def mark(self, offset: int, size: int) -> None:
        """Declare the pages of ``[offset, offset + size)`` here."""
        if self._missing == 0 or self._here is None:
            return
        first = PAGE + offset // PAGE
        last = first + size // PAGE
        self._missing -= self._here[first:last].count(0)
        self._here[first:last] = b"\1" * (last - first)

    def write(self, offset: int, data: bytes) -> None:
        """Write verified ``data``, in any thread; :meth:`mark` it afterwards. Pages that are here already hold the same bytes.

        Raises:
            OSError: the disk is full, or the file was closed meanwhile.
        """
        with self._lock:
            view = memoryview(data)
            while view:
                view = view[os.pwrite(self.fd, view, offset + len(data) - len(view)) :]

    def close(self) -> None:
        """Unmap and close."""
        _libc.munmap(self.address, max(self.size, PAGE))
        with self._lock:
            os.close(self.fd)
            self.fd = -1
        if self._here is not None:
            self._here.close()


class ImagePages:
    """All pages files of one image."""

    def __init__(
        self,
        directory: Path,
        chunks: Mapping[int, Sequence[bytes | None]],
        chunk_bytes: int,
        here: Iterable[tuple[int, int, int]],
        *,
        complete: bool,
    ) -> None:
        """Open the files.

        Args:
            directory: holds ``pages-<id>.img``.
            chunks: per pages id the digest of each chunk; None is a chunk of zeros.
            chunk_bytes: size of a chunk.
            here: (pages id, offset, bytes) that are on the node already: the working set, and pages of zeros.
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

    def are_at(self, directory: Path) -> bool:
        """Whether the files of these names in ``directory`` are the open ones. (Which keep their inodes; a deleted directory does not.)"""
        try:
            return all(
                os.path.samestat(os.fstat(file.fd), (directory / f"pages-{pages_id}.img").stat()) for pages_id, file in self.files.items()
            )
        except FileNotFoundError:
            return False

    def missing(self) -> list[tuple[int, int]]:
        """(pages id, chunk index) of chunks that are not wholly here."""
        return [(pages_id, index) for pages_id, file in self.files.items() for index in file.missing_chunks(self.chunk_bytes)]

    def here(self, pages_id: int, index: int) -> bool:
        """Whether a chunk is wholly here."""
        file, offset = self.files[pages_id], index * self.chunk_bytes
        size = min(self.chunk_bytes, file.size - offset)
        return file.available(offset, size) == size

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


def _open_marks(path: Path, pages: int) -> mmap.mmap:
    """The marks: a page that names the boot they are of, then one byte a page."""
    boot = boot_id().encode()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size != PAGE + pages or os.pread(fd, len(boot), 0) != boot:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, PAGE + pages)
            os.pwrite(fd, boot, 0)
        return mmap.mmap(fd, PAGE + pages)
    finally:
        os.close(fd)
