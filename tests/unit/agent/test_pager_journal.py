"""What the next worker reads is what the one before knew, wherever that one was stopped."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.pager.journal import Journal, JournalFile, JournalFull
from agent.pager.regions import Region, Regions
from agent.pager.state import Kind, State
from agent.pager.userfault import MESSAGE_BYTES, only_faults, parse

PAGE = 4096
LAYOUT = [Region(0x100000, 0x120000, 0), Region(0x140000, 0x148000, 0x20000)]


class Killed(Exception):
    """Takes the place of SIGKILL."""


class FragileJournal(Journal):
    """Dies after so many written bytes."""

    budget = 1 << 60

    def _write(self, at: int, data: bytes) -> None:
        if len(data) > self.budget:
            super()._write(at, data[: self.budget])
            raise Killed
        self.budget -= len(data)
        super()._write(at, data)


def fault(address: int) -> bytes:
    return struct.pack("<B7xQQQ", 0x12, 0, address, 0)


def fork(fd: int) -> bytes:
    return struct.pack("<B7xI20x", 0x13, fd)


def remap(source: int, target: int, size: int) -> bytes:
    return struct.pack("<B7xQQQ", 0x14, source, target, size)


def remove(start: int, end: int) -> bytes:
    return struct.pack("<B7xQQ8x", 0x15, start, end)


pages = st.integers(0, 60).map(lambda page: 0x100000 + page * PAGE)
messages = st.lists(
    st.one_of(
        pages.map(fault),
        st.integers(100, 200).map(fork),
        st.tuples(pages, pages, st.integers(1, 8))
        .filter(lambda m: abs(m[0] - m[1]) >= m[2] * PAGE)
        .map(lambda m: remap(m[0], m[1], m[2] * PAGE)),
        st.tuples(pages, st.integers(1, 8)).map(lambda m: remove(m[0], m[0] + m[1] * PAGE)),
    ),
    min_size=1,
    max_size=5,
)


def new_state() -> State:
    return State(lambda image, pid: Regions(LAYOUT))


def picture(state: State) -> object:
    """All that matters of a state."""
    return (
        state.agent, state.images, sorted(state.descriptors()),
        {name: (restore.image, restore.finished, restore.connections) for name, restore in state.restores.items()},
        {key: (space.fd, space.pid, list(space.regions), space.restore.name) for key, space in state.spaces.items()},
    )  # fmt: skip


def play(journal: Journal, state: State, batches: list[tuple[int, list[bytes]]]) -> None:
    """What a worker does: a restore, its process, and then batches of messages, each for one of the spaces there are."""
    from msgpack import packb

    def note(kind: Kind, value: object) -> None:
        journal.append(kind, packb(value))
        state.apply(kind, packb(value))

    note(Kind.AGENT, 9)
    note(Kind.IMAGE, ["image", "/image", True])
    note(Kind.RESTORE, {"name": "r", "image": "image", "listener": 10, "record": False, "prefetch": True, "begun_ns": 1})
    note(Kind.CONNECTED, ["r", 11])
    for data in (struct.pack("<i4x24x", 1000), struct.pack("<8xQiii4x", 20, 1, 1, 12), struct.pack("<I4x24x", 0x52535446)):
        journal.reserve(Kind.MESSAGE, 11, 32)[:] = data
        journal.keep(32)
        state.apply(Kind.MESSAGE, struct.pack("<Q", 11) + data)
    for turn, batch in batches:
        keys = sorted(state.spaces)
        if not keys:
            return
        key = keys[turn % len(keys)]
        if turn % 11 == 10:
            note(Kind.SPACE_GONE, key)
            continue
        raw = b"".join(batch)
        view = journal.reserve(Kind.EVENTS, key, MESSAGE_BYTES * 8)
        view[: len(raw)] = raw  # the kernel's work: wholly done or not at all
        state.apply(Kind.EVENTS, struct.pack("<Q", key) + raw)
        if only_faults(raw):
            journal.drop(len(raw))
        else:
            journal.keep(len(raw))


@given(st.lists(st.tuples(st.integers(0, 30), messages), max_size=10), st.integers(0, 3000))
def test_replay_is_what_was_known(batches: list[tuple[int, list[bytes]]], budget: int) -> None:
    buffer = bytearray(64 << 10)
    journal, live = FragileJournal(buffer), new_state()
    journal.budget = budget
    try:
        play(journal, live, batches)
        killed = False
    except Killed:
        killed = True
    replayed = new_state()
    for kind, payload in Journal(buffer).records():
        replayed.apply(kind, payload)
    if killed:  # the record being written counts wholly or not at all: the live state was changed after it, or because of it
        complete = new_state()
        for kind, payload in list(Journal(buffer).records())[:-1]:
            complete.apply(kind, payload)
        assert picture(live) in (picture(replayed), picture(complete))
    else:
        assert picture(replayed) == picture(live)
    snapshot, copied = replayed.snapshot(), new_state()
    copied.apply(Kind.SNAPSHOT, snapshot)
    assert picture(copied) == picture(replayed)


def test_a_message_read_right_before_the_kill_is_there() -> None:
    buffer = bytearray(4096)
    Journal(buffer).reserve(Kind.EVENTS, 5, 320)[:64] = fork(33) + remove(0x1000, 0x2000)
    ((kind, payload),) = Journal(buffer).records()
    assert kind == Kind.EVENTS and payload[:8] == struct.pack("<Q", 5)
    assert len(list(parse(payload[8:]))) == 2


def test_faults_leave_no_trace_and_a_full_journal_says_so() -> None:
    buffer = bytearray(4096)
    journal = Journal(buffer)
    for _ in range(1000):
        journal.reserve(Kind.EVENTS, 1, 320)[:32] = fault(0x5000)
        journal.drop(32)
    assert journal.used == 0 and not any(buffer)
    with pytest.raises(JournalFull):
        for _ in range(1000):
            journal.append(Kind.AGENT, b"\5")
    assert len(list(Journal(buffer).records())) > 100


def test_a_new_journal_takes_the_place_of_the_old_one() -> None:
    import os

    fd = os.memfd_create("place")
    file = JournalFile(fd, 8192)
    file.renew(Kind.SNAPSHOT, b"first")
    file.journal.append(Kind.AGENT, b"more")
    file.renew(Kind.SNAPSHOT, b"second" * 2000)
    again = JournalFile(fd, 8192)
    again.load()
    assert list(again.journal.records()) == [(Kind.SNAPSHOT, b"second" * 2000)]
    os.close(fd)
