"""The working set: from pages that were touched to page maps that bring them along and the object that holds them.

In: the recording of :mod:`agent.checkpoint` and the page maps. Out: page maps and the working-set object: every page that CRIU itself reads
while it restores (memory that is not lazy) and every page that the first requests touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from agent.criu.images import PAGE, PageMap, make_eager, read_page_maps
from agent.store import chunks
from agent.store.manifest import Blob, Extent, Manifest


def merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join touching and overlapping ``[start, end)`` spans.

    >>> merge([(4, 8), (0, 4), (16, 20)])
    [(0, 8), (16, 20)]
    """
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def plan(page_maps: dict[int, PageMap], touched: Sequence[tuple[int, int]]) -> tuple[list[Extent], dict[int, list[tuple[int, int]]]]:
    """What the working set holds, and what of it was recorded.

    Args:
        page_maps: by pid.
        touched: (pid, page address) of recorded faults.

    Returns:
        The extents of the pages files, and by pid the recorded ``[start, end)`` addresses.
    """
    needed: dict[int, list[tuple[int, int]]] = {}
    recorded: dict[int, list[tuple[int, int]]] = {}
    for page_map in page_maps.values():
        spans = needed.setdefault(page_map.pages_id, [])
        spans.extend((run.offset, run.offset + run.end - run.start) for run in page_map.runs if not run.lazy)
    for pid, address in touched:
        page_map = page_maps[pid]
        for run in page_map.runs:
            if run.start <= address < run.end and run.lazy:
                offset = run.offset + address - run.start
                needed[page_map.pages_id].append((offset, offset + PAGE))
                recorded.setdefault(pid, []).append((address, address + PAGE))
                break
    extents = [Extent(pages_id, start, end - start) for pages_id, spans in sorted(needed.items()) for start, end in merge(spans)]
    return extents, {pid: merge(spans) for pid, spans in recorded.items()}


def pack(images: Path, draft: Manifest, touched: Sequence[tuple[int, int]]) -> tuple[Manifest, bytes]:
    """Collect the working set, and leave it to CRIU: its pages are not lazy in the page maps of ``images`` any more.

    CRIU reads them in bulk while it builds the address space, which takes a fifth of the processor time of copying them through userfaultfd
    afterwards, and there is no moment at which the process waits for one of them.

    Returns:
        The manifest with the working set, and the working-set object.
    """
    extents, recorded = plan(read_page_maps(images), touched)
    for pid, spans in recorded.items():
        path = images / f"pagemap-{pid}.img"
        path.write_bytes(make_eager(path.read_bytes(), spans))
    parts = []
    for extent in extents:
        with (images / f"pages-{extent.pages_id}.img").open("rb") as source:
            source.seek(extent.offset)
            parts.append(source.read(extent.size))
    plain = b"".join(parts)
    packed = chunks.compress(plain)
    blob = Blob(len(packed), hashlib.sha256(packed).digest(), len(plain))
    return msgspec.structs.replace(draft, extents=extents, working_set=blob), packed
