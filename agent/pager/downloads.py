"""Chunks on their way from the store: a few threads, faults first.

In: chunks that :mod:`agent.pager.images` lacks. Out: authentic contents, through a queue and an eventfd on the pager's loop. A chunk that a
thread of an instance waits for overtakes everything that is only fetched to have it, and of the latter only few are fetched at once.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from agent.errors import AgentError, ImageInvalid
from agent.store.chunks import ChunkStore
from agent.store.seal import Sealer
from infra.errors import StoreError
from infra.s3 import ObjectStore

logger = logging.getLogger(__name__)
#: A chunk that the store could not serve, or the disk not take, for this long is reported; the agent ends instances that wait for it.
STALL_S = 30.0
_BACKOFF_S, _BACKOFF_MAX_S = 0.05, 2.0
#: Threads that fetch what nobody waits for: they take time from the instance that was just started.
_LATER_MAX = 2
#: A chunk that does not verify is fetched so many times; then it is not the network that is at fault.
_CORRUPT_ATTEMPTS = 3
#: What gets better when somebody makes room.
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(eq=False)
class Download:
    """One chunk.

    Attributes:
        function, key_id: whose it is, and the ring key by which it is named.
        digest, size: of its content.
        keep: called in a thread with its verified contents; raises OSError when they cannot be kept.
        done: called on the pager's loop when it is kept, with an empty text, or with the reason why that cannot be.
    """

    function: str
    key_id: str
    digest: bytes
    size: int
    keep: Callable[[bytes], None]
    done: Callable[[str], None]
    cancelled: bool = False


class Downloads:
    """The threads. Everything but what runs in them belongs to the pager's loop."""

    def __init__(self, parallel: int, wake_fd: int) -> None:
        self._parallel = parallel
        self._wake_fd = wake_fd
        self._make_store: Callable[[], ObjectStore] | None = None
        self._store: ObjectStore | None = None
        self._sealer: Sealer | None = None
        self._condition = threading.Condition()
        self._urgent: deque[Download] = deque()
        self._later: deque[Download] = deque()
        self._later_running = 0
        self._threads = 0
        self._idle = 0
        self._results: queue.SimpleQueue[tuple[Download, str]] = queue.SimpleQueue()

    def configure(self, make_store: Callable[[], ObjectStore], sealer: Sealer, parallel: int) -> None:
        """From now on use a store of these settings; it is made, and keys are read, when the first chunk is fetched, in a thread."""
        with self._condition:
            self._make_store, self._store, self._sealer, self._parallel = make_store, None, sealer, parallel

    def add(self, download: Download, *, urgent: bool) -> None:
        """Fetch a chunk."""
        with self._condition:
            (self._urgent if urgent else self._later).append(download)
            if len(self._urgent) + len(self._later) > self._idle and self._threads < self._parallel:
                self._threads += 1
                threading.Thread(target=self._run, name="chunks", daemon=True).start()
            self._condition.notify()

    def hurry(self, download: Download) -> None:
        """Someone waits for it now."""
        with self._condition:
            if download in self._later:
                self._later.remove(download)
                self._urgent.append(download)
                self._condition.notify()

    def settle(self) -> None:
        """Hand out one that has arrived. Not all of them: while an image is fetched there is always another one, and faults wait."""
        try:
            download, error = self._results.get_nowait()
        except queue.Empty:
            return
        if not download.cancelled:
            download.done(error)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                while (chosen := self._next()) is None:
                    self._condition.wait()
                self._idle -= 1
            download, later = chosen
            error = self._fetch(download)
            with self._condition:
                self._later_running -= later
            self._results.put((download, error))
            os.eventfd_write(self._wake_fd, 1)

    def _next(self) -> tuple[Download, bool] | None:
        if self._urgent:
            return self._urgent.popleft(), False
        if self._later and self._later_running < max(1, min(_LATER_MAX, self._parallel // 2)):
            self._later_running += 1
            return self._later.popleft(), True
        return None

    def _fetch(self, download: Download) -> str:
        """However often it takes until :data:`STALL_S`; returns what went wrong in the end."""
        give_up, pause, error, corrupt = time.monotonic() + STALL_S, _BACKOFF_S, "", 0
        data: bytes | None = None
        while not download.cancelled and corrupt < _CORRUPT_ATTEMPTS:
            try:
                if data is None:
                    data = self._place(download).download(download.digest, download.size)
                download.keep(data)
                return ""
            except (StoreError, AgentError) as failure:
                error = str(failure)
                corrupt += isinstance(failure, ImageInvalid)
                logger.warning("a chunk cannot be fetched: %s", error)
            except OSError as failure:
                error = f"cannot keep a chunk on the node: {failure}"
                if failure.errno not in _FULL:
                    return error
                logger.warning("%s", error)
            if time.monotonic() + pause > give_up:
                break
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _BACKOFF_MAX_S)
        return error or "it is not wanted any more"

    def _place(self, download: Download) -> ChunkStore:
        with self._condition:
            if self._store is None:
                assert self._make_store is not None
                self._store = self._make_store()
            assert self._sealer is not None
            return ChunkStore(self._store, self._sealer, download.function, download.key_id)
