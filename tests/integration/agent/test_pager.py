"""The pager with a real kernel and without CRIU: what it puts where, and what its death changes (nothing)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.criu import protobuf
from agent.errors import PagerError
from agent.pager import client
from agent.pager.client import PagerClient, Served
from agent.store import chunks, manifest, workingset
from agent.store.manifest import Blob, Fresh, Manifest, Pages, Span
from infra.settings import AgentSettings, S3Settings
from tests.integration.agent import lazy_process
from tests.integration.agent.lazy_process import BASE, PAGE, PID, content

pytestmark = [pytest.mark.root]
PAGES = 4096


def an_image(directory: Path, *, prefetch: list[tuple[int, int]], ahead: list[tuple[int, int]] = (), pages: int = PAGES) -> str:  # type: ignore[assignment]
    """An image of one process; runs are (page, pages). Returns its name."""
    images = directory / "img"
    images.mkdir(parents=True)
    data = b"".join(content(number) for number in range(pages))
    (images / "pages-1.img").write_bytes(data)
    page_map = struct.pack("<II", 0x54564319, 0x56084025)
    for entry in ({1: 1}, {1: BASE, 2: pages, 4: 6}):
        encoded = protobuf.encode(entry)
        page_map += struct.pack("<I", len(encoded)) + encoded
    (images / f"pagemap-{PID}.img").write_bytes(page_map)
    pieces = [data[at : at + manifest.CHUNK_BYTES] for at in range(0, len(data), manifest.CHUNK_BYTES)]
    zeros = [Span(start, end - start) for start, end in workingset.zero_runs(data)]
    encoded = manifest.encode(
        Manifest(
            function="f", function_digest="", files_digest="", created_ns=0, key="", criu="",
            kernel="", machine="", cpu_flags=[], root_pid=1,
            outputs=[], mapped_files=[], archive=Blob(0, b"\0" * 32, 0), working_set=Blob(0, b"\0" * 32, 0), extents=[],
            fresh={str(PID): [Fresh(BASE + first * PAGE, count * PAGE) for first, count in prefetch]},
            pages={"1": Pages(len(data), [chunks.digest(piece) for piece in pieces], zeros, [Span(a * PAGE, n * PAGE) for a, n in ahead])},
            image_bytes=len(data),
        )
    )  # fmt: skip
    (directory / "manifest").write_bytes(encoded)
    return manifest.name(encoded)


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


class Lazy:
    """One lazily filled process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def tell(self, order: str, timeout_s: float = 10.0) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(order.encode() + b"\n")
        return await self.answer(timeout_s)

    async def answer(self, timeout_s: float = 10.0) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            return (await self.process.stdout.readline()).decode().strip()


class Bench:
    """A pager, an image and processes."""

    def __init__(self, folder: Path, settings: AgentSettings) -> None:
        self.folder, self.settings = folder, settings
        self.pager: PagerClient
        self.image = ""
        self.count = 0
        self.stalled: list[str] = []
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        self.pager = await PagerClient.start(
            S3Settings(), self.folder / "keys", self.settings, self.folder / "agent" / "pager.sock", self.folder / "pager.log"
        )

    async def open(self, **image: Any) -> None:
        self.image = an_image(self.folder / "image", **image)
        await self.pager.open_image(self.image, self.folder / "image", complete=True)

    def fetch_again(self) -> None:
        """The image's directory is another one, and no page of it is here yet."""
        shutil.rmtree(self.folder / "image")
        assert an_image(self.folder / "image", prefetch=[]) == self.image
        hole = self.folder / "image" / "img" / "pages-1.img"
        hole.write_bytes(b"")
        os.truncate(hole, PAGES * PAGE)

    async def restore(self, *, record: bool = False, finish: bool = True, pages: int = PAGES) -> tuple[str, Lazy]:
        self.count += 1
        name = f"restore-{self.count}"
        work = self.folder / name
        work.mkdir()
        served = Served(self.stalled.append)
        await self.pager.serve(name, self.image, work, served, record=record, prefetch=not record)
        process = await asyncio.create_subprocess_exec(
            sys.executable, lazy_process.__file__, str(work), str(pages), stdin=-1, stdout=-1, start_new_session=True
        )
        self.processes.append(process)
        lazy = Lazy(process)
        assert await lazy.answer() == "ready"
        if finish:
            assert await lazy.tell("finish") == "ok"
            await self.pager.prefetched(name, 5.0)
        return name, lazy

    def kill_worker(self) -> None:
        os.kill(self.pager.worker_pid, signal.SIGKILL)

    async def new_worker(self, old: int) -> None:
        async with asyncio.timeout(5):
            while self.pager.worker_pid == old:
                await asyncio.sleep(0.001)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pager.pid}/fd"))

    async def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await self.pager.close()
        assert not alive(self.pager.pid) and not alive(self.pager.worker_pid)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, AgentSettings(fill_mb_per_s=0, orphan_s=1.0))
    await bench.start()
    try:
        yield bench
    finally:
        await bench.close()


async def test_pages_are_right_and_the_working_set_is_there_first(bench: Bench) -> None:
    await bench.open(prefetch=[(0, 3), (10, 20), (100, 1)])
    name, lazy = await bench.restore()
    stats = await bench.pager.stats(name)
    assert stats["pages_prefetched"] == 24 and stats["pages_faulted"] == 0
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"
    assert await lazy.tell("fork 3") == "ok"


async def test_a_fault_in_a_recorded_run_brings_the_run(bench: Bench) -> None:
    await bench.open(prefetch=[], ahead=[(1000, 40)])
    name, lazy = await bench.restore()
    assert await lazy.tell("check 1003 1 1") == "ok"
    await asyncio.sleep(0.05)
    assert await lazy.tell("check 1000 40 1") == "ok"
    assert (await bench.pager.stats(name))["pages_faulted"] == 1


async def test_a_recording_names_each_page(bench: Bench) -> None:
    await bench.open(prefetch=[])
    name, lazy = await bench.restore(record=True)
    assert await lazy.tell("check 5 3 1") == "ok"
    assert {(PID, BASE + page * PAGE) for page in (5, 6, 7)} <= set(await bench.pager.touched(name))
    old = bench.pager.worker_pid
    bench.kill_worker()
    await bench.new_worker(old)
    with pytest.raises(PagerError, match="interrupted"):
        await bench.pager.touched(name)


async def test_a_killed_worker_changes_no_page(bench: Bench) -> None:
    await bench.open(prefetch=[(0, 30)])
    names = [await bench.restore() for _ in range(3)]
    before, workers = bench.descriptors(), set()
    for turn in range(20):
        old = bench.pager.worker_pid
        workers.add(old)
        for _, lazy in names:
            page = 100 + turn * 150
            assert await lazy.tell(f"drop {page} 5") == "ok"
            assert await lazy.tell(f"move {page + 20} 10") == "ok"
            assert await lazy.tell(f"unmap {page + 40} 5") == "ok"
        checks = [
            asyncio.create_task(lazy.tell("fork 5" if turn % 3 == 0 else "threads" if turn % 3 == 1 else "check 0 4000 7"))
            for _, lazy in names
        ]
        await asyncio.sleep(0.002 * (turn % 5))
        bench.kill_worker()
        assert await asyncio.gather(*checks) == ["ok"] * 3
        await bench.new_worker(old)
    await asyncio.sleep(2.5)  # ended children are found by a sweep
    assert len(workers) == 20 and bench.descriptors() <= before
    for name, lazy in names:
        assert await lazy.tell("check 0 5000 1") == "ok"
        await bench.pager.release(name)


async def test_a_fork_that_was_read_right_before_the_kill_is_served(bench: Bench) -> None:
    """The child's descriptor is known to the dead worker alone, from a message that is read only once."""
    await bench.open(prefetch=[])
    _, lazy = await bench.restore()
    for turn in range(10):
        old = bench.pager.worker_pid
        os.kill(old, signal.SIGSTOP)
        forking = asyncio.create_task(lazy.tell("fork 5"))
        await asyncio.sleep(0.01)
        os.kill(old, signal.SIGCONT)
        await asyncio.sleep(turn * 0.0004)
        os.kill(old, signal.SIGKILL)
        assert await forking == "ok"
        await bench.new_worker(old)
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"


async def test_a_restore_goes_on_when_the_worker_dies_in_the_middle(bench: Bench) -> None:
    await bench.open(prefetch=[(0, 500)])
    name, lazy = await bench.restore(finish=False)
    old = bench.pager.worker_pid
    bench.kill_worker()
    assert await lazy.tell("finish") == "ok"
    await bench.pager.prefetched(name, 5.0)
    assert bench.pager.worker_pid != old
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"


async def test_the_next_agent_takes_over(bench: Bench) -> None:
    await bench.open(prefetch=[(0, 10)])
    name, lazy = await bench.restore()
    keeper = bench.pager.pid
    bench.pager.abandon()
    assert await lazy.tell("check 0 1000 3") == "ok"
    await bench.start()
    assert bench.pager.taken_over and bench.pager.pid == keeper
    assert await bench.pager.restores() == [{"restore": name, "image": bench.image, "finished": True, "stalled": ""}]
    await bench.pager.open_image(bench.image, bench.folder / "image", complete=True)
    with pytest.raises(PagerError, match="instances are served"):
        await bench.pager.close_image(bench.image)
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"
    await bench.pager.release(name)
    assert await bench.pager.restores() == []


async def test_an_image_that_was_deleted_and_fetched_again_is_another_one(bench: Bench) -> None:
    """As by the next agent, which does not know what the pager has open: what was here of the first one is not here of the second."""
    await bench.open(prefetch=[])
    await bench.pager.complete_image(bench.image, 5.0)
    bench.fetch_again()
    await bench.pager.open_image(bench.image, bench.folder / "image", complete=False)
    with pytest.raises(PagerError):  # there is no store
        await bench.pager.complete_image(bench.image, 0.5)
    name, _ = await bench.restore(finish=False)
    shutil.rmtree(bench.folder / "image")
    assert an_image(bench.folder / "image", prefetch=[]) == bench.image
    with pytest.raises(PagerError, match="instances are served"):
        await bench.pager.open_image(bench.image, bench.folder / "image", complete=True)
    await bench.pager.release(name)


async def test_a_worker_that_reads_of_an_earlier_image_of_the_same_name_does_not_believe_it(bench: Bench) -> None:
    """What the journal says of what was here then says nothing of what was fetched since: no page of it is here."""
    await bench.open(prefetch=[])
    name, lazy = await bench.restore()
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"
    await bench.pager.release(name)
    await bench.pager.close_image(bench.image)
    bench.fetch_again()
    await bench.pager.open_image(bench.image, bench.folder / "image", complete=False)
    old = bench.pager.worker_pid
    bench.kill_worker()
    await bench.new_worker(old)
    with pytest.raises(PagerError):  # there is no store
        await bench.pager.complete_image(bench.image, 0.5)


async def test_an_agent_of_another_version_takes_no_page_along(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.open(prefetch=[])
    _, lazy = await bench.restore()
    keeper = bench.pager.pid
    bench.pager.abandon()
    monkeypatch.setattr(client, "PROTOCOL", 99)
    await bench.start()
    assert not bench.pager.taken_over and bench.pager.pid != keeper and await bench.pager.restores() == []
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok", "the pager before serves it to its end"
    lazy.process.kill()
    await lazy.process.wait()
    async with asyncio.timeout(10):
        while alive(keeper):
            await asyncio.sleep(0.1)


async def test_without_an_agent_it_serves_to_the_end_and_then_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path, AgentSettings(orphan_s=0.5))
    await bench.start()
    await bench.open(prefetch=[])
    _, lazy = await bench.restore()
    bench.pager.abandon()
    await asyncio.sleep(2.5)
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok", "no page is ever lost while its process lives"
    lazy.process.kill()
    await lazy.process.wait()
    async with asyncio.timeout(10):
        while alive(bench.pager.pid):
            await asyncio.sleep(0.1)


async def test_a_dead_keeper_takes_no_page_along(bench: Bench) -> None:
    await bench.open(prefetch=[])
    _, lazy = await bench.restore()
    os.kill(bench.pager.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await bench.pager.lost
    assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"
    lazy.process.kill()
    with pytest.raises(PagerError):
        await bench.pager.restores()
    async with asyncio.timeout(5):
        while alive(bench.pager.worker_pid):
            await asyncio.sleep(0.1)


async def test_a_busy_instance_is_filled_and_then_needs_no_pager(tmp_path: Path) -> None:
    bench = Bench(tmp_path, AgentSettings(fill_after_s=0.1, fill_mb_per_s=1000))
    await bench.start()
    try:
        await bench.open(prefetch=[])
        name, lazy = await bench.restore()
        idle, _ = await bench.restore()
        assert await lazy.tell("move 50 10") == "ok"
        deadline, turn = time.monotonic() + 20, 0
        while (await bench.pager.stats(name))["spaces"]:
            assert time.monotonic() < deadline
            assert await lazy.tell(f"check {turn % 4000} 1 1") == "ok"
            assert await lazy.tell("fork 1000") == "ok"
            turn += 97
            await asyncio.sleep(0.02)
        assert (await bench.pager.stats(idle))["spaces"] == 1, "what does not miss pages is left alone"
        await bench.pager.release(name)
        assert await lazy.tell("fork 1") == "ok"
        assert await lazy.tell("drop 3000 20") == "ok"
        assert await lazy.tell(f"check 0 {PAGES} 1") == "ok"
    finally:
        await bench.close()
