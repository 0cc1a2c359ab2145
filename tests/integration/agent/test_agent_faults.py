"""Faults around the agent: corrupt and missing objects, a full disk, a store that is not there, hostile peers."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.api.connection import connect
from agent.api.messages import CheckpointPublished, CommandFailed, Evict, Evicted, Fetch, InstanceExited, MakeCheckpoint, Release
from agent.store import garbage, manifest, pointer
from agent.store.chunks import ChunkStore
from agent.store.seal import Sealer
from infra import imagekeys
from infra.s3 import ObjectStore
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, a_function, ask, host_leftovers, running_agent
from thaw.cli import cli

pytestmark = [pytest.mark.root, pytest.mark.stack]


@pytest.fixture
def store(stack_settings: Settings) -> ObjectStore:
    return ObjectStore(stack_settings.s3)


def flip(store: ObjectStore, key: str) -> None:
    data = bytearray(store.get(key, size_max=1 << 30))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


@pytest.fixture
def sealer(stack_settings: Settings) -> Sealer:
    imagekeys.make(stack_settings.image_keys)
    return Sealer(stack_settings.image_keys)


async def evicted(agent: AgentUnderTest, name: str) -> None:
    """Empty the node's cache of a function; a download of the start before may still use the image."""
    async with asyncio.timeout(30):
        while not isinstance(await agent.call(Evict, function_name=name), Evicted):
            await asyncio.sleep(0.1)


async def test_one_flipped_byte_is_noticed_and_the_start_is_cold(stack_settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    function = a_function(tmp_path, "flip")
    async with running_agent(stack_settings, tmp_path / "flip") as agent:
        published = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(published, CheckpointPublished), published
        name = published.checkpoint.checkpoint
        for kind, key in {
            "pointer": manifest.pointer_key(function.name),
            "head": manifest.head_key(function.name, name),
            "working-set": manifest.working_set_key(function.name, name),
        }.items():
            whole = store.get(key, size_max=1 << 30)
            await evicted(agent, function.name)
            flip(store, key)
            report = await agent.start_instance(function)
            assert report.record.start_mode == "cold", kind
            assert "is corrupt, or was put in the place of another" in report.record.fallback_reason, report.record.fallback_reason
            assert (await ask(report))["ok"]
            store.put(key, whole)
            await agent.call(Release, instance=report.instance.instance)
            # It was the store's fault for that moment: nothing is held against the checkpoint.
            await evicted(agent, function.name)
            assert (await agent.call(Fetch, function=function)).checkpoint.checkpoint == name
        assert (await agent.start_instance(function)).record.start_mode in ("remote", "restore")


async def test_images_are_sealed_and_old_or_foreign_ones_refused(
    stack_settings: Settings, store: ObjectStore, sealer: Sealer, tmp_path: Path
) -> None:
    """What is in memory is nowhere in the store; nobody can put an older checkpoint, another function's, or his own in place."""
    secret = "a-secret-that-is-in-memory"
    function, other = (a_function(tmp_path, name, environment={"SECRET": secret}) for name in ("sealed", "foreign"))
    async with running_agent(stack_settings, tmp_path / "sealed") as agent:

        async def cold_because(text: str) -> None:
            await evicted(agent, "sealed")
            assert (await agent.call(Fetch, function=function)).checkpoint is None
            report = await agent.start_instance(function)
            assert report.record.start_mode == "cold" and text in report.record.fallback_reason, report.record.fallback_reason
            assert (await ask(report))["ok"]
            await agent.call(Release, instance=report.instance.instance)

        assert isinstance(await agent.call(MakeCheckpoint, function=other), CheckpointPublished)
        first = (await agent.call(MakeCheckpoint, function=function)).checkpoint.checkpoint
        keys = {key: key.split("/") for key in store.list("functions/sealed/")}
        assert {parts[2] for parts in keys.values()} == {"current", "chunks", first} and store.list("chunks/") == []
        objects = [store.get(key, size_max=1 << 30) for key in keys]
        assert all(data.startswith(b"THAWSEAL\3") and secret.encode() not in data for data in objects)
        assert secret.encode() in b"".join(path.read_bytes() for path in (agent.state / "agent" / "images" / first / "img").iterdir())

        pointer_key = manifest.pointer_key("sealed")
        old = store.get(pointer_key, size_max=4096)
        published = (await agent.call(MakeCheckpoint, function=function)).checkpoint
        second, generation = published.checkpoint, published.generation
        new = store.get(pointer_key, size_max=4096)
        store.put(pointer_key, old)
        await cold_because("was rolled back")
        store.put(pointer_key, store.get(manifest.pointer_key("foreign"), size_max=4096))
        await cold_because("put in the place of another")
        store.put(pointer_key, new)
        second_head = store.get(manifest.head_key("sealed", second), size_max=1 << 30)
        store.put(manifest.head_key("sealed", second), store.get(manifest.head_key("sealed", first), size_max=1 << 30))
        await cold_because("put in the place of another")
        store.put(manifest.head_key("sealed", second), second_head)

        await agent.stop(signal.SIGKILL)  # what was seen is on the disk
        await agent.start()
        store.put(pointer_key, old)
        await cold_because("was rolled back")

        # A node that has seen nothing is told by the scaler what others have seen.
        await agent.stop(signal.SIGKILL)
        shutil.rmtree(agent.state / "agent" / "generations")
        await agent.start()
        assert (await agent.call(Fetch, function=function, generation=generation)).checkpoint is None
        await cold_because("another node has seen")

        # A new checkpoint heals it, whatever is there.
        third = (await agent.call(MakeCheckpoint, function=function)).checkpoint.checkpoint
        assert pointer.read(sealer, "sealed", store.get(pointer_key, size_max=4096)).checkpoint == third
        assert (await agent.start_instance(function)).record.start_mode == "restore"

        # Those before can go, after a while, and nothing of the third with them.
        said = collected(stack_settings, "sealed")
        assert said == "sealed: 0 objects would go (0.0 MB), checkpoints kept: 2\n", said  # the second was rolled back when the third came
        later_s = time.time() + 2 * garbage.GRACE_MIN_S
        found = garbage.find(store, sealer, "sealed", later_s, garbage.GRACE_MIN_S)
        assert found.kept == {third} and garbage.delete(store, found, 4) == len(found.objects) >= 4
        left = set(store.list("functions/sealed/"))
        assert {key.split("/")[2] for key in left} == {"current", "chunks", third}
        await agent.stop()
        shutil.rmtree(agent.state / "agent" / "images")
        await agent.start()
        report = await agent.start_instance(function)
        assert (report.record.start_mode, report.record.checkpoint) == ("remote", third), report.record.fallback_reason
        assert all([(await ask(report, f"/{page}"))["ok"] for page in range(0, 2000, 20)])


def collected(settings: Settings, function: str) -> str:
    """What ``thaw checkpoints gc`` says."""
    given = {
        "s3.endpoint_url": settings.s3.endpoint_url,
        "s3.access_key": settings.s3.access_key,
        "s3.secret_key": settings.s3.secret_key,
        "images.keys": settings.image_keys,
    }
    flags = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(cli, [*flags, "checkpoints", "gc", "--dry-run", "--function", function])
    assert done.exit_code == 0, done.output
    return done.output


async def test_keys_are_rotated_under_a_running_agent(stack_settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    imagekeys.make(keys)
    function = a_function(tmp_path, "rotated")
    async with running_agent(stack_settings, tmp_path / "rotate", **{"images.keys": str(keys)}) as agent:
        old = await agent.call(MakeCheckpoint, function=function)
        chunks = set(store.list("functions/rotated/chunks/"))
        old_key, new_key = next(iter(imagekeys.load(keys).ring)), imagekeys.add_ring_key(keys)
        imagekeys.add_signing_key(keys)
        await evicted(agent, "rotated")
        restored = await agent.start_instance(function)
        assert (restored.record.start_mode, restored.record.checkpoint) == ("remote", old.checkpoint.checkpoint), restored.record
        assert all([(await ask(restored, f"/{page}"))["ok"] for page in range(0, 2000, 100)]), "the pager opens chunks of the old key"
        await agent.call(Release, instance=restored.instance.instance)
        new = await agent.call(MakeCheckpoint, function=function)
        head = store.get(manifest.head_key("rotated", new.checkpoint.checkpoint), size_max=1 << 30)
        assert new_key.encode() in head[:64] and old_key.encode() not in head[:64]
        assert len(set(store.list("functions/rotated/chunks/")) - chunks) >= len(chunks) // 2, "chunks are named by the new key"
        await evicted(agent, "rotated")
        report = await agent.start_instance(function)
        assert (report.record.start_mode, report.record.checkpoint) == ("remote", new.checkpoint.checkpoint)
        await agent.call(Release, instance=report.instance.instance)

        # Without its key a checkpoint is of no use, and the start says which key that was.
        ring = keys / "ring"
        lines = ring.read_text().splitlines(keepends=True)
        ring.write_text(lines[0])
        await agent.stop()
        await agent.start()
        await evicted(agent, "rotated")
        report = await agent.start_instance(function)
        assert report.record.start_mode == "cold" and f"sealed with the key '{new_key}'" in report.record.fallback_reason
        refused = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(refused, CommandFailed) and (refused.reason, new_key in refused.message) == ("key_unknown", True), refused


async def test_an_agent_without_keys_of_a_cluster_does_not_start(stack_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"keys of images cannot be read: .*none/ring.*thaw keys make"):
        async with running_agent(stack_settings, tmp_path / "keyless", **{"images.keys": str(tmp_path / "none")}):
            pass


async def test_a_missing_object_is_named_and_the_start_is_cold(stack_settings: Settings, store: ObjectStore, tmp_path: Path) -> None:
    function = a_function(tmp_path, "missing")
    async with running_agent(stack_settings, tmp_path / "missing") as agent:
        published = await agent.call(MakeCheckpoint, function=function)
        await agent.call(Evict, function_name="missing")
        store.delete(manifest.head_key("missing", published.checkpoint.checkpoint))
        report = await agent.start_instance(function)
        assert report.record.start_mode == "cold"
        assert f"s3://{store.bucket}/functions/missing/" in report.record.fallback_reason


async def test_a_corrupt_chunk_never_reaches_a_process_and_the_next_checkpoint_heals_it(
    stack_settings: Settings, store: ObjectStore, sealer: Sealer, tmp_path: Path
) -> None:
    function = a_function(tmp_path, "chunk", pages=6000)
    async with running_agent(stack_settings, tmp_path / "chunk") as agent:
        published = await agent.call(MakeCheckpoint, function=function)
        await agent.call(Evict, function_name="chunk")
        corrupt = far_from_the_working_set(store, sealer, "chunk", published.checkpoint.checkpoint)
        assert len(corrupt) > 10
        for key in corrupt:
            flip(store, key)
        report = await agent.start_instance(function)
        assert report.record.start_mode == "remote", report.record.fallback_reason
        answers = []
        for page in range(0, 6000, 100):
            try:
                answers.append((await ask(report, f"/{page}"))["ok"])
            except OSError:
                break
        assert all(answers) and len(answers) < 60, "no page of a corrupt chunk is ever seen"
        gone = await agent.wait(lambda message: isinstance(message, InstanceExited))
        assert gone.instance == report.instance.instance
        again = await agent.start_instance(function)
        assert again.record.start_mode == "cold" and "quarantined" in again.record.fallback_reason
        assert all([(await ask(again, f"/{page}"))["ok"] for page in range(0, 6000, 500)])
        # The new checkpoint has most of its chunks in common with the corrupt one.
        assert isinstance(await agent.call(MakeCheckpoint, function=function), CheckpointPublished)
        await agent.call(Evict, function_name="chunk")
        healed = await agent.start_instance(function)
        assert healed.record.start_mode == "remote", healed.record.fallback_reason
        assert all([(await ask(healed, f"/{page}"))["ok"] for page in range(0, 6000, 100)])


def far_from_the_working_set(store: ObjectStore, sealer: Sealer, function: str, checkpoint: str) -> set[str]:
    """Keys of chunks without a page of the working set.

    The first response may need a page that no recording has seen. It is in a chunk with others that were seen, and if that were corrupt,
    the start would rightly be a cold one.
    """
    key = manifest.head_key(function, checkpoint)
    found, _, _ = manifest.unpack_head(sealer.open(key, store.get(key, size_max=1 << 30)), checkpoint)
    near = {
        (extent.pages_id, offset // found.chunk_bytes)
        for extent in found.extents
        for offset in range(extent.offset, extent.offset + extent.size, manifest.PAGE)
    }
    place = ChunkStore(store, sealer, function, found.key)
    return {
        place.key(digest)
        for key, pages in found.pages.items()
        for index, digest in enumerate(pages.chunks)
        if digest is not None and (int(key), index) not in near
    }


async def test_a_full_disk_fails_the_checkpoint_clearly_and_starts_go_on(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "full")
    images = tmp_path / "full" / "agent" / "images"
    images.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", images], check=True)
    try:
        async with running_agent(stack_settings, tmp_path / "full") as agent:
            report = await agent.call(MakeCheckpoint, function=function)
            assert isinstance(report, CommandFailed) and "No space left" in report.message, report
            assert list(images.iterdir()) == []
            assert (await agent.start_instance(function)).record.start_mode == "cold"
    finally:
        subprocess.run(["umount", images], check=True)
    assert host_leftovers(agent) == []


async def test_a_dump_is_not_charged_to_the_function(stack_settings: Settings, tmp_path: Path) -> None:
    """With images on a tmpfs the kernel once killed the donor in the middle of its dump: its memory and the image were over its limit."""
    function = a_function(tmp_path, "charged", pages=30_000, limits={"memoryMb": 192})
    images = tmp_path / "charged" / "agent" / "images"
    images.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", images], check=True)
    try:
        async with running_agent(stack_settings, tmp_path / "charged") as agent:
            report = await agent.call(MakeCheckpoint, function=function)
            assert isinstance(report, CheckpointPublished), report
            restored = await agent.start_instance(function)
            assert restored.record.start_mode == "restore" and (await ask(restored, "/29999"))["ok"]
    finally:
        subprocess.run(["umount", images], check=True)


async def test_without_a_store_starts_are_cold_and_say_so(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "nostore")
    async with running_agent(stack_settings, tmp_path / "nostore", **{"s3.endpoint_url": "http://127.0.0.1:9"}) as agent:
        report = await agent.start_instance(function)
        assert report.record.start_mode == "cold"
        assert "127.0.0.1:9" in report.record.fallback_reason or "did not answer" in report.record.fallback_reason
        failed = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(failed, CommandFailed) and "s3.endpoint_url" in failed.message
        await agent.call(Release, instance=report.instance.instance)
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_wrong_credentials_are_told(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "denied", **{"s3.secret_key": "wrong"}) as agent:
        report = await agent.start_instance(a_function(tmp_path, "denied"))
        assert report.record.start_mode == "cold"
        assert "refuses the credentials" in report.record.fallback_reason


async def test_what_cannot_be_frozen_is_named(stack_settings: Settings, tmp_path: Path) -> None:
    program = (
        "import runpy, socket, sys; it = socket.create_server(('127.0.0.1', 7070)); held = socket.create_connection(it.getsockname());"
        "sys.argv = ['x', '10']; runpy.run_path('/srv/server.py')"
    )
    function = a_function(tmp_path, "frozen", command=["/usr/bin/python3", "-c", program])
    async with running_agent(stack_settings, tmp_path / "frozen") as agent:
        report = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(report, CommandFailed) and report.reason == "not_freezable" and "127.0.0.1:7070" in report.message, report
        assert (await agent.start_instance(function)).record.start_mode == "cold"
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_strangers_on_the_port_change_nothing(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "strangers") as agent:
        where = json.loads((agent.state / "agent.json").read_text())
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\0\0\0\1\xc1", b""):
            reader, writer = await asyncio.open_connection(where["host"], where["port"])
            writer.write(noise)
            writer.write_eof()
            async with asyncio.timeout(10):
                await reader.read()
            writer.close()
        watcher, _ = await connect(where["host"], where["port"], "w", "watcher", agent.credentials("watcher"))
        report = await agent.start_instance(a_function(tmp_path, "strangers"))
        names = []
        while "EndpointUp" not in names:
            message = await watcher.receive()
            names.append(type(message).__name__)
        assert names == ["Endpoints", "EndpointUp"]
        watcher.send(Release(id="x", deadline_ns=0, instance=report.instance.instance))
        assert await watcher.receive() is None, "a watcher gives no orders"
        assert (await ask(report))["ok"]
        await watcher.close()


async def test_an_image_that_fails_again_and_again_is_quarantined(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "spoiled")
    async with running_agent(stack_settings, tmp_path / "spoiled") as agent:
        published = await agent.call(MakeCheckpoint, function=function)
        directory = agent.state / "agent" / "images" / published.checkpoint.checkpoint / "img"
        (directory / "core-1000.img").write_bytes(b"spoiled")
        reasons = []
        for _ in range(4):
            report = await agent.start_instance(function)
            assert report.record.start_mode == "cold" and (await ask(report))["ok"]
            reasons.append(report.record.fallback_reason)
            await agent.call(Release, instance=report.instance.instance)
        assert all(reason.startswith("criu: criu restore failed") for reason in reasons[:3]), reasons
        assert "quarantined after 3 failed restores" in reasons[3]
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_two_agents_share_neither_bridge_nor_addresses(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "one") as agent:
        with pytest.raises(AssertionError, match=r"another agent of this machine has agent\.bridge=thawtest0"):
            async with running_agent(stack_settings, tmp_path / "two"):
                pass
        with pytest.raises(AssertionError, match=r"198\.19\.0\.0/16 are in use on thawtest0 .* set agent\.subnet"):
            async with running_agent(stack_settings, tmp_path / "three", **{"agent.bridge": "thawtest1"}):
                pass
        assert (await ask(await agent.start_instance(a_function(tmp_path, "one"))))["ok"]
