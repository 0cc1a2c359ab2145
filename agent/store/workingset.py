"""The working set: from pages that were touched to runs that are prefetched and the object that holds them. Pure but for reading pages.

In: the recording of :mod:`agent.checkpoint` and the page maps. Out: the finished manifest and the working-set object: every page
that CRIU itself reads while it restores (not lazy) and every page that the first requests touched, in any of the trials; pages of zeros
are known by their place alone. What was touched later becomes runs that a fault brings as a whole.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy

from agent.criu.images import PAGE, PageMap, read_page_maps
from agent.store import chunks, manifest
from agent.store.manifest import Blob, Extent, Manifest, Prefetch, Span

#: Recorded pages this far apart still count as one run, bytes: the pages between them come with them.
_GAP_BYTES = 2 * PAGE

Touched = Sequence[tuple[int, int]]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Recording:
    """(pid, page address) of faults in trial restores.

    Attributes:
        trials: of each trial until its first requests were answered.
        used: of one trial until the whole warm-up was over.
    """

    trials: Sequence[Touched]
    used: Touched = ()


@dataclass(frozen=True)
class Plan:
    """What the working-set object holds, what is prefetched per pid, what a fault brings per pages id."""

    extents: list[Extent]
    prefetch: dict[str, list[Prefetch]]
    ahead: dict[str, list[Span]]


def merge(spans: Iterable[tuple[int, int]], gap: int = 0) -> Spans:
    """Join touching and overlapping ``[start, end)`` spans, and those that are at most ``gap`` apart.

    >>> merge([(4, 8), (0, 4), (16, 20)])
    [(0, 8), (16, 20)]
    """
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(spans: Iterable[tuple[int, int]], holes: Iterable[tuple[int, int]]) -> Spans:
    """What is left of ``spans`` outside of ``holes``; both merged.

    >>> subtract([(0, 8), (12, 16)], [(2, 4), (6, 13)])
    [(0, 2), (4, 6), (13, 16)]
    """
    left: Spans = []
    cuts = list(holes)
    first = 0
    for start, end in spans:
        while first < len(cuts) and cuts[first][1] <= start:
            first += 1
        at = start
        for low, high in cuts[first:]:
            if low >= end:
                break
            if low > at:
                left.append((at, low))
            at = high
        if at < end:
            left.append((at, end))
    return left


def zero_runs(data: bytes) -> Spans:
    """Runs of pages of zeros in whole pages of data."""
    words = numpy.frombuffer(data, dtype=numpy.uint64).reshape(-1, PAGE // 8)
    empty = numpy.flatnonzero(~words.any(axis=1))
    return merge((int(page) * PAGE, int(page + 1) * PAGE) for page in empty)


def plan(page_maps: dict[int, PageMap], zeros: dict[int, Spans], recording: Recording) -> Plan:
    """Decide from a recording.

    Args:
        page_maps: by pid.
        zeros: pages of zeros, by pages id.
        recording: faults; the union of all trials counts, because a page too many costs a copy and a page too few a fault.
    """
    needed: dict[int, Spans] = {page_map.pages_id: [] for page_map in page_maps.values()}
    for page_map in page_maps.values():
        needed[page_map.pages_id].extend((run.offset, run.offset + run.end - run.start) for run in page_map.runs if not run.lazy)
    touched = {pair for trial in recording.trials for pair in trial if pair[0] in page_maps}
    used = touched | {pair for pair in recording.used if pair[0] in page_maps}
    prefetch, runs = {}, dict[int, Spans]()
    for pid, page_map in sorted(page_maps.items()):
        addresses = merge((address, address + PAGE) for owner, address in touched if owner == pid)
        if addresses:  # also where the image has no page: fresh memory is touched, too
            prefetch[str(pid)] = [Prefetch(start, end - start) for start, end in addresses]
        needed[page_map.pages_id].extend(_offsets(page_map, addresses))
        later = merge((address, address + PAGE) for owner, address in used if owner == pid)
        runs.setdefault(page_map.pages_id, []).extend(_offsets(page_map, later))
    extents, ahead = [], {}
    for pages_id, spans in sorted(needed.items()):
        kept = subtract(merge(spans), zeros.get(pages_id, []))
        extents += [Extent(pages_id, start, end - start) for start, end in kept]
        recorded = subtract(merge(runs[pages_id]), zeros.get(pages_id, []))
        beyond = [start for start, _ in subtract(recorded, kept)]
        joined = [  # a run that is wholly prefetched would bring nothing more
            (start, end) for start, end in merge(recorded, _GAP_BYTES) if bisect_left(beyond, start) < bisect_left(beyond, end)
        ]
        ahead[str(pages_id)] = [Span(start, end - start) for start, end in joined]
    return Plan(extents, prefetch, ahead)


def _offsets(page_map: PageMap, addresses: Spans) -> Spans:
    """Where the lazy pages at ``addresses`` (merged) are in the pages file."""
    found, first = [], 0
    for start, end in addresses:
        while first < len(page_map.runs) and page_map.runs[first].end <= start:
            first += 1
        for run in page_map.runs[first:]:
            if run.start >= end:
                break
            if run.lazy:
                low, high = max(start, run.start), min(end, run.end)
                found.append((run.offset + low - run.start, run.offset + high - run.start))
    return found


def pack(images: Path, draft: Manifest, recording: Recording) -> tuple[Manifest, bytes, bytes]:
    """Finish a manifest.

    Returns:
        The manifest, its encoding, and the working-set object.
    """
    zeros = {int(key): [(span.offset, span.offset + span.size) for span in item.zeros] for key, item in draft.pages.items()}
    decided = plan(read_page_maps(images), zeros, recording)
    parts = []
    for extent in decided.extents:
        with (images / f"pages-{extent.pages_id}.img").open("rb") as source:
            source.seek(extent.offset)
            parts.append(source.read(extent.size))
    plain = b"".join(parts)
    packed = chunks.compress(plain)
    blob = Blob(len(packed), hashlib.sha256(packed).digest(), len(plain))
    pages = {key: msgspec.structs.replace(item, ahead=decided.ahead.get(key, [])) for key, item in draft.pages.items()}
    finished = msgspec.structs.replace(draft, extents=decided.extents, prefetch=decided.prefetch, pages=pages, working_set=blob)
    return finished, manifest.encode(finished), packed
