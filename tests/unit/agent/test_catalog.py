"""From the store to the cache: once however many ask, whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import platform
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.api.function import Function, from_builtins
from agent.catalog import Catalog
from agent.errors import FunctionInvalid, ImageInvalid, PagerError
from agent.fetch import Fetcher
from agent.sandbox import rootfs
from agent.store import archive, chunks, manifest, pointer
from agent.store.cache import ImageCache
from agent.store.manifest import Blob, Extent, Manifest, Pages
from agent.store.pointer import Generations, Pointer
from agent.store.seal import Sealer
from infra import imagekeys
from infra.errors import ObjectMissing, StoreUnavailable
from infra.guard import Condition
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
        self.guard = self
        self.reason = ""

    def condition(self) -> Condition:
        return Condition(not self.reason, 0.0, self.reason)

    def get(self, key: str, *, size_max: int, timeout_s: float | None = None) -> bytes:
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
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open_image(self, image: str, directory: Path, *, complete: bool) -> None:
        assert (directory / "manifest").exists() and (directory / "img" / "pages-1.img").stat().st_size == 1 << 20
        if self.fails:
            raise PagerError("gone")
        self.opened.append(image)

    async def close_image(self, image: str) -> None:
        if self.fails:
            raise PagerError("gone")
        if image in self.opened:
            self.opened.remove(image)


class World:
    """A catalog and what is around it."""

    def __init__(self, folder: Path) -> None:
        self.store, self.pager, self.folder = Store(), Pager(), folder
        self.tasks = TaskGroup("test")
        self.published = 0
        self.cache = ImageCache(folder / "images", 1 << 30)
        self.source = folder / "source.py"
        self.source.write_text("print()")
        store: Any = self.store
        imagekeys.make(folder / "keys")
        self.sealer, self.generations = Sealer(folder / "keys"), Generations(folder / "generations")
        pager: Any = lambda: self.pager  # noqa: E731
        fetcher = Fetcher(self.cache, store, self.sealer, self.generations, pager, self.tasks, "4.2.1", 4)
        self.catalog = Catalog(
            AgentSettings(), self.cache, fetcher, pager, self.tasks, lambda function: rootfs.prepare(function, folder / "layers")
        )

    def function(self, **spec: Any) -> Function:
        files = [{"source": str(self.source), "target": "/srv/source.py"}]
        values = {"command": ["/bin/true"], "port": 80, "files": files, **spec}
        return from_builtins({"kind": "Function", "metadata": {"name": "it"}, "spec": values})

    def publish(self, function: Function, files_digest: str, /, **changes: Any) -> str:
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
            key=self.sealer.newest(),
        )
        encoded = manifest.encode(msgspec.structs.replace(made, **changes))
        name = manifest.name(encoded)
        self.put(manifest.head_key("it", name), manifest.pack_head(encoded, packed))
        self.put(manifest.working_set_key("it", name), working_set)
        self.point(function, files_digest, name)
        return name

    def put(self, key: str, plain: bytes) -> None:
        """Seal and store."""
        self.store.objects[key] = self.sealer.seal(key, plain, self.sealer.newest())

    def point(self, function: Function, files_digest: str, name: str, of: str = "it") -> None:
        """Store the pointer to a checkpoint."""
        self.published += 1
        current = Pointer(
            function=of, checkpoint=name, function_digest=function.digest, files_digest=files_digest, generation=self.published
        )
        self.store.objects[manifest.pointer_key("it")] = pointer.seal(self.sealer, current, self.sealer.newest())

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


def objects_of(world: World, name: str) -> dict[str, str]:
    return {
        "pointer": manifest.pointer_key("it"),
        "head": manifest.head_key("it", name),
        "working-set": manifest.working_set_key("it", name),
    }


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["pointer", "head", "working-set"]), position=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_any_flipped_bit_in_the_store_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, kind: str, position: int, bit: int) -> None:
    async def flip() -> None:
        world = World(tmp_path_factory.mktemp("flip"))
        function = world.function()
        key = objects_of(world, world.publish(function, await world.files_digest()))[kind]
        broken = bytearray(world.store.objects[key])
        broken[position % len(broken)] ^= 1 << bit
        world.store.objects[key] = bytes(broken)
        found = await world.catalog.resolve(function)
        assert found.image is None and found.reason
        assert world.left() == [] and world.pager.opened == []
        await world.tasks.close()

    asyncio.run(flip())


@pytest.mark.parametrize("kind", ["head", "working-set"])
async def test_objects_of_another_checkpoint_are_refused(world: World, kind: str) -> None:
    """Both are sealed, signed for and whole: only their place is wrong."""
    function = world.function()
    files_digest = await world.files_digest()
    older = objects_of(world, world.publish(function, files_digest, created_ns=1))[kind]
    newer = objects_of(world, world.publish(function, files_digest, created_ns=2))[kind]
    world.store.objects[newer] = world.store.objects[older]
    found = await world.catalog.resolve(function)
    assert found.image is None and "put in the place of another" in found.reason and world.left() == []


async def test_who_reads_the_ring_cannot_put_another_image_in_place(world: World) -> None:
    """Sealed anew under the right name, but not what the signed pointer names."""
    function = world.function()
    files_digest = await world.files_digest()
    older, newer = (world.publish(function, files_digest, created_ns=number) for number in (1, 2))
    for kind in ("head", "working-set"):
        old_key, key = objects_of(world, older)[kind], objects_of(world, newer)[kind]
        plain = bytes(world.sealer.open(old_key, world.store.objects[old_key]))
        if kind == "working-set":
            plain = chunks.pack_pages(PLAIN[::-1])
        before = world.store.objects[key]
        world.put(key, plain)
        found = await world.catalog.resolve(function, refresh=True)
        assert found.image is None and "digest does not match" in found.reason, kind
        world.store.objects[key] = before
    assert (await world.catalog.resolve(function, refresh=True)).image is not None


async def test_the_checkpoint_of_another_function_is_refused(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest(), function="at")
    found = await world.catalog.resolve(function)
    assert found.image is None and "names a checkpoint of something else" in found.reason
    assert world.cache.get(name) is None and world.left() == []


async def test_an_older_pointer_is_refused_until_a_newer_one_comes(world: World) -> None:
    function = world.function()
    files_digest = await world.files_digest()
    world.publish(function, files_digest, created_ns=1)
    old = world.store.objects[manifest.pointer_key("it")]
    world.publish(function, files_digest, created_ns=2)
    assert (await world.catalog.resolve(function)).image is not None
    world.store.objects[manifest.pointer_key("it")] = old
    found = await world.catalog.resolve(function, refresh=True)
    assert found.image is None and "rolled back: it is of generation 1" in found.reason and "has seen 2" in found.reason
    name = world.publish(function, files_digest, created_ns=3)
    image = (await world.catalog.resolve(function, refresh=True)).image
    assert image is not None and image.checkpoint == name


async def test_a_node_that_has_seen_nothing_is_told_what_others_have_seen(world: World) -> None:
    function = world.function()
    files_digest = await world.files_digest()
    world.publish(function, files_digest, created_ns=1)
    old = world.store.objects[manifest.pointer_key("it")]
    world.publish(function, files_digest, created_ns=2)
    new = world.store.objects[manifest.pointer_key("it")]
    world.catalog.expect("it", 2)
    world.store.objects[manifest.pointer_key("it")] = old
    found = await world.catalog.resolve(function)
    assert found.image is None and "rolled back: it is of generation 1" in found.reason and "another node has seen 2" in found.reason
    world.store.objects[manifest.pointer_key("it")] = new
    image = (await world.catalog.resolve(function, refresh=True)).image
    assert image is not None and image.generation == 2


async def test_an_unknown_key_is_named(world: World) -> None:
    function = world.function()
    world.publish(function, await world.files_digest())
    key = world.sealer.newest()
    shutil.rmtree(world.folder / "keys")
    imagekeys.make(world.folder / "keys")
    world.sealer.read()
    found = await world.catalog.resolve(function)
    assert found.image is None and f"sealed with the key '{key}'" in found.reason
    (world.folder / "keys" / "ring").unlink()
    found = await world.catalog.resolve(function, refresh=True)
    assert found.image is None and "keys/ring" in found.reason


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


async def test_without_a_store_a_whole_checkpoint_of_this_node_serves(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    image = (await world.catalog.resolve(function)).image
    assert image is not None
    world.catalog.forget("it")  # as the next agent on this node, which finds the cache and knows nothing else
    world.store.down = True
    partly = await world.catalog.resolve(function)
    assert partly.image is None and "cannot be fetched" in partly.reason
    image.mark_complete()
    whole = await world.catalog.resolve(function, refresh=True)
    assert whole.image is image and image.checkpoint == name
    assert world.catalog.usable(function, whole) == (image, whole.reason) and "down" in whole.reason
    other = await world.catalog.resolve(world.function(port=81))
    assert other.image is None, "never one of another version of the function"


async def test_a_checkpoint_that_is_partly_here_is_not_used_while_the_rest_cannot_be_had(world: World) -> None:
    function = world.function()
    world.publish(function, await world.files_digest())
    found = await world.catalog.resolve(function)
    assert world.catalog.usable(function, found) == (found.image, "")
    world.store.reason = "no answer"
    image, reason = world.catalog.usable(function, found)
    assert image is None and "only partly on this node" in reason and "no answer" in reason
    assert found.image is not None
    found.image.mark_complete()
    assert world.catalog.usable(function, found) == (found.image, "")


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


async def test_a_pager_that_is_gone_does_not_fail_the_eviction(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    assert (await world.catalog.resolve(function)).image is not None
    world.pager.fails = True
    world.pager.lost.set_result(None)
    await world.catalog.evict("it")
    assert world.left() == [] and world.cache.get(name) is None


async def test_what_the_pager_does_not_close_is_not_deleted(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    assert (await world.catalog.resolve(function)).image is not None
    world.pager.fails = True
    with pytest.raises(ImageInvalid, match="cannot be closed"):
        await world.catalog.evict("it")
    assert world.left() == [name]
    world.pager.fails = False
    assert (await world.catalog.resolve(function)).image is world.cache.get(name) is not None


async def test_what_an_earlier_agent_had_opened_is_closed_too(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    image = (await world.catalog.resolve(function)).image
    assert image is not None and world.pager.opened == [name]
    image.opened, image.opening = False, None  # all that the next agent knows
    await world.catalog.evict("it")
    assert world.pager.opened == [] and world.left() == []


async def test_an_image_that_is_evicted_while_it_is_found_is_not_given_out(world: World) -> None:
    function = world.function()
    name = world.publish(function, await world.files_digest())
    image = (await world.catalog.resolve(function)).image
    assert image is not None
    layers, held = world.catalog._layers, threading.Event()

    def slowly(function: Function) -> rootfs.RootLayers:
        assert held.wait(5)
        return layers(function)

    world.catalog._layers = slowly
    world.catalog.forget("it")
    other = asyncio.gather(world.catalog.resolve(function))
    await asyncio.sleep(0.1)  # it has the image, and waits for the files
    await world.catalog._drop(image)
    held.set()
    (found,) = await other
    assert found.image is None, "its directory is gone"
    assert (await world.catalog.resolve(function)).image is world.cache.get(name) is not None
