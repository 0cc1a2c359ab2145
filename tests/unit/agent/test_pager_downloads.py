"""Who is fetched first, and what happens when the store fails."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.pager import downloads
from agent.pager.downloads import Download, Downloads
from agent.store.seal import Sealer
from infra.errors import StoreUnavailable


class Gate:
    """A store whose answers wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.order: list[bytes] = []
        self.failures = 0
        monkeypatch.setattr(downloads.ChunkStore, "download", lambda _, digest, size: self._download(digest, size))

    def _download(self, name: bytes, size: int) -> bytes:
        self.order.append(name)
        self.open.wait(10)
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("it is slow", bucket="b", key="k")
        return name * size


@pytest.fixture
def wake() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def settle(subject: Downloads, arrived: list[Any], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(arrived) < count and time.monotonic() < deadline:
        subject.settle()
        time.sleep(0.001)
    assert len(arrived) == count


def test_a_chunk_that_a_thread_waits_for_overtakes(monkeypatch: pytest.MonkeyPatch, wake: int) -> None:
    gate, arrived, kept = Gate(monkeypatch), list[str](), list[bytes]()
    subject = Downloads(2, wake)
    subject.configure(lambda: None, Sealer(Path("/nowhere")), 2)  # type: ignore[arg-type, return-value]
    wanted = [Download("it", "one", bytes([number]), 3, kept.append, arrived.append) for number in range(8)]
    for download in wanted[:6]:
        subject.add(download, urgent=False)
    time.sleep(0.05)
    assert gate.order == [b"\0"], "what is fetched to have it leaves a thread free"
    subject.hurry(wanted[5])
    subject.add(wanted[7], urgent=True)
    wanted[3].cancelled = True
    gate.open.set()
    settle(subject, arrived, 6)
    assert gate.order.index(b"\5") < gate.order.index(b"\1") and gate.order.index(b"\7") < gate.order.index(b"\2")
    assert arrived == [""] * 6 and len(kept) == 6
    assert b"\3" not in gate.order


def test_a_slow_store_is_waited_for_and_one_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch, wake: int) -> None:
    gate, arrived, kept = Gate(monkeypatch), list[str](), list[bytes]()
    gate.open.set()
    gate.failures = 2
    subject = Downloads(1, wake)
    subject.configure(lambda: None, Sealer(Path("/nowhere")), 1)  # type: ignore[arg-type, return-value]
    subject.add(Download("it", "one", b"a", 2, kept.append, arrived.append), urgent=True)
    settle(subject, arrived, 1)
    assert (arrived, kept) == ([""], [b"aa"]) and len(gate.order) == 3
    monkeypatch.setattr(downloads, "STALL_S", 0.0)
    gate.failures = 1
    subject.add(Download("it", "one", b"b", 2, kept.append, arrived.append), urgent=True)
    settle(subject, arrived, 2)
    assert "it is slow" in arrived[1]


def test_a_full_disk_is_waited_for_and_a_broken_one_is_told(monkeypatch: pytest.MonkeyPatch, wake: int) -> None:
    gate, arrived, kept = Gate(monkeypatch), list[str](), list[bytes]()
    gate.open.set()
    failures = [OSError(errno.ENOSPC, "no space left"), OSError(errno.ENOSPC, "no space left")]

    def keep(data: bytes) -> None:
        if failures:
            raise failures.pop(0)
        kept.append(data)

    subject = Downloads(1, wake)
    subject.configure(lambda: None, Sealer(Path("/nowhere")), 1)  # type: ignore[arg-type, return-value]
    subject.add(Download("it", "one", b"a", 2, keep, arrived.append), urgent=True)
    settle(subject, arrived, 1)
    assert (arrived, kept) == ([""], [b"aa"]) and gate.order == [b"a"], "it is fetched once"
    failures.append(OSError(errno.EIO, "broken"))
    subject.add(Download("it", "one", b"b", 2, keep, arrived.append), urgent=True)
    settle(subject, arrived, 2)
    assert "cannot keep a chunk on the node: [Errno 5] broken" in arrived[1] and not failures
    monkeypatch.setattr(downloads, "STALL_S", 0.0)
    failures.append(OSError(errno.ENOSPC, "no space left"))
    subject.add(Download("it", "one", b"c", 2, keep, arrived.append), urgent=True)
    settle(subject, arrived, 3)
    assert "no space left" in arrived[2]
