"""The working set: from pages that were touched to runs that are prefetched and the object that holds them. Pure but for reading pages.

In: the recording of :mod:`agent.checkpoint` and the page maps. Out: the finished manifest and the working-set object: every page
that CRIU itself reads while it restores (not lazy) and every page that the first requests touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from agent.criu.images import PAGE, PageMap, read_page_maps
from agent.store import chunks, manifest
from agent.store.manifest import Blob, Extent, Manifest, Prefetch


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


def plan(page_maps: dict[int, PageMap], touched: Sequence[tuple[int, int]]) -> tuple[list[Extent], dict[str, list[Prefetch]]]:
    """What the working set holds and what is prefetched.

    Args:
        page_maps: by pid.
        touched: (pid, page address) of recorded faults.
    """
    needed: dict[int, list[tuple[int, int]]] = {}
    runs: dict[int, list[tuple[int, int]]] = {}
    for page_map in page_maps.values():
        spans = needed.setdefault(page_map.pages_id, [])
        spans.extend((run.offset, run.offset + run.end - run.start) for run in page_map.runs if not run.lazy)
    for pid, address in touched:
        page_map = page_maps[pid]
        for run in page_map.runs:
            if run.start <= address < run.end and run.lazy:
                offset = run.offset + address - run.start
                needed[page_map.pages_id].append((offset, offset + PAGE))
                runs.setdefault(pid, []).append((address, address + PAGE))
                break
    extents = [Extent(pages_id, start, end - start) for pages_id, spans in sorted(needed.items()) for start, end in merge(spans)]
    prefetch = {str(pid): [Prefetch(start, end - start) for start, end in merge(spans)] for pid, spans in sorted(runs.items())}
    return extents, prefetch


def pack(images: Path, draft: Manifest, touched: Sequence[tuple[int, int]]) -> tuple[Manifest, bytes, bytes]:
    """Finish a manifest.

    Returns:
        The manifest, its encoding, and the working-set object.
    """
    extents, prefetch = plan(read_page_maps(images), touched)
    parts = []
    for extent in extents:
        with (images / f"pages-{extent.pages_id}.img").open("rb") as source:
            source.seek(extent.offset)
            parts.append(source.read(extent.size))
    plain = b"".join(parts)
    packed = chunks.pack_pages(plain)
    blob = Blob(len(packed), hashlib.sha256(packed).digest(), len(plain))
    finished = msgspec.structs.replace(draft, extents=extents, prefetch=prefetch, working_set=blob)
    return finished, manifest.encode(finished), packed
