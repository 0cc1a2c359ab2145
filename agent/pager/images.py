"""Images as the pager sees them: layouts, page contents, and chunks on their way.

In: an image directory of :mod:`agent.store.cache`. Out: for :mod:`agent.pager.serving`, pages that are here; for those that are not, a call
when they have arrived. Everything that is the same for all restores of an image is made once, when it is first needed.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from agent.criu.images import read_page_maps
from agent.errors import ImageInvalid
from agent.pager.downloads import Download, Downloads
from agent.pager.pages import ImagePages, PagesFile
from agent.pager.regions import Region, Regions
from agent.store.cache import IMAGES, MANIFEST
from agent.store.manifest import decode

#: Chunks asked for at once when nobody waits for them.
_ASKED_MAX = 8
#: Largest single copy: a fault of another process waits no longer than it takes.
COPY_BYTES_MAX = 256 << 10


@dataclass(eq=False)
class _Chunk:
    """One that was asked for."""

    download: Download
    #: Called when it is here, or with the reason why it cannot be had.
    waiters: list[Callable[[str], None]] = field(default_factory=list)


class Image:
    """One image on this node."""

    def __init__(self, name: str, said: tuple[str, bool], downloads: Downloads) -> None:
        """Open an image.

        Args:
            name: the checkpoint's.
            said: its directory, and whether all of its pages are there.
            downloads: fetch what is not.

        Raises:
            ImageInvalid: it is not what its name says. OSError: it is not there.
        """
        self.said = said
        directory, complete = Path(said[0]), said[1]
        manifest = decode((directory / MANIFEST).read_bytes(), name)
        self.page_maps = read_page_maps(directory / IMAGES)
        sizes = {int(key): pages.size for key, pages in manifest.pages.items()}
        for page_map in self.page_maps.values():
            if page_map.pages_bytes > sizes.get(page_map.pages_id, -1):
                raise ImageInvalid(f"checkpoint {name}: the page map of process {page_map.pid} is larger than its pages")
        self._fresh = {int(pid): [(run.address, run.address + run.size) for run in runs] for pid, runs in manifest.fresh.items()}
        self._zeros = {int(key): [(span.offset, span.offset + span.size) for span in item.zeros] for key, item in manifest.pages.items()}
        self._ahead = {int(key): [(span.offset, span.offset + span.size) for span in item.ahead] for key, item in manifest.pages.items()}
        self._function, self._key_id = manifest.function, manifest.key
        self.gets = 0
        self.bytes_fetched = 0
        here = [(extent.pages_id, extent.offset, extent.size) for extent in manifest.extents]
        here += [(pages_id, start, end - start) for pages_id, spans in self._zeros.items() for start, end in spans]
        chunks = {int(key): pages.chunks for key, pages in manifest.pages.items()}
        self._pages = ImagePages(directory / IMAGES, chunks, manifest.chunk_bytes, here, complete=complete)
        self._downloads = downloads
        self._asked: dict[tuple[int, int], _Chunk] = {}
        #: Chunks that are still to be asked for, when nobody waits for them.
        self._later: deque[tuple[int, int]] = deque()
        #: The chunk that a fault last asked for, by pages file: the next one is fetched ahead of a second fault in a row.
        self._last_fault: dict[int, int] = {}
        self._on_complete: list[Callable[[str], None]] = []
        self.layout = cache(self._make_layout)

    def is_at(self, directory: Path) -> bool:
        """Whether this is the directory of that name, and not an earlier one of the same name."""
        return self._pages.are_at(directory / IMAGES)

    @property
    def complete(self) -> bool:
        """Whether all pages are on the node."""
        return self._pages.complete

    def file(self, pid: int) -> PagesFile:
        """The pages file of a process."""
        return self._pages.files[self.page_maps[pid].pages_id]

    def ahead(self, pid: int, offset: int) -> tuple[int, int] | None:
        """The recorded run of the pages file, ``[start, end)``, that holds ``offset``: pages that were used together."""
        spans = self._ahead[self.page_maps[pid].pages_id]
        index = bisect_right(spans, (offset, 1 << 64)) - 1
        return spans[index] if index >= 0 and offset < spans[index][1] else None

    def _make_layout(self, pid: int) -> Regions:
        """Where which page belongs when a process has just been restored. What is not in it is zeros, also pages dumped as zeros."""
        page_map = self.page_maps.get(pid)
        regions = []
        for run in page_map.runs if page_map else ():
            if run.lazy:
                at, end = run.offset, run.offset + run.end - run.start
                spans = self._zeros[page_map.pages_id] if page_map else []
                index = max(0, bisect_right(spans, (at, 1 << 64)) - 1)
                for low, high in spans[index:]:
                    if low >= end:
                        break
                    if low > at:
                        regions.append(Region(run.start + at - run.offset, run.start + low - run.offset, at))
                    at = max(at, high)
                if at < end:
                    regions.append(Region(run.start + at - run.offset, run.end, at))
        return Regions(regions)

    def fresh(self, pid: int) -> list[tuple[int, int]]:
        """``[start, end)`` of memory that a process touches early and that has no content in the image."""
        return self._fresh.get(pid, [])

    # Chunks

    def request(self, pid: int, offset: int, waiter: Callable[[str], None]) -> None:
        """Have the chunk with ``offset`` fetched for a fault; ``waiter`` gets an empty text when it is here, or why it cannot be had."""
        pages_id, index = self.page_maps[pid].pages_id, offset // self._pages.chunk_bytes
        self._ask(pages_id, index, urgent=True).waiters.append(waiter)
        following = index + 1
        if self._last_fault.get(pages_id) == index - 1 and following < len(self._pages.chunks[pages_id]):
            size = min(self._pages.chunk_bytes, self._pages.files[pages_id].size - following * self._pages.chunk_bytes)
            if self._pages.files[pages_id].available(following * self._pages.chunk_bytes, size) < size:
                self._ask(pages_id, following, urgent=True)
        self._last_fault[pages_id] = index

    def fetch_all(self, done: Callable[[str], None]) -> None:
        """Fetch everything that is missing; ``done`` gets an empty text or the reason of the failure."""
        missing = self._pages.missing()
        if not missing:
            done("")
            return
        self._on_complete.append(done)
        self._later = deque(missing)
        self._ask_more()

    def _ask_more(self) -> None:
        """Keep a few downloads waiting, of all that are to be had in the background."""
        while self._later and len(self._asked) < _ASKED_MAX:
            pages_id, index = self._later.popleft()
            if not self._pages.here(pages_id, index):
                self._ask(pages_id, index, urgent=False)

    def close(self) -> None:
        """Stop downloads and close the files."""
        self._later.clear()
        for chunk in self._asked.values():
            chunk.download.cancelled = True
        self._finish("the image was closed")
        self._pages.close()

    def _ask(self, pages_id: int, index: int, *, urgent: bool) -> _Chunk:
        key = (pages_id, index)
        chunk = self._asked.get(key)
        if chunk is None:
            at = index * self._pages.chunk_bytes
            digest = self._pages.chunks[pages_id][index]
            assert digest is not None, "a chunk of zeros is never fetched"
            size = min(self._pages.chunk_bytes, self._pages.files[pages_id].size - at)
            file = self._pages.files[pages_id]
            keep = functools.partial(file.write, at)
            done = functools.partial(self._arrived, key, size)
            chunk = _Chunk(Download(self._function, self._key_id, digest, size, keep, done))
            self._asked[key] = chunk
            self._downloads.add(chunk.download, urgent=urgent)
        elif urgent:
            self._downloads.hurry(chunk.download)
        return chunk

    def _arrived(self, key: tuple[int, int], size: int, error: str) -> None:
        chunk = self._asked.pop(key)
        if not error:
            self.gets += 1
            self.bytes_fetched += size
            self._pages.files[key[0]].mark(key[1] * self._pages.chunk_bytes, size)
        for waiter in chunk.waiters:
            waiter(error)
        if error:
            self._later.clear()
            self._finish(error)
        elif self.complete:
            self._finish("")
        else:
            self._ask_more()

    def _finish(self, error: str) -> None:
        callbacks, self._on_complete = self._on_complete, []
        for done in callbacks:
            done(error)
