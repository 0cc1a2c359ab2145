"""CRIU's pagemap files."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.criu import protobuf
from agent.criu.images import PAGE, PageMap, make_eager, parse_page_map
from agent.errors import ImageInvalid
from agent.store.workingset import merge

LAZY, PRESENT = 2, 4


def page_map(*entries: dict[int, int], pages_id: int = 1) -> bytes:
    data = struct.pack("<II", 0x54564319, 0x56084025)
    for entry in ({1: pages_id}, *entries):
        encoded = protobuf.encode(entry)
        data += struct.pack("<I", len(encoded)) + encoded
    return data


def test_offsets_follow_the_order_of_entries_and_absent_pages_take_none() -> None:
    found = parse_page_map(
        7, page_map({1: 0x1000, 2: 2, 4: PRESENT | LAZY}, {1: 0x8000, 2: 5, 4: 0}, {1: 0x20000, 5: 1, 4: PRESENT}, pages_id=3)
    )
    assert found.pages_id == 3
    assert [(run.start, run.end, run.offset, run.lazy) for run in found.runs] == [
        (0x1000, 0x3000, 0, True),
        (0x20000, 0x21000, 2 * PAGE, False),
    ]
    assert found.pages_bytes == 3 * PAGE


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param({1: 0x1001, 2: 1, 4: PRESENT}, id="unaligned address"),
        pytest.param({1: 0x1000, 2: 0, 4: PRESENT}, id="no pages"),
        pytest.param({1: 0x1000, 5: 2**40, 4: PRESENT}, id="too many pages"),
        pytest.param({1: 0x1000, 2: 1, 4: 1}, id="pages of a parent image"),
    ],
)
def test_impossible_entries_are_refused(entry: dict[int, int]) -> None:
    with pytest.raises(ImageInvalid):
        parse_page_map(1, page_map(entry))


def test_overlapping_runs_are_refused() -> None:
    with pytest.raises(ImageInvalid, match="overlap"):
        parse_page_map(1, page_map({1: 0x1000, 2: 4, 4: PRESENT}, {1: 0x3000, 2: 1, 4: PRESENT}))


@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    with contextlib.suppress(ImageInvalid):
        parse_page_map(1, data)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)).map(lambda item: (item[0], item[0] + item[1])), max_size=8))
def test_eager_pages_are_where_they_were_and_no_longer_lazy(spans: list[tuple[int, int]]) -> None:
    eager = [(start * PAGE, end * PAGE) for start, end in merge(spans)]
    data = page_map({1: 0x2000, 2: 20, 5: 20, 4: PRESENT | LAZY}, {1: 30 * PAGE, 2: 4, 4: PRESENT}, {1: 40 * PAGE, 5: 9, 4: PRESENT | LAZY})
    before, after = parse_page_map(1, data), parse_page_map(1, make_eager(data, eager))

    def pages(found: PageMap) -> dict[int, tuple[int, bool]]:
        return {at: (run.offset + at - run.start, run.lazy) for run in found.runs for at in range(run.start, run.end, PAGE)}

    wanted = {at for start, end in eager for at in range(start, end, PAGE)}
    assert pages(after) == {at: (offset, lazy and at not in wanted) for at, (offset, lazy) in pages(before).items()}
