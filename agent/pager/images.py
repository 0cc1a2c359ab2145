"""Images as the pager sees them: layout, page contents, and chunks on their way.

In: an image directory of :mod:`agent.store.cache`. Out: for :mod:`agent.pager.process`, pages that are here, and callbacks when a chunk
that was not has arrived. Downloads run in threads; everything else on the pager's loop.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.criu.images import read_page_maps
from agent.errors import AgentError, ImageInvalid, PagerError
from agent.pager.pages import ImagePages, PagesFile
from agent.store import chunks
from agent.store.cache import IMAGES, MANIFEST
from agent.store.manifest import decode
from infra.errors import StoreError
from infra.s3 import ObjectStore

logger = logging.getLogger(__name__)
#: A fault that the store could not serve for this long is reported; the agent ends the instance.
STALL_S = 30.0
_BACKOFF_S, _BACKOFF_MAX_S = 0.05, 2.0
#: A chunk that does not verify is fetched so many times; then it is not the network that is at fault.
_CORRUPT_ATTEMPTS = 3


@dataclass(frozen=True)
class Waiter:
    """A fault that waits for a chunk."""

    arrived: Callable[[Any, int], None]
    space: Any
    address: int
    stalled: Callable[[Any, str], None]


class Image:
    """One image on this node."""

    def __init__(self, name: str, directory: Path, store: ObjectStore, wake_fd: int, parallel: int, *, complete: bool) -> None:
        manifest = decode((directory / MANIFEST).read_bytes(), name)
        self.page_maps = read_page_maps(directory / IMAGES)
        sizes = {int(key): pages.size for key, pages in manifest.pages.items()}
        for page_map in self.page_maps.values():
            if page_map.pages_bytes > sizes.get(page_map.pages_id, -1):
                raise ImageInvalid(f"checkpoint {name}: the page map of process {page_map.pid} is larger than its pages")
        self.prefetch: dict[int, list[tuple[int, int]]] = {}
        self.gets = 0
        self.bytes_fetched = 0
        self._pages = ImagePages(
            directory / IMAGES,
            {int(key): pages.chunks for key, pages in manifest.pages.items()},
            manifest.chunk_bytes,
            [(extent.pages_id, extent.offset, extent.size) for extent in manifest.extents],
            complete=complete,
        )
        self._store = store
        self._wake_fd = wake_fd
        self._threads = ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="chunks")
        self._results: queue.SimpleQueue[tuple[int, int, bytes | None, str]] = queue.SimpleQueue()
        self._waiting: dict[tuple[int, int], list[Waiter]] = {}
        self._on_complete: list[Callable[[str], None]] = []
        self._closed = False

    @property
    def complete(self) -> bool:
        """Whether all pages are on the node."""
        return self._pages.complete

    def file(self, pid: int) -> PagesFile:
        """The pages file of a process."""
        return self._pages.files[self.page_maps[pid].pages_id]

    def request(self, pid: int, offset: int, waiter: Waiter) -> None:
        """Have the chunk with ``offset`` fetched, and call ``waiter`` when it is here."""
        self._request(self.page_maps[pid].pages_id, offset // self._pages.chunk_bytes).append(waiter)

    def fetch_all(self, done: Callable[[str], None]) -> None:
        """Fetch everything that is missing; ``done`` gets an empty text or the reason of the failure."""
        missing = self._pages.missing()
        if not missing:
            done("")
            return
        self._on_complete.append(done)
        for pages_id, index in missing:
            self._request(pages_id, index)

    def settle(self) -> None:
        """Take in what the threads have fetched; runs on the pager's loop."""
        while True:
            try:
                pages_id, index, data, error = self._results.get_nowait()
            except queue.Empty:
                break
            waiters = self._waiting.pop((pages_id, index), [])
            if data is None:
                for waiter in waiters:
                    waiter.stalled(waiter.space, error)
                self._finish(error)
                continue
            self.gets += 1
            self.bytes_fetched += len(data)
            try:
                self._pages.files[pages_id].fill(index * self._pages.chunk_bytes, data)
            except OSError as failure:  # the disk is full: the instance cannot go on, the node can
                for waiter in waiters:
                    waiter.stalled(waiter.space, f"cannot keep a chunk on the node: {failure}")
                self._finish(f"cannot keep a chunk on the node: {failure}")
                continue
            for waiter in waiters:
                waiter.arrived(waiter.space, waiter.address)
        if self.complete:
            self._finish("")

    def close(self) -> None:
        """Stop downloads and close the files."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._finish("the image was closed")
        self._pages.close()

    def _finish(self, error: str) -> None:
        callbacks, self._on_complete = self._on_complete, []
        for done in callbacks:
            done(error)

    def _request(self, pages_id: int, index: int) -> list[Waiter]:
        key = (pages_id, index)
        if key not in self._waiting:
            self._waiting[key] = []
            self._threads.submit(self._fetch, pages_id, index)
        return self._waiting[key]

    def _fetch(self, pages_id: int, index: int) -> None:
        """In a thread: download one chunk, however often it takes until :data:`STALL_S`."""
        size = min(self._pages.chunk_bytes, self._pages.files[pages_id].size - index * self._pages.chunk_bytes)
        name = self._pages.chunks[pages_id][index]
        give_up, pause, error = time.monotonic() + STALL_S, _BACKOFF_S, ""
        data, corrupt = None, 0
        while not self._closed and data is None and corrupt < _CORRUPT_ATTEMPTS:
            try:
                if name is None:
                    raise PagerError("a chunk of zeros is never fetched")
                data = chunks.download(self._store, name, size)
            except (StoreError, AgentError) as failure:
                error = str(failure)
                corrupt += isinstance(failure, ImageInvalid)
                logger.warning("chunk %s of pages %s: %s", index, pages_id, error)
                if time.monotonic() + pause > give_up:
                    break
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, _BACKOFF_MAX_S)
        self._results.put((pages_id, index, data, error))
        os.eventfd_write(self._wake_fd, 1)
