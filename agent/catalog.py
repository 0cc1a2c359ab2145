"""What this node knows of each function: its root layers and its checkpoint.

In: Function documents, the pointer and objects in S3, images made here. Out: :class:`Resolution`, on which :mod:`agent.node` decides how a
start is done. Looking in S3 happens once per function (and again on each ``fetch`` command), never twice at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.errors import AgentError, ImageInvalid
from agent.pager.client import PagerClient
from agent.sandbox import rootfs
from agent.sandbox.rootfs import RootLayers
from agent.store import host, manifest
from agent.store.cache import CachedImage, ImageCache
from infra.errors import ObjectMissing, StoreError, StoreUnavailable
from infra.s3 import ObjectStore
from infra.settings import AgentSettings

logger = logging.getLogger(__name__)
#: Longest wait for the pointer, s: a start goes on without the checkpoint when the store is that slow.
_POINTER_TIMEOUT_S = 2.0
#: After S3 could not be asked, a start does not ask again for this long, s: it must not wait for a dead store each time.
_ASK_AGAIN_S = 5.0
_POINTER_BYTES_MAX = 4096
_COMPLETE_TIMEOUT_S = 600.0


@dataclass
class Fetched:
    """What a resolution read from S3."""

    gets: int = 0
    bytes: int = 0


@dataclass
class Resolution:
    """One function on this node."""

    digest: str
    layers: RootLayers
    image: CachedImage | None
    #: Why there is no image to restore from; empty when there is one or when none was ever made.
    reason: str = ""
    #: Monotonic seconds after which S3 is asked again; infinity when the answer was definite.
    ask_again_at: float = float("inf")


class Catalog:
    """Resolutions by function name."""

    def __init__(
        self,
        settings: AgentSettings,
        cache: ImageCache,
        store: ObjectStore,
        pager: Callable[[], PagerClient],
        layers: Path,
        criu_version: str,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._store = store
        self._pager = pager
        self._layers = layers
        self._criu_version = criu_version
        self._known: dict[str, Resolution] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def resolve(
        self, function: Function, *, refresh: bool = False, clock: PhaseClock | None = None, fetched: Fetched | None = None
    ) -> Resolution:
        """Root layers and the current checkpoint of ``function``, fetched to the node if need be.

        Args:
            function: the document.
            refresh: read files and pointer again even if they are known.
            clock: gets the phases ``resolve.wait``, ``files``, ``fetch.pointer``, ``fetch.head``, ``fetch.working_set`` when they happen.
            fetched: counts what is read from S3.

        Raises:
            FunctionInvalid: its files are not on this node. An unusable or unreachable checkpoint raises nothing: see ``reason``.
        """
        clock, fetched = clock or PhaseClock(), fetched or Fetched()
        lock = self._locks.setdefault(function.name, asyncio.Lock())
        waiting, since_ns = lock.locked(), time.time_ns()
        async with lock:
            if waiting:  # for a fetch of the same function that is under way
                clock.add("resolve.wait", since_ns, time.time_ns())
            known = self._known.get(function.name)
            if known and known.digest == function.digest and not refresh and time.monotonic() < known.ask_again_at:
                return known
            if known and known.digest == function.digest and not refresh:
                layers = known.layers
            else:
                with clock.phase("files"):
                    layers = await asyncio.to_thread(rootfs.prepare, function, self._layers)
            resolution = Resolution(function.digest, layers, None)
            if function.spec.policy.checkpoint != "off":
                try:
                    resolution.image = await self._image(function, layers, clock, fetched)
                except (StoreError, OSError) as error:
                    resolution.reason = f"the checkpoint cannot be fetched: {error}"
                    resolution.ask_again_at = time.monotonic() + _ASK_AGAIN_S
                except AgentError as error:
                    resolution.reason = str(error)
                if resolution.reason:
                    logger.warning("function %s is started cold on this node: %s", function.name, resolution.reason)
            self._known[function.name] = resolution
            return resolution

    def images(self) -> list[CachedImage]:
        """Checkpoints in the node's cache."""
        return list(self._cache)

    def made(self, function: Function, layers: RootLayers, image: CachedImage) -> None:
        """A checkpoint was made here."""
        self._known[function.name] = Resolution(function.digest, layers, image)

    def usable(self, function: Function, resolution: Resolution) -> tuple[CachedImage | None, str]:
        """The image to restore from, or None and why there is none (empty when none is wanted or none was ever made)."""
        image = resolution.image
        if function.spec.policy.checkpoint == "off":
            return None, ""
        if image is None:
            return None, resolution.reason
        if image.unusable:
            return None, f"checkpoint {image.checkpoint} is quarantined: {image.unusable}"
        if image.failures >= self._settings.quarantine_after:
            return None, f"checkpoint {image.checkpoint} is quarantined after {image.failures} failed restores"
        return image, ""

    async def open(self, image: CachedImage) -> None:
        """Make the image known to the pager."""
        if not image.opened:
            await self._pager().open_image(image.checkpoint, image.directory, complete=image.complete)
            image.opened = True

    async def complete(self, image: CachedImage) -> None:
        """Bring all pages of an image to the node; failures are logged and tried again with the next start."""
        if image.complete:
            return
        image.users += 1
        try:
            await self.open(image)
            await self._pager().complete_image(image.checkpoint, _COMPLETE_TIMEOUT_S)
            await asyncio.to_thread(image.mark_complete)
        except (AgentError, OSError) as error:
            logger.warning("checkpoint %s stays partly in S3: %s", image.checkpoint, error)
        finally:
            image.users -= 1

    async def evict(self, function_name: str) -> None:
        """Drop a function's image; its next start looks in S3 again.

        Raises:
            ImageInvalid: instances use it.
        """
        resolution = self._known.get(function_name)
        if resolution and resolution.image:
            await self._drop(resolution.image)
            resolution.image, resolution.ask_again_at = None, 0.0

    async def trim(self) -> None:
        """Drop what exceeds the cache's ceiling."""
        for image in self._cache.over_budget():
            with contextlib.suppress(ImageInvalid):
                await self._drop(image)
                for known in self._known.values():
                    if known.image is image:
                        known.image, known.ask_again_at = None, 0.0

    def pager_lost(self) -> None:
        """A new pager knows no image."""
        for image in self._cache:
            image.opened = False

    async def _drop(self, image: CachedImage) -> None:
        if image.users:
            raise ImageInvalid(f"checkpoint {image.checkpoint} is in use by {image.users} instances; release them first")
        if image.opened:
            image.opened = False
            await self._pager().close_image(image.checkpoint)
        await asyncio.to_thread(self._cache.evict, image.checkpoint)

    async def _image(self, function: Function, layers: RootLayers, clock: PhaseClock, fetched: Fetched) -> CachedImage | None:
        key = manifest.pointer_key(function.name)
        with clock.phase("fetch.pointer"):
            try:
                async with asyncio.timeout(_POINTER_TIMEOUT_S):
                    data = await asyncio.to_thread(self._store.get, key, size_max=_POINTER_BYTES_MAX)
            except ObjectMissing:
                return None
            except TimeoutError as error:
                text = f"the object store did not answer within {_POINTER_TIMEOUT_S:.0f} s"
                raise StoreUnavailable(text, bucket=self._store.bucket, key=key) from error
        fetched.gets += 1
        fetched.bytes += len(data)
        pointer = host.read_pointer(data)
        if (pointer.function_digest, pointer.files_digest) != (function.digest, layers.files_digest):
            return None  # of an earlier version of the function: a new checkpoint will be made
        image = self._cache.get(pointer.checkpoint)
        if image is None:
            image = await self._fetch(function.name, pointer.checkpoint, clock, fetched)
            if (image.manifest.function_digest, image.manifest.files_digest) != (function.digest, layers.files_digest):
                raise ImageInvalid("the pointer names a checkpoint of something else", function=function.name)
        with clock.phase("check_host"):
            await asyncio.to_thread(host.check, image.manifest, layers.search, self._criu_version)
        return image

    async def _fetch(self, function: str, checkpoint: str, clock: PhaseClock, fetched: Fetched) -> CachedImage:
        async def read(phase: str, key: str, size_max: int) -> bytes:
            with clock.phase(phase):
                data = await asyncio.to_thread(self._store.get, key, size_max=size_max)
            fetched.gets += 1
            fetched.bytes += len(data)
            return data

        head_bytes_max = manifest.ARCHIVE_BYTES_MAX + manifest.MANIFEST_BYTES_MAX
        head, working_set = await asyncio.gather(
            read("fetch.head", manifest.head_key(function, checkpoint), head_bytes_max),
            read("fetch.working_set", manifest.working_set_key(function, checkpoint), manifest.WORKING_SET_BYTES_MAX),
        )
        with clock.phase("unpack"):
            return await asyncio.to_thread(self._cache.fetch, head, working_set, checkpoint)
