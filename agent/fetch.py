"""From the object store to the node's cache: the pointer, then head and working set, everything at once that can be.

In: a function, its root layers (perhaps still being made). Out: a :class:`~agent.store.cache.CachedImage` that is authentic, in place,
known to the pager and right for this host. Blocking work runs in threads of its own, so that a slow store holds up nothing else of the
node. Used by :mod:`agent.catalog`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.errors import AgentError, ImageInvalid
from agent.pager.client import PagerClient
from agent.sandbox.rootfs import RootLayers
from agent.store import host, manifest, pointer
from agent.store.cache import CachedImage, ImageCache
from agent.store.pointer import Generations, Pointer
from agent.store.seal import OVERHEAD_BYTES_MAX, Sealer
from infra.errors import ObjectMissing, StoreUnavailable
from infra.s3 import ObjectStore
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
#: Longest wait for the pointer, s: a start goes on without it when the store is that slow. Second: with the wait for a thread.
_POINTER_TIMEOUT_S, _POINTER_IN_ALL_S = 1.0, 2.0
#: The same for head and working set, when the caller sets no limit, s.
_IMAGE_TIMEOUT_S = 60.0
#: Sealed: one tag more for each 16 MiB.
_HEAD_BYTES_MAX = (manifest.ARCHIVE_BYTES_MAX + manifest.MANIFEST_BYTES_MAX) * 1001 // 1000 + OVERHEAD_BYTES_MAX
_WORKING_SET_BYTES_MAX = manifest.WORKING_SET_BYTES_MAX * 1001 // 1000 + OVERHEAD_BYTES_MAX
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Fetched:
    """What was read from S3."""

    gets: int = 0
    bytes: int = 0


class Fetcher:
    """Gets checkpoints to this node."""

    def __init__(
        self,
        cache: ImageCache,
        store: ObjectStore,
        sealer: Sealer,
        generations: Generations,
        pager: Callable[[], PagerClient],
        tasks: TaskGroup,
        criu_version: str,
        parallel: int,
    ) -> None:
        self._cache = cache
        self._store = store
        self._sealer = sealer
        self._generations = generations
        self._pager = pager
        self._tasks = tasks
        self._criu_version = criu_version
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="fetch")

    async def current(
        self,
        function: Function,
        layers: asyncio.Future[RootLayers],
        clock: PhaseClock,
        fetched: Fetched,
        *,
        timeout_s: float | None = None,
    ) -> CachedImage | None:
        """The image of the checkpoint that the pointer names; None when there is none of this version of the function.

        Args:
            function, layers: whose.
            clock, fetched: get the phases, and what was read.
            timeout_s: longest wait for head and working set, if not :data:`_IMAGE_TIMEOUT_S`.

        Raises:
            AgentError, StoreError, OSError: it cannot be fetched, or not be restored here.
        """
        key = manifest.pointer_key(function.name)
        try:
            async with asyncio.timeout(_POINTER_IN_ALL_S):
                current, size = await self._blocking("fetch.pointer", clock, self._get_pointer, function.name)
        except ObjectMissing:
            return None
        except TimeoutError as error:
            text = f"the object store did not answer within {_POINTER_IN_ALL_S:.0f} s"
            raise StoreUnavailable(text, bucket=self._store.bucket, key=key) from error
        _count(fetched, size)
        if current.function_digest != function.digest:
            return None  # of an earlier version of the function: a new checkpoint will be made
        image = self._cache.get(current.checkpoint)
        if image is None:
            limit_s = _IMAGE_TIMEOUT_S if timeout_s is None else timeout_s
            image, checked = await self._fetch(current, layers, clock, fetched, limit_s)
        else:
            (checked,) = await asyncio.gather(self._check(image, layers, clock), return_exceptions=True)
        if current.files_digest != (await layers).files_digest:
            return None
        _match(image, current)
        image.generation = current.generation
        if checked is not None:
            raise checked
        return image

    def expect(self, function_name: str, generation: int) -> None:
        """Take no older pointer of this function from now on."""
        self._generations.expect(function_name, generation)

    def _get_pointer(self, function: str) -> tuple[Pointer, int]:
        data = self._store.get(manifest.pointer_key(function), size_max=pointer.BYTES_MAX, timeout_s=_POINTER_TIMEOUT_S)
        found = pointer.read(self._sealer, function, data)
        self._generations.accept(found)
        return found, len(data)

    async def held(self, function: Function, layers: asyncio.Future[RootLayers], clock: PhaseClock) -> CachedImage | None:
        """The newest whole checkpoint of this very function on this node, for when the pointer can't be read.

        Raises:
            AgentError: it can't be restored here.
        """
        files_digest = (await layers).files_digest
        wanted = (function.name, function.digest, files_digest)
        found = [
            image
            for image in self._cache
            if image.complete and (image.manifest.function, image.manifest.function_digest, image.manifest.files_digest) == wanted
        ]
        image = max(found, key=lambda item: item.manifest.created_ns, default=None)
        if image is not None:
            await self._check(image, layers, clock)
        return image

    def trouble(self) -> str:
        """Why the store is not asked now; empty: it is."""
        return self._store.guard.condition().reason

    async def _fetch(
        self, current: Pointer, layers: asyncio.Future[RootLayers], clock: PhaseClock, fetched: Fetched, timeout_s: float
    ) -> tuple[CachedImage, BaseException | None]:
        """Head and working set side by side; while the second is on its way the first is unpacked, opened by the pager, and checked.

        Returns:
            The image, now in the cache, and what is wrong with it on this host.
        """
        function, checkpoint = current.function, current.checkpoint
        working_set_key, head_key = manifest.working_set_key(function, checkpoint), manifest.head_key(function, checkpoint)
        working_set = self._get("fetch.working_set", working_set_key, _WORKING_SET_BYTES_MAX, clock, timeout_s)
        head = await asyncio.wrap_future(self._get("fetch.head", head_key, _HEAD_BYTES_MAX, clock, timeout_s))
        _count(fetched, len(head))
        image = await self._blocking("unpack.head", clock, self._begin, head_key, head, current)
        # Page maps: nobody waits for them before CRIU has restored half of the process.
        image.opening = self._tasks.spawn(self._open(image), f"opening of checkpoint {checkpoint}")
        # The thread waits for the working set, not the loop: that is one change of threads less.
        filled = asyncio.wrap_future(self._threads.submit(self._fill, image, working_set_key, working_set, clock))
        failure, checked = await asyncio.gather(filled, self._check(image, layers, clock), return_exceptions=True)
        if failure is not None:
            await self._abandon(image)
            raise failure
        self._cache.add(image)
        _count(fetched, len(working_set.result()))
        return image, checked

    async def _abandon(self, image: CachedImage) -> None:
        if image.opening is not None:
            await asyncio.wait([image.opening])
        if image.opened:
            with contextlib.suppress(AgentError):  # it is gone, or finds out by itself when the image is opened again
                await self._pager().close_image(image.checkpoint)
        await asyncio.wrap_future(self._threads.submit(self._cache.abandon, image))

    def _begin(self, key: str, head: bytes, current: Pointer) -> CachedImage:
        image = self._cache.begin(self._sealer.open(key, head), current.checkpoint)
        try:
            _match(image, current)
        except ImageInvalid:
            self._cache.abandon(image)
            raise
        return image

    def _fill(self, image: CachedImage, key: str, working_set: Future[bytes], clock: PhaseClock) -> None:
        sealed = working_set.result()
        with clock.phase("unpack"):
            self._cache.fill(image, self._sealer.open(key, sealed))

    async def _check(self, image: CachedImage, layers: asyncio.Future[RootLayers], clock: PhaseClock) -> None:
        search = (await layers).search
        await self._blocking("check_host", clock, host.check, image.manifest, search, self._criu_version)

    async def _open(self, image: CachedImage) -> None:
        pager = self._pager()
        try:
            await pager.open_image(image.checkpoint, image.directory, complete=False)
        except AgentError as error:
            logger.info("the pager opens checkpoint %s later: %s", image.checkpoint, error)  # with the start
        else:
            image.opened = pager is self._pager()  # a new pager knows nothing of it

    def _get(self, phase: str, key: str, size_max: int, clock: PhaseClock, timeout_s: float) -> Future[bytes]:
        def get() -> bytes:
            with clock.phase(phase):
                return self._store.get(key, size_max=size_max, timeout_s=timeout_s)

        return self._threads.submit(get)

    async def _blocking(self, phase: str, clock: PhaseClock, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def timed() -> T:
            with clock.phase(phase):
                return work(*args, **kwargs)

        return await asyncio.wrap_future(self._threads.submit(timed))


def _match(image: CachedImage, current: Pointer) -> None:
    """Whether the checkpoint is of what its pointer says.

    Raises:
        ImageInvalid: it is not.
    """
    found = image.manifest
    if (found.function, found.function_digest, found.files_digest) != (current.function, current.function_digest, current.files_digest):
        raise ImageInvalid("the pointer names a checkpoint of something else", function=current.function)


def _count(fetched: Fetched, size: int) -> None:
    fetched.gets += 1
    fetched.bytes += size
