"""What Thaw reads in CRIU's image files. Pure but for reading the files.

In: a directory written by ``criu dump``. Out: :class:`PageMap` (which page of the process is where in which pages file), restore
statistics, and the list of files. Next: :mod:`agent.pager.memory` and :mod:`agent.checkpoint`. Sources: images/pagemap.proto,
images/stats.proto, criu/include/magic.h of CRIU 4.2.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from agent.criu import protobuf
from agent.errors import ImageInvalid

PAGE = 4096
#: Most pages of one process that an image may map: 1 TiB.
PAGES_MAX = 1 << 28
#: Largest page map: a quarter of a million runs, that is thirty times as much in memory.
PAGE_MAP_BYTES_MAX = 4 << 20
_PAGEMAP_NAME = re.compile(r"pagemap-(\d+)\.img")
_LAZY, _PRESENT = 2, 4


class Run(NamedTuple):
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
    if len(data) > PAGE_MAP_BYTES_MAX:
        raise ImageInvalid(f"{name}: {len(data)} bytes; {PAGE_MAP_BYTES_MAX} is the most")
    try:
        return _page_map(pid, _numbers(data), name)
    except (ValueError, IndexError, StopIteration) as error:
        raise ImageInvalid(f"{name}: cut short, or not a page map: {error}") from error


def _page_map(pid: int, entries: Iterator[dict[int, int]], name: str) -> PageMap:
    header = next(entries)
    runs, offset = [], 0
    for entry in entries:
        start = entry.get(1, 0)
        count = entry.get(5) or entry.get(2, 0)
        flags = entry.get(4, _PRESENT)
        if entry.get(3) or flags & 1:
            raise ImageInvalid(f"{name}: pages of a parent image; only whole dumps are supported")
        if start % PAGE or not 0 < count <= PAGES_MAX or start + count * PAGE > 1 << 63:
            raise ImageInvalid(f"{name}: impossible run of {count} pages at {start:#x}")
        if flags & _PRESENT:
            runs.append(Run(start, start + count * PAGE, offset, bool(flags & _LAZY)))
            offset += count * PAGE
    runs.sort(key=lambda run: run.start)
    if any(left.end > right.start for left, right in itertools.pairwise(runs)):
        raise ImageInvalid(f"{name}: runs overlap")
    return PageMap(pid, header.get(1, 0), tuple(runs))


def make_eager(data: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """A pagemap file in which CRIU itself puts the pages of ``spans`` in place, and leaves only the others to the pager.

    Neighbours of one kind become one entry: a dump has one per MiB, and CRIU goes through all of them.

    Args:
        data: a pagemap file.
        spans: ``[start, end)`` addresses, sorted, disjoint, of whole pages.
    """
    header, *entries = _entries(data)
    parts: list[tuple[int, int, int, protobuf.Fields]] = []

    def add(start: int, end: int, flags: int, entry: protobuf.Fields) -> None:
        if parts and parts[-1][1:3] == (start, flags):
            start = parts.pop()[0]
        parts.append((start, end, flags, entry))

    for entry in entries:
        flags = protobuf.integer(entry, 4, _PRESENT)
        start = at = protobuf.integer(entry, 1)
        end = start + (protobuf.integer(entry, 5) or protobuf.integer(entry, 2)) * PAGE
        for low, high in spans if flags & _LAZY else ():
            low, high = max(low, at), min(high, end)
            if low < high:
                if at < low:
                    add(at, low, flags, entry)
                add(low, high, flags & ~_LAZY, entry)
                at = high
        if at < end:
            add(at, end, flags, entry)
    out = bytearray(data[:8]) + _entry(header)
    for start, end, flags, entry in parts:
        counts: protobuf.Fields = {number: [(end - start) // PAGE] for number in (2, 5) if number in entry}
        out += _entry({**entry, **counts, 1: [start], 4: [flags]})
    return bytes(out)


#: A Kubernetes volume of small files is replaced as a whole: its files are links into a folder that is named by the time.
_DATED = re.compile(r"/\.\.\d{4}_[^/]+(?=/)")
_REGULAR, _NAME, _SIZE, _CHECKSUMS = 3, 6, 8, (12, 13, 14)


def loosen_files(data: bytes, foreign: Callable[[str], bool]) -> bytes:
    """A files.img in which open files that every sandbox has anew, each time with other content, need not be as they were.

    Args:
        data: files.img, of images/fdinfo.proto and images/regfile.proto.
        foreign: whether a file is one of those, by its path.

    Raises:
        ImageInvalid: not such a file.
    """
    out = bytearray(data[:8])
    try:
        for entry in _entries(data):
            for number, value in enumerate(entry.get(_REGULAR, [])):
                if isinstance(value, bytes):
                    entry[_REGULAR][number] = _loosened(value, foreign)
            out += _entry(entry)
    except ValueError as error:
        raise ImageInvalid(f"files.img: {error}") from error
    return bytes(out)


def _loosened(file: bytes, foreign: Callable[[str], bool]) -> bytes:
    fields = protobuf.decode(file)
    name = protobuf.text(fields, _NAME)
    if not foreign(f"/{name.lstrip('/')}"):
        return file
    for number in (_SIZE, *_CHECKSUMS):
        fields.pop(number, None)
    fields[_NAME] = [_DATED.sub("", name).encode()]
    return protobuf.encode(fields)


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


def _numbers(data: bytes) -> Iterator[dict[int, int]]:
    """As :func:`_entries`, for messages of numbers only, without a call for each: a start waits for hundreds of them.

    Raises:
        ValueError, IndexError: cut short, or not such messages.
    """
    at, size = 8, len(data)
    while at < size:
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        at += 4
        entry = {}
        while at < end:
            tag = data[at]
            byte = data[at + 1]
            at += 2
            value, shift = byte & 127, 7
            while byte > 127:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
            if tag & 135 or shift > 70:  # a kind that is no number, a tag of two bytes, more than 64 bits
                raise ValueError("an entry that is not made of numbers")
            entry[tag >> 3] = value
        if at != end:
            raise ValueError("an entry that does not end where it should")
        yield entry


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
