"""The working set: from pages that were touched to page maps that bring them along and the object that holds them.

In: the recording of :mod:`agent.checkpoint` and the page maps. Out: page maps, manifest and the working-set object: every page that CRIU
reads itself while it restores, which from now on are those too that the first requests touched, in any of the trials. Touched memory
without content (fresh, or pages of zeros) is left to the pager, which needs no bytes for it. What was touched later becomes runs that a
fault brings as a whole.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy

from agent.criu.images import PAGE, PageMap, make_eager, read_page_maps
from agent.store import chunks
from agent.store.manifest import Blob, Extent, Fresh, Manifest, Span

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
    """What follows from a recording.

    Attributes:
        extents: what the working-set object holds.
        eager: by pid, the addresses of pages that CRIU puts in place.
        fresh: by pid, the addresses without content that the pager puts in place.
        ahead: by pages id, what a fault brings.
    """

    extents: list[Extent]
    eager: dict[int, Spans]
    fresh: dict[str, list[Fresh]]
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
    eager: dict[int, Spans] = {}
    fresh: dict[str, list[Fresh]] = {}
    runs: dict[int, Spans] = {}
    for pid, page_map in sorted(page_maps.items()):
        addresses = merge((address, address + PAGE) for owner, address in touched if owner == pid)
        eager[pid] = _with_content(page_map, addresses, zeros.get(page_map.pages_id, []))
        fresh[str(pid)] = [Fresh(start, end - start) for start, end in subtract(addresses, eager[pid])]
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
    return Plan(extents, eager, fresh, ahead)


def _with_content(page_map: PageMap, addresses: Spans, zeros: Spans) -> Spans:
    """The part of ``addresses`` (merged) where the image has lazy pages that are not zeros."""
    spans: Spans = []
    for run in page_map.runs:
        if run.lazy:
            spans += subtract(
                [(run.start, run.end)], [(low - run.offset + run.start, high - run.offset + run.start) for low, high in zeros]
            )
    return subtract(addresses, subtract(addresses, spans))


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


def pack(images: Path, draft: Manifest, recording: Recording) -> tuple[Manifest, bytes]:
    """Collect the working set, and leave it to CRIU: its pages are not lazy in the page maps of ``images`` any more.

    CRIU reads them in bulk while it builds the address space. That takes a fifth of the processor time of copying them through userfaultfd
    afterwards, and there is no moment at which the process waits for one of them.

    Returns:
        The manifest with the working set, and the working-set object.
    """
    zeros = {int(key): [(span.offset, span.offset + span.size) for span in item.zeros] for key, item in draft.pages.items()}
    decided = plan(read_page_maps(images), zeros, recording)
    for pid, spans in decided.eager.items():
        path = images / f"pagemap-{pid}.img"
        path.write_bytes(make_eager(path.read_bytes(), spans))
    parts = []
    for extent in decided.extents:
        with (images / f"pages-{extent.pages_id}.img").open("rb") as source:
            source.seek(extent.offset)
            parts.append(source.read(extent.size))
    plain = b"".join(parts)
    packed = chunks.pack_pages(plain)
    blob = Blob(len(packed), hashlib.sha256(packed).digest(), len(plain))
    pages = {key: msgspec.structs.replace(item, ahead=decided.ahead.get(key, [])) for key, item in draft.pages.items()}
    return msgspec.structs.replace(draft, extents=decided.extents, fresh=decided.fresh, pages=pages, working_set=blob), packed
