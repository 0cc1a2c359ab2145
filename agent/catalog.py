"""What this node knows of each function: its root layers and its checkpoint.

In: Function documents, the pointer and objects in S3, images made here. Out: :class:`Resolution`, on which :mod:`agent.node` decides how a
start is done. Looking in S3 (:mod:`agent.fetch`) happens once per function (and again on each ``fetch`` command), never twice at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.errors import AgentError, ImageInvalid, PagerError
from agent.fetch import Fetched, Fetcher
from agent.pager.client import PagerClient
from agent.sandbox.rootfs import RootLayers
from agent.store.cache import CachedImage, ImageCache
from infra.errors import StoreError
from infra.settings import AgentSettings
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
#: After S3 could not be asked, a start does not ask again for this long, s: it must not wait for a dead store each time.
_ASK_AGAIN_S = 5.0
_COMPLETE_TIMEOUT_S = 600.0


@dataclass
class Resolution:
    """One function on this node."""

    digest: str
    layers: RootLayers
    image: CachedImage | None
    #: Why there is no image to restore from, or why it may not be the current one; empty when it is, or when none was ever made.
    reason: str = ""
    #: Monotonic seconds after which S3 is asked again; infinity when the answer was definite.
    ask_again_at: float = float("inf")


class Catalog:
    """Resolutions by function name."""

    def __init__(
        self,
        settings: AgentSettings,
        cache: ImageCache,
        fetcher: Fetcher,
        pager: Callable[[], PagerClient],
        tasks: TaskGroup,
        layers: Callable[[Function], RootLayers],
    ) -> None:
        """Begin with nothing known.

        Args:
            settings, cache, fetcher, pager, tasks: what the node works with.
            layers: finds a function's root files; may block, and raises FunctionInvalid or NoRoom.
        """
        self._settings = settings
        self._cache = cache
        self._pager = pager
        self._tasks = tasks
        self._layers = layers
        self._fetcher = fetcher
        self._known: dict[str, Resolution] = {}
        self._resolving: dict[tuple[str, str], asyncio.Task[Resolution | AgentError]] = {}

    async def resolve(
        self,
        function: Function,
        *,
        refresh: bool = False,
        clock: PhaseClock | None = None,
        fetched: Fetched | None = None,
        timeout_s: float | None = None,
    ) -> Resolution:
        """Root layers and the current checkpoint of ``function``, fetched to the node if need be.

        However many starts ask at once, files and checkpoint are read once; a start that gives up does not stop that for the others.

        Args:
            function: the document.
            refresh: read files and pointer again even if they are known.
            clock: gets the phases ``resolve.wait``, ``files``, ``fetch.pointer``, ``fetch.head``, ``unpack.head``,
                ``pager.open``, ``fetch.working_set``, ``unpack`` and ``check_host`` when they happen.
            fetched: counts what is read from S3.
            timeout_s: longest wait for a checkpoint on its way from S3; of whoever asks first.

        Raises:
            FunctionInvalid, NoRoom: its files are not on this node. An unusable or unreachable checkpoint raises nothing: see ``reason``.
        """
        clock, fetched = clock or PhaseClock(), fetched or Fetched()
        key = (function.name, function.digest)
        if key in self._resolving:
            with clock.phase("resolve.wait"):
                await asyncio.wait([self._resolving[key]])
        known = self._known.get(function.name)
        if known and known.digest == function.digest and not refresh and time.monotonic() < known.ask_again_at:
            return known
        if key not in self._resolving:
            work = self._resolve(function, None if refresh else known, clock, fetched, timeout_s)
            self._resolving[key] = self._tasks.spawn(work, f"resolution of {function.name}")
            self._resolving[key].add_done_callback(lambda _: self._resolving.pop(key, None))
        found = await asyncio.shield(self._resolving[key])
        if isinstance(found, AgentError):
            raise found
        return found

    async def _resolve(
        self, function: Function, known: Resolution | None, clock: PhaseClock, fetched: Fetched, timeout_s: float | None
    ) -> Resolution | AgentError:
        before = self._known.get(function.name)
        layers = self._root_layers(function, known, clock)
        image, reason, ask_again_at = None, "", float("inf")
        try:
            if function.spec.policy.checkpoint == "off":
                ask_again_at = 0.0  # nothing was asked
            else:
                image = await self._fetcher.current(function, layers, clock, fetched, timeout_s=timeout_s)
        except (StoreError, OSError) as error:
            reason = f"the checkpoint cannot be fetched: {error}"
            ask_again_at = time.monotonic() + _ASK_AGAIN_S
            with contextlib.suppress(AgentError):  # told below, or of no use on this host
                image = await self._fetcher.held(function, layers, clock)
        except AgentError as error:
            reason = str(error)
        try:
            resolution = Resolution(function.digest, await layers, image, reason, ask_again_at)
        except AgentError as error:
            return error
        if image is not None and self._cache.get(image.checkpoint) is not image:
            # Evicted since it was found: nobody had taken it yet. The next start fetches it again.
            resolution.image, resolution.reason, resolution.ask_again_at = None, "the checkpoint was evicted meanwhile", 0.0
        if reason:
            how = "from the checkpoint that is here" if image is not None else "cold"
            logger.warning("function %s is started %s on this node: %s", function.name, how, reason)
        if self._known.get(function.name) is before:  # else a checkpoint was made here meanwhile
            self._known[function.name] = resolution
        return resolution

    def _root_layers(self, function: Function, known: Resolution | None, clock: PhaseClock) -> asyncio.Future[RootLayers]:
        loop = asyncio.get_running_loop()
        if known and known.digest == function.digest:
            layers: asyncio.Future[RootLayers] = loop.create_future()
            layers.set_result(known.layers)
            return layers

        def prepare() -> RootLayers:
            with clock.phase("files"):
                return self._layers(function)

        return loop.run_in_executor(None, prepare)

    def images(self) -> list[CachedImage]:
        """Checkpoints in the node's cache."""
        return list(self._cache)

    def made(self, function: Function, layers: RootLayers, image: CachedImage) -> None:
        """A checkpoint was made here."""
        self._known[function.name] = Resolution(function.digest, layers, image)

    def expect(self, function_name: str, generation: int) -> None:
        """Another node has told of a pointer of this generation: no older one is taken."""
        self._fetcher.expect(function_name, generation)

    def forget(self, function_name: str) -> None:
        """A function's root has changed under the same document: find out again with its next start."""
        self._known.pop(function_name, None)

    def usable(self, function: Function, resolution: Resolution) -> tuple[CachedImage | None, str]:
        """The image to restore from, or None and why there is none (empty when none is wanted or none was ever made).

        An image that may not be the current one comes with the reason too.
        """
        image = resolution.image
        if function.spec.policy.checkpoint == "off":
            return None, ""
        if image is None:
            return None, resolution.reason
        if image.unusable:
            return None, f"checkpoint {image.checkpoint} is quarantined: {image.unusable}"
        if image.failures >= self._settings.quarantine_after:
            return None, f"checkpoint {image.checkpoint} is quarantined after {image.failures} failed restores"
        if not image.complete and (trouble := self._fetcher.trouble()):
            # Its instance would wait for pages that don't come, and be ended with the requests that it has accepted.
            return None, f"checkpoint {image.checkpoint} is only partly on this node, and the rest cannot be fetched: {trouble}"
        return image, resolution.reason

    async def open(self, image: CachedImage) -> None:
        """Make the image known to the pager."""
        if image.opening is not None:
            with contextlib.suppress(AgentError):  # then once more, for this start
                await asyncio.shield(image.opening)
            image.opening = None
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

    async def trim(self) -> None:
        """Drop what exceeds the cache's ceiling."""
        for image in self._cache.over_budget():
            with contextlib.suppress(ImageInvalid):
                await self._drop(image)

    def pager_lost(self) -> None:
        """A new pager knows no image."""
        for image in self._cache:
            image.opened = False

    async def _drop(self, image: CachedImage) -> None:
        if image.users:
            raise ImageInvalid(f"checkpoint {image.checkpoint} is in use by {image.users} instances; release them first")
        for known in self._known.values():  # first, so that no start takes what is being deleted
            if known.image is image:
                known.image, known.ask_again_at = None, 0.0
        if image.opening is not None:
            await asyncio.wait([image.opening])
        image.opened = False
        pager = self._pager()
        try:
            # Also when it was not opened by this agent: a pager outlives its agent.
            await pager.close_image(image.checkpoint)
        except PagerError as error:
            if not pager.lost.done():
                raise ImageInvalid(f"checkpoint {image.checkpoint} cannot be closed: {error}") from error
            # The next pager knows nothing of the image.
        await asyncio.to_thread(self._cache.evict, image.checkpoint)
