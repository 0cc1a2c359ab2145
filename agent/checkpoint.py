"""The checkpoint sequence: from a function to a published, warmed-up image.

In: a function and its layers. Out: an image in the node's cache, its objects in S3, and the pointer moved last. Steps: start a donor,
warm it up, freeze and dump it, restore the dump a few times with an empty working set to see which pages the first requests touch and
which the next ones, pack, seal, upload. Each step is timed; a failure leaves nothing on the node, and in S3 at most chunks that no manifest
names.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.cold import start_cold
from agent.criu import freezable, images, tool
from agent.instance import Workshop
from agent.pager.client import PagerClient
from agent.ready import warm_up
from agent.restore import Restoration, start_restored
from agent.sandbox.rootfs import RootLayers
from agent.store import archive, chunks, host, manifest, pointer, workingset
from agent.store.cache import ARCHIVE, IMAGES, LAYER, MANIFEST, CachedImage, ImageCache
from agent.store.chunks import ChunkStore
from agent.store.manifest import Blob, Manifest, Pages, Span
from agent.store.pointer import Generations
from agent.store.seal import Sealer
from agent.store.workingset import Recording
from infra.s3 import ObjectStore

logger = logging.getLogger(__name__)
WARM_UP_TIMEOUT_S = 30.0
#: In a manifest that is not finished.
_NOTHING = Blob(0, bytes(32), 0)
#: Longest time for which the use after the first requests is recorded, s.
_USE_S = 10.0


class Checkpointer:
    """Makes checkpoints on one node."""

    def __init__(
        self,
        workshop: Workshop,
        cache: ImageCache,
        store: ObjectStore,
        sealer: Sealer,
        generations: Generations,
        pager: Callable[[], PagerClient],
        criu_version: str,
    ) -> None:
        self._workshop = workshop
        self._cache = cache
        self._store = store
        self._sealer = sealer
        self._generations = generations
        self._pager = pager
        self._criu_version = criu_version

    async def make(
        self, function: Function, layers: RootLayers, name: str, deadline_ns: int, *, heal: bool = False
    ) -> tuple[CachedImage, dict[str, float]]:
        """Make and publish a checkpoint.

        Args:
            function, layers: what to freeze.
            name: prefix of the instances that this needs.
            deadline_ns: wall clock ns at which to give up.
            heal: the checkpoint before had a page that cannot be had: store every chunk anew.

        Returns:
            The image in the node's cache, and the seconds of each step.

        Raises:
            AgentError, StoreError, OSError: a step failed; nothing of it is left on the node.
        """
        clock = PhaseClock()
        building = await asyncio.to_thread(self._cache.new_directory)
        try:
            (building / IMAGES).mkdir()
            draft = await self._freeze(function, layers, f"{name}-donor", building, deadline_ns, clock)
            recording = await self._record(function, layers, f"{name}-recording", building, draft, deadline_ns, clock)
            with clock.phase("pack"):
                finished, working_set = await asyncio.to_thread(_pack, building, draft, recording)
                encoded = manifest.encode(finished)
            with clock.phase("upload"):
                await asyncio.to_thread(self._upload, building, finished, encoded, working_set, heal)
            with clock.phase("publish"):
                published = await asyncio.to_thread(
                    pointer.publish, self._store, self._sealer, self._generations, finished, manifest.name(encoded)
                )
            image = await asyncio.to_thread(self._cache.insert, building, encoded, complete=True)
            image.generation = published.generation
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, building, True)
            raise
        seconds = {phase.name: round((phase.end_ns - phase.start_ns) / 1e9, 3) for phase in clock.phases}
        return image, seconds

    async def _freeze(
        self, function: Function, layers: RootLayers, donor_id: str, building: Path, deadline_ns: int, clock: PhaseClock
    ) -> Manifest:
        """Start, warm up and dump a donor; returns the manifest as far as it is known."""
        with clock.phase("start"):
            donor = await start_cold(self._workshop, function, layers, donor_id, deadline_ns, PhaseClock(), donor=True)
        try:
            with clock.phase("warm_up"):
                await warm_up(donor.sandbox.address, function, WARM_UP_TIMEOUT_S)
            await asyncio.to_thread(freezable.check, donor.sandbox.processes())
            with clock.phase("mapped_files"):
                mapped = await asyncio.to_thread(host.mapped_files, donor.sandbox.processes(), layers.search)
            donor.sandbox.lift_memory_limit()
            with clock.phase("dump"):
                left_s = max(1.0, (deadline_ns - time.time_ns()) / 1e9)
                furnisher = self._workshop.furnisher
                await tool.dump(donor.sandbox, furnisher.criu_fd, furnisher.features, donor.root_pid, building / IMAGES, left_s)
            with clock.phase("pack_files"):
                await asyncio.to_thread(_loosen_files, building / IMAGES, donor.sandbox.foreign)
                layer = await asyncio.to_thread(donor.sandbox.pack_files, layers)
        finally:
            await donor.stop(self._workshop)
        (building / LAYER).write_bytes(layer)
        with clock.phase("digest"):
            pages = await asyncio.to_thread(_digest_pages, building / IMAGES)
        return Manifest(
            function=function.name,
            function_digest=function.digest,
            files_digest=layers.files_digest,
            created_ns=time.time_ns(),
            criu=self._criu_version,
            kernel=platform.release(),
            machine=platform.machine(),
            cpu_flags=list(host.cpu_flags()),
            root_pid=donor.root_pid,
            outputs=list(donor.outputs),
            mapped_files=mapped,
            archive=_NOTHING,
            working_set=_NOTHING,
            extents=[],
            fresh={},
            pages=pages,
            image_bytes=sum(item.size for item in pages.values()),
            key=await asyncio.to_thread(self._newest_key),
        )

    async def _record(
        self,
        function: Function,
        layers: RootLayers,
        instance_id: str,
        building: Path,
        draft: Manifest,
        deadline_ns: int,
        clock: PhaseClock,
    ) -> Recording:
        """Restore the dump as often as set, with the pager noting each page that is touched; the last one also sees the whole warm-up."""
        encoded = manifest.encode(draft)
        (building / MANIFEST).write_bytes(encoded)
        image = CachedImage(manifest.name(encoded), draft, building, complete=True)
        pager = self._pager()
        trials, used = [], []
        with clock.phase("record"):
            opened = functools.partial(pager.open_image, image.checkpoint, building, complete=True)
            try:
                for number in range(max(1, self._workshop.settings.recordings)):
                    what = Restoration(image, function, layers, f"{instance_id}-{number}", deadline_ns, opened, record=True)
                    instance = await start_restored(self._workshop, pager, what, PhaseClock())
                    try:
                        await warm_up(instance.sandbox.address, function, WARM_UP_TIMEOUT_S, repeat=False)
                        trials.append(await pager.touched(instance.id))
                        if number + 1 == self._workshop.settings.recordings:
                            with contextlib.suppress(TimeoutError):
                                async with asyncio.timeout(_USE_S):
                                    await warm_up(instance.sandbox.address, function, WARM_UP_TIMEOUT_S)
                            used = await pager.touched(instance.id)
                    finally:
                        await instance.stop(self._workshop)
            finally:
                await pager.close_image(image.checkpoint)
        return Recording(trials, used)

    def _newest_key(self) -> str:
        self._sealer.read()
        return self._sealer.newest()

    def _upload(self, building: Path, finished: Manifest, encoded: bytes, working_set: bytes, heal: bool) -> None:
        place = ChunkStore(self._store, self._sealer, finished.function, finished.key)
        suspects = place.suspects()
        own = frozenset(place.key(digest) for pages in finished.pages.values() for digest in pages.chunks if digest is not None)
        if heal or suspects & own:
            suspects = own  # where one chunk went bad others may have: not all of them need have been read
        with ThreadPoolExecutor(self._workshop.settings.store_parallel, thread_name_prefix="upload") as pool:
            jobs = []
            for key, pages in finished.pages.items():
                path = building / IMAGES / f"pages-{key}.img"
                for index, digest in enumerate(pages.chunks):
                    if digest is not None:
                        offset = index * finished.chunk_bytes
                        jobs.append(pool.submit(_upload_chunk, place, path, offset, finished.chunk_bytes, digest, suspects))
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        name = manifest.name(encoded)
        head = manifest.pack_head(encoded, (building / ARCHIVE).read_bytes())
        self._put(manifest.working_set_key(finished.function, name), working_set, finished.key)
        self._put(manifest.head_key(finished.function, name), head, finished.key)

    def _put(self, key: str, plain: bytes, key_id: str) -> None:
        self._store.put(key, self._sealer.seal(key, plain, key_id))


def _upload_chunk(place: ChunkStore, path: Path, offset: int, size: int, digest: bytes, suspects: frozenset[str]) -> None:
    with path.open("rb") as source:
        source.seek(offset)
        place.upload(digest, source.read(size), suspects)


def _pack(building: Path, draft: Manifest, recording: Recording) -> tuple[Manifest, bytes]:
    """Finish the manifest; returns it and the working-set object."""
    known, working_set = workingset.pack(building / IMAGES, draft, recording)
    packed, plain_bytes = archive.pack(building / IMAGES, (building / LAYER).read_bytes())
    (building / ARCHIVE).write_bytes(packed)
    blob = Blob(len(packed), hashlib.sha256(packed).digest(), plain_bytes)
    return msgspec.structs.replace(known, archive=blob, image_bytes=known.image_bytes + plain_bytes), working_set


def _loosen_files(directory: Path, foreign: Callable[[str], bool]) -> None:
    path = directory / "files.img"
    path.write_bytes(images.loosen_files(path.read_bytes(), foreign))


def _digest_pages(directory: Path) -> dict[str, Pages]:
    found = {}
    for pages_id in sorted({page_map.pages_id for page_map in images.read_page_maps(directory).values()}):
        path = directory / f"pages-{pages_id}.img"
        digests: list[bytes | None] = []
        zeros: workingset.Spans = []
        with path.open("rb") as source:
            while piece := source.read(manifest.CHUNK_BYTES):
                at = len(digests) * manifest.CHUNK_BYTES
                zeros.extend((at + start, at + end) for start, end in workingset.zero_runs(piece))
                digests.append(chunks.digest(piece))
        spans = [Span(start, end - start) for start, end in workingset.merge(zeros)]
        found[str(pages_id)] = Pages(path.stat().st_size, digests, spans)
    return found
