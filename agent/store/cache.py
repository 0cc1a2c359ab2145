"""Checkpoints on this node: one directory each, verified before use, least recently used dropped first.

In: directories made by :mod:`agent.checkpoint`, or objects fetched from S3. Out: :class:`CachedImage` for :mod:`agent.restore` and the
pager. What is here is plain, for root's eyes only: an instance's memory is as plain beside it. Layout of a directory::

    manifest          the encoded manifest, its digest is the directory's name
    archive           the packed archive of the head object, to verify the two below after a restart
    layer             file changes, unpacked into each sandbox
    img/              CRIU's metadata images and sparse pages files
    complete          present when every page is here; without it only the working set is sure to be
    boot              the boot of this machine in which all of this was verified and written
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import ImageInvalid
from agent.store import archive, chunks, manifest
from agent.store.manifest import Manifest
from infra.local.processes import boot_id

logger = logging.getLogger(__name__)
MANIFEST, ARCHIVE, LAYER, IMAGES, COMPLETE, BOOT = "manifest", "archive", "layer", "img", "complete", "boot"


@dataclass
class CachedImage:
    """One checkpoint on this node."""

    checkpoint: str
    manifest: Manifest
    directory: Path
    complete: bool
    #: Starts and instances that use it now; it is not evicted meanwhile.
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    #: Failed restores in a row that were the image's fault.
    failures: int = 0
    #: Why nothing is restored from it any more: a page of it cannot be had.
    unusable: str = ""
    #: Of the pointer that named it; 0: it was not read since the agent began.
    generation: int = 0
    #: The pager has it open.
    opened: bool = False
    #: The pager is opening it.
    opening: asyncio.Task[None] | None = None

    @property
    def images(self) -> Path:
        """CRIU's image directory."""
        return self.directory / IMAGES

    @property
    def layer(self) -> Path:
        """The layer's file."""
        return self.directory / LAYER

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep it from being evicted for the length of a block."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def mark_complete(self) -> None:
        """Note, for a later agent too, that every page is here."""
        (self.directory / COMPLETE).touch()
        self.complete = True


class ImageCache:
    """The node's checkpoints. Methods block; callers use worker threads for all but lookups."""

    def __init__(self, root: Path, bytes_max: int) -> None:
        self._root = root
        self._bytes_max = bytes_max
        self._images: dict[str, CachedImage] = {}
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)

    def __iter__(self) -> Iterator[CachedImage]:
        return iter(list(self._images.values()))

    def get(self, checkpoint: str) -> CachedImage | None:
        """A checkpoint that is here."""
        return self._images.get(checkpoint)

    def adopt(self) -> list[CachedImage]:
        """Take over what an earlier agent left; what does not verify is deleted.

        What was written since the machine was started is what the earlier agent had verified. Of anything older each byte is verified
        again, because a machine that went down may have lost some of it; and what was only partly fetched then is not taken.
        """
        boot = boot_id()
        for path in sorted(self._root.iterdir()):
            if path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                found = manifest.decode((path / MANIFEST).read_bytes(), path.name)
                complete = (path / COMPLETE).exists()
                if (path / BOOT).read_text() != boot:
                    if not complete:
                        raise ImageInvalid("it was only partly fetched")
                    _verify_pages(path / IMAGES, found)
                    packed = (path / ARCHIVE).read_bytes()
                    manifest.verify(packed, found.archive, f"the archive of checkpoint {path.name}")
                    archive.unpack(packed, found.archive.unpacked, path / IMAGES, path / LAYER)
                    (path / BOOT).write_text(boot)
            except (OSError, ImageInvalid) as error:
                logger.info("checkpoint %s in the node's cache is dropped: %s", path.name, error)
                shutil.rmtree(path, ignore_errors=True)
                continue
            self._images[path.name] = CachedImage(path.name, found, path, complete)
        return list(self._images.values())

    def new_directory(self) -> Path:
        """A place to build an image in; insert or delete it."""
        return Path(tempfile.mkdtemp(prefix=".building-", dir=self._root))

    def insert(self, building: Path, encoded_manifest: bytes, *, complete: bool) -> CachedImage:
        """Give a built directory its name."""
        name = manifest.name(encoded_manifest)
        existing = self._images.get(name)
        if existing is not None:
            shutil.rmtree(building, ignore_errors=True)
            return existing
        (building / MANIFEST).write_bytes(encoded_manifest)
        if complete:
            (building / COMPLETE).touch()
        (building / BOOT).write_text(boot_id())
        final = self._root / name
        building.rename(final)
        image = CachedImage(name, manifest.decode(encoded_manifest, name), final, complete)
        self._images[name] = image
        return image

    def begin(self, head: bytes | bytearray, checkpoint: str) -> CachedImage:
        """Begin the image of a checkpoint from its head: everything but page contents, under its name.

        Returns:
            An image that is not yet in the cache, though the pager may open it: :meth:`fill` and :meth:`add` it, or :meth:`abandon` it.

        Raises:
            ImageInvalid: the head is not what the checkpoint's name says. OSError: no room on the disk.
        """
        found, encoded, packed = manifest.unpack_head(head, checkpoint)
        image = CachedImage(checkpoint, found, self._root / checkpoint, complete=False)
        try:
            shutil.rmtree(image.directory, ignore_errors=True)  # of a fetch that an agent did not live to finish
            image.directory.mkdir()
            (image.directory / MANIFEST).write_bytes(encoded)
            (image.directory / ARCHIVE).write_bytes(packed)
            image.images.mkdir()
            archive.unpack(packed, found.archive.unpacked, image.images, image.layer)
            for key, pages in found.pages.items():
                with (image.images / f"pages-{key}.img").open("xb") as file:
                    file.truncate(pages.size)
        except BaseException:
            self.abandon(image)
            raise
        return image

    def fill(self, image: CachedImage, working_set: bytes | bytearray) -> None:
        """Put the working set in place.

        Raises:
            ImageInvalid: the working set is not what the manifest says. OSError: no room on the disk.
        """
        found = image.manifest
        what = f"the working set of checkpoint {image.checkpoint}"
        manifest.verify(working_set, found.working_set, what)
        plain = memoryview(chunks.unpack_pages(working_set, found.working_set.unpacked, what))
        files = {int(key): os.open(image.images / f"pages-{key}.img", os.O_WRONLY | os.O_CLOEXEC) for key in found.pages}
        try:
            at = 0
            for extent in found.extents:
                _write(files[extent.pages_id], plain[at : at + extent.size], extent.offset)
                at += extent.size
        finally:
            for fd in files.values():
                os.close(fd)

    def add(self, image: CachedImage) -> None:
        """Take a whole image into the cache; only now an agent that comes later would."""
        (image.directory / BOOT).write_text(boot_id())
        self._images[image.checkpoint] = image

    def abandon(self, image: CachedImage) -> None:
        """Remove an image that was begun and not added."""
        shutil.rmtree(image.directory, ignore_errors=True)

    def evict(self, checkpoint: str) -> bool:
        """Drop a checkpoint that nothing uses; False when something does."""
        image = self._images.get(checkpoint)
        if image is None:
            return True
        if image.users:
            return False
        del self._images[checkpoint]
        # The name is free at once: the checkpoint may be fetched again while its many pages are still being deleted.
        dropped = self.new_directory()
        image.directory.rename(dropped)
        shutil.rmtree(dropped, ignore_errors=True)
        return True

    def over_budget(self) -> list[CachedImage]:
        """Unused images to evict, least recently used first, until the rest fits."""
        total = sum(image.manifest.image_bytes for image in self._images.values())
        victims = []
        for image in sorted(self._images.values(), key=lambda item: item.used_at):
            if total <= self._bytes_max:
                break
            if not image.users:
                victims.append(image)
                total -= image.manifest.image_bytes
        return victims


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _verify_pages(images: Path, found: Manifest) -> None:
    for key, pages in found.pages.items():
        path = images / f"pages-{key}.img"
        if path.stat().st_size != pages.size:
            raise ImageInvalid(f"{path.name} has another size than the manifest says")
        with path.open("rb") as source:
            for index, expected in enumerate(pages.chunks):
                data = source.read(found.chunk_bytes)
                actual = chunks.digest(data)
                if actual != expected:
                    raise ImageInvalid(f"chunk {index} of {path.name} is corrupt")
