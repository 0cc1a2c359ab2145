"""What Thaw reads in CRIU's image files. Pure but for reading the files.

In: a directory written by ``criu dump``. Out: :class:`PageMap` (which page of the process is where in which pages file), restore
statistics, and the list of files. Next: :mod:`agent.pager.memory` and :mod:`agent.checkpoint`. Sources: images/pagemap.proto,
images/stats.proto, criu/include/magic.h of CRIU 4.2.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.criu import protobuf
from agent.errors import ImageInvalid

PAGE = 4096
#: Most pages of one process that an image may map: 1 TiB.
PAGES_MAX = 1 << 28
_PAGEMAP_NAME = re.compile(r"pagemap-(\d+)\.img")
_LAZY, _PRESENT = 2, 4


@dataclass(frozen=True)
class Run:
    """Neighbouring pages: ``[start, end)`` in the process, at ``offset`` of the pages file, all in bytes."""

    start: int
    end: int
    offset: int
    lazy: bool


@dataclass(frozen=True)
class PageMap:
    """Pages of one process."""

    pid: int
    pages_id: int
    runs: tuple[Run, ...]

    @property
    def pages_bytes(self) -> int:
        """Size that the pages file must have."""
        return max((run.offset + run.end - run.start for run in self.runs), default=0)


def read_page_maps(directory: Path) -> dict[int, PageMap]:
    """All page maps of an image, by pid.

    Raises:
        ImageInvalid: a file is cut short, holds impossible numbers, or refers to an incremental parent.
    """
    maps = {}
    for path in sorted(directory.iterdir()):
        match = _PAGEMAP_NAME.fullmatch(path.name)
        if match:
            pid = int(match.group(1))
            maps[pid] = parse_page_map(pid, path.read_bytes(), path.name)
    return maps


def parse_page_map(pid: int, data: bytes, name: str = "pagemap") -> PageMap:
    """One pagemap file: two magic words, the header entry with the pages id, then one entry a run."""
    try:
        entries = list(_entries(data))
    except ValueError as error:
        raise ImageInvalid(f"{name}: {error}") from error
    if not entries:
        raise ImageInvalid(f"{name}: no header")
    runs, offset = [], 0
    for entry in entries[1:]:
        start = protobuf.integer(entry, 1)
        count = protobuf.integer(entry, 5) or protobuf.integer(entry, 2)
        flags = protobuf.integer(entry, 4, _PRESENT)
        if protobuf.integer(entry, 3) or flags & 1:
            raise ImageInvalid(f"{name}: pages of a parent image; only whole dumps are supported")
        if start % PAGE or not 0 < count <= PAGES_MAX or start + count * PAGE > 1 << 63:
            raise ImageInvalid(f"{name}: impossible run of {count} pages at {start:#x}")
        if flags & _PRESENT:
            runs.append(Run(start, start + count * PAGE, offset, bool(flags & _LAZY)))
            offset += count * PAGE
    runs.sort(key=lambda run: run.start)
    if any(left.end > right.start for left, right in itertools.pairwise(runs)):
        raise ImageInvalid(f"{name}: runs overlap")
    return PageMap(pid, protobuf.integer(entries[0], 1), tuple(runs))


def make_eager(data: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """A pagemap file in which CRIU itself puts the pages of ``spans`` in place, and leaves only the others to the pager.

    Args:
        data: a pagemap file.
        spans: ``[start, end)`` addresses, sorted, disjoint, of whole pages.
    """
    out = bytearray(data[:8])
    for number, entry in enumerate(_entries(data)):
        flags = protobuf.integer(entry, 4, _PRESENT)
        if number == 0 or not flags & _LAZY:
            out += _entry(entry)
            continue
        start = protobuf.integer(entry, 1)
        end = start + (protobuf.integer(entry, 5) or protobuf.integer(entry, 2)) * PAGE
        at = start
        for low, high in spans:
            low, high = max(low, at), min(high, end)
            if low >= high:
                continue
            if at < low:
                out += _entry(_part(entry, at, low, flags))
            out += _entry(_part(entry, low, high, flags & ~_LAZY))
            at = high
        if at < end:
            out += _entry(_part(entry, at, end, flags))
    return bytes(out)


def _part(entry: protobuf.Fields, start: int, end: int, flags: int) -> protobuf.Fields:
    counts: protobuf.Fields = {number: [(end - start) // PAGE] for number in (2, 5) if number in entry}
    return {**entry, **counts, 1: [start], 4: [flags]}


def _entry(fields: protobuf.Fields) -> bytes:
    encoded = protobuf.encode(fields)
    return struct.pack("<I", len(encoded)) + encoded


def restore_stats(work_directory: Path) -> dict[str, int]:
    """CRIU's own restore statistics (times in µs), or nothing when it wrote none."""
    names = {1: "pages_compared", 2: "pages_skipped_cow", 3: "forking_us", 4: "restore_us", 5: "pages_restored"}
    return _stats(work_directory / "stats-restore", 2, names)


def _stats(path: Path, part: int, names: dict[int, str]) -> dict[str, int]:
    try:
        entry = next(_entries(path.read_bytes()))
        inner = entry[part][0]
        if not isinstance(inner, bytes):
            return {}
        fields = protobuf.decode(inner)
    except (OSError, ValueError, KeyError, StopIteration):
        return {}
    return {name: protobuf.integer(fields, number) for number, name in names.items() if number in fields}


def _entries(data: bytes) -> Iterator[protobuf.Fields]:
    at = 8
    while at < len(data):
        if at + 4 > len(data):
            raise ValueError("an entry is cut short")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise ValueError("an entry is cut short")
        yield protobuf.decode(data[at : at + size])
        at += size
