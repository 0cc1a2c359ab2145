"""From the store to the cache: once however many ask, whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import platform
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from agent.api.function import Function, from_builtins
from agent.catalog import Catalog
from agent.errors import FunctionInvalid, ImageInvalid, PagerError
from agent.sandbox import rootfs
from agent.store import archive, chunks, host, manifest
from agent.store.cache import ImageCache
from agent.store.manifest import Blob, Extent, Manifest, Pages
from infra.errors import ObjectMissing, StoreUnavailable
from infra.settings import AgentSettings
from infra.tasks import TaskGroup

PLAIN = bytes(range(256)) * 32


class Store:
    """An object store in memory that counts, and that can be held or fail."""

    bucket = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.gets: Counter[str] = Counter()
        self.open = threading.Event()
        self.open.set()
        self.down = False

    def get(self, key: str, *, size_max: int) -> bytes:
        self.gets[key.rsplit("/", 1)[1]] += 1
        assert self.open.wait(5)
        if self.down:
            raise StoreUnavailable("down", bucket=self.bucket, key=key)
        if key not in self.objects:
            raise ObjectMissing("there is no such object", bucket=self.bucket, key=key)
        return self.objects[key]


class Pager:
    """Remembers what is open."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.fails = False

    async def open_image(self, image: str, directory: Path, *, complete: bool) -> None:
        assert (directory / "manifest").exists() and (directory / "img" / "pages-1.img").stat().st_size == 1 << 20
        if self.fails:
            raise PagerError("gone")
        self.opened.append(image)

    async def close_image(self, image: str) -> None:
        self.opened.remove(image)


class World:
    """A catalog and what is around it."""

    def __init__(self, folder: Path) -> None:
        self.store, self.pager, self.folder = Store(), Pager(), folder
        self.tasks = TaskGroup("test")
        self.cache = ImageCache(folder / "images", 1 << 30)
        self.source = folder / "source.py"
        self.source.write_text("print()")
        store: Any = self.store
        self.catalog = Catalog(
            AgentSettings(),
            self.cache,
            store,
            lambda: self.pager,
            self.tasks,
            lambda function: rootfs.prepare(function, folder / "layers"),
            "4.2.1",  # type: ignore[arg-type, return-value]
        )

    def function(self, **spec: Any) -> Function:
        files = [{"source": str(self.source), "target": "/srv/source.py"}]
        values = {"command": ["/bin/true"], "port": 80, "files": files, **spec}
        return from_builtins({"kind": "Function", "metadata": {"name": "it"}, "spec": values})

    def publish(self, function: Function, files_digest: str, **changes: Any) -> str:
        """Store a checkpoint; returns its name."""
        images = self.folder / "made"
        images.mkdir(exist_ok=True)
        (images / "core-1.img").write_bytes(b"core")
        packed, plain_bytes = archive.pack(images, b"")
        working_set = chunks.pack_pages(PLAIN)
        made = Manifest(
            function=function.name,
            function_digest=function.digest,
            files_digest=files_digest,
            created_ns=1,
            criu="4.2.1",
            kernel="6.18",
            machine=platform.machine(),
            cpu_flags=[],
            root_pid=1000,
            outputs=[],
            mapped_files=[],
            archive=Blob(len(packed), hashlib.sha256(packed).digest(), plain_bytes),
            working_set=Blob(len(working_set), hashlib.sha256(working_set).digest(), len(PLAIN)),
            extents=[Extent(1, 0, 4096), Extent(1, 65536, 4096)],
            fresh={},
            pages={"1": Pages(1 << 20, [b"\1" * 32])},
            image_bytes=1 << 20,
        )
        encoded = manifest.encode(msgspec.structs.replace(made, **changes))
        name = manifest.name(encoded)
        self.store.objects |= {
            manifest.pointer_key("it"): msgpack.packb(msgspec.to_builtins(host.pointer(made, name))),
            manifest.head_key("it", name): manifest.pack_head(encoded, packed),
            manifest.working_set_key("it", name): working_set,
        }
        return name

    async def files_digest(self) -> str:
        """Of the function's files; found out as the agent does."""
        return (await self.catalog.resolve(self.function(policy={"checkpoint": "off"}))).layers.files_digest

    def left(self) -> list[str]:
        return [path.name for path in (self.folder / "images").iterdir()]


@pytest.fixture
async def world(tmp_path: Path) -> Any:
    made = World(tmp_path)
    yield made
    await made.tasks.close()


async def test_a_hundred_starts_share_one_fetch(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    found = await asyncio.gather(*(world.catalog.resolve(function) for _ in range(100)))
    assert {id(item.image) for item in found} == {id(world.cache.get(name))} and not found[0].reason
    assert world.store.gets == {"current": 1, "head": 1, "working-set": 1}
    assert world.pager.opened == [name] and found[0].image is not None and found[0].image.opened
    pages = found[0].image.images / "pages-1.img"
    assert pages.read_bytes()[:4096] == PLAIN[:4096] and pages.read_bytes()[65536 : 65536 + 4096] == PLAIN[4096:]
    assert (found[0].image.images / "core-1.img").read_bytes() == b"core"


async def test_a_start_that_gives_up_does_not_stop_the_fetch_for_others(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    world.store.open.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await world.catalog.resolve(function)
    other = asyncio.gather(world.catalog.resolve(function))
    await asyncio.sleep(0.05)
    world.store.open.set()
    (found,) = await other
    assert found.image is world.cache.get(name) is not None
    assert world.store.gets == {"current": 1, "head": 1, "working-set": 1}


@pytest.mark.parametrize("kind", ["head", "working-set"])
async def test_what_is_corrupt_leaves_nothing(world: World, kind: str) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    key = f"functions/it/{name}/{kind}"
    world.store.objects[key] = world.store.objects[key][:-1] + b"?"
    found = await world.catalog.resolve(function)
    assert found.image is None and "corrupt" in found.reason
    assert world.left() == [] and world.pager.opened == []


@pytest.mark.parametrize("change", [{"criu": "3.17"}, {"machine": "pdp11"}, {"cpu_flags": ["none_has_this"]}])
async def test_what_cannot_be_restored_here_is_told(world: World, change: dict[str, Any]) -> None:
    function = world.function()
    world.publish(function, await world.files_digest(), **change)
    found = await world.catalog.resolve(function)
    assert found.image is None and str(next(iter(change.values()))).strip("[]'") in found.reason


async def test_a_checkpoint_of_other_files_is_not_taken(world: World) -> None:
    function = world.function()
    world.publish(function, "0" * 64)
    found = await world.catalog.resolve(function)
    assert found.image is None and found.reason == ""
    world.publish(function, found.layers.files_digest)
    assert (await world.catalog.resolve(function)).image is None, "what is known is not asked again"
    assert (await world.catalog.resolve(function, refresh=True)).image is not None


async def test_a_store_that_is_down_is_asked_again_only_after_a_while(world: World) -> None:
    function = world.function()
    world.publish(function, await world.files_digest())
    world.store.down = True
    found = [await world.catalog.resolve(function) for _ in range(3)]
    assert all("cannot be fetched" in item.reason for item in found) and world.store.gets["current"] == 1
    world.store.down = False
    found[0].ask_again_at = 0.0
    assert (await world.catalog.resolve(function)).image is not None


async def test_files_that_are_missing_are_told_to_every_start(world: World) -> None:
    function = world.function(files=[{"source": "/nowhere", "target": "/srv/x"}])
    world.publish(function, "0" * 64)
    found = await asyncio.gather(*(world.catalog.resolve(function) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(item, FunctionInvalid) and "/nowhere" in str(item) for item in found), found


async def test_an_evicted_image_is_fetched_again(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    image = (await world.catalog.resolve(function)).image
    assert image is not None
    image.users = 1
    with pytest.raises(ImageInvalid, match="in use by 1"):
        await world.catalog.evict("it")
    assert (await world.catalog.resolve(function)).image is image
    image.users = 0
    await world.catalog.evict("it")
    assert world.left() == [] and world.pager.opened == []
    assert (await world.catalog.resolve(function)).image is not None and world.left() == [name]
    assert world.store.gets["working-set"] == 2


async def test_a_pager_that_is_gone_does_not_fail_the_fetch(world: World) -> None:
    function = world.function()
    world.publish(function, await world.files_digest())
    world.pager.fails = True
    image = (await world.catalog.resolve(function)).image
    assert image is not None and not image.opened
    world.pager.fails = False
    await world.catalog.open(image)
    assert world.pager.opened == [image.checkpoint]
