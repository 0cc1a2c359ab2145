"""From touched pages to the working set."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.criu.images import PAGE, PageMap, Run
from agent.store.workingset import Recording, merge, plan, subtract, zero_runs

spans = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 10)).map(lambda item: (item[0], item[0] + item[1])), max_size=12)


@given(spans)
def test_merged_spans_cover_the_same_and_are_apart(given_spans: list[tuple[int, int]]) -> None:
    merged = merge(given_spans)
    covered = {at for start, end in given_spans for at in range(start, end)}
    assert {at for start, end in merged for at in range(start, end)} == covered
    assert all(left[1] < right[0] for left, right in itertools.pairwise(merged))


def test_holds_what_criu_reads_itself_and_what_was_touched() -> None:
    maps = {
        1000: PageMap(
            1000,
            1,
            (Run(0x10000, 0x14000, 0, lazy=True), Run(0x20000, 0x21000, 4 * PAGE, lazy=False), Run(0x30000, 0x38000, 5 * PAGE, lazy=True)),
        )
    }
    trials = [[(1000, 0x31000), (1000, 0x10000), (1, 0x10000)], [(1000, 0x11000), (1000, 0x31000), (1000, 0x999000)]]
    found = plan(maps, {1: []}, Recording(trials))
    assert [(item.pages_id, item.offset, item.size) for item in found.extents] == [
        (1, 0, 2 * PAGE),
        (1, 4 * PAGE, PAGE),
        (1, 6 * PAGE, PAGE),
    ]
    assert found.eager == {1000: [(0x10000, 0x12000), (0x31000, 0x32000)]}
    assert [(item.address, item.size) for item in found.fresh["1000"]] == [(0x999000, PAGE)], "memory that the image does not have"
    assert found.ahead == {"1": []}


def test_zeros_are_left_out_and_later_use_becomes_runs() -> None:
    maps = {1000: PageMap(1000, 1, (Run(0x10000, 0x30000, 0, lazy=True),))}
    zeros = {1: [(PAGE, 2 * PAGE)]}
    first = [(1000, 0x10000), (1000, 0x11000), (1000, 0x12000)]
    later = [(1000, 0x10000 + page * PAGE) for page in (8, 9, 12, 20)]
    found = plan(maps, zeros, Recording([first], later))
    assert [(item.offset, item.size) for item in found.extents] == [(0, PAGE), (2 * PAGE, PAGE)]
    assert found.eager == {1000: [(0x10000, 0x11000), (0x12000, 0x13000)]}
    assert [(item.address, item.size) for item in found.fresh["1000"]] == [(0x11000, PAGE)], "zeros need no bytes"
    assert [(item.offset // PAGE, item.size // PAGE) for item in found.ahead["1"]] == [(8, 5), (20, 1)]


@given(spans, spans)
def test_what_is_left_after_subtracting(given_spans: list[tuple[int, int]], holes: list[tuple[int, int]]) -> None:
    left = subtract(merge(given_spans), merge(holes))
    covered = {at for start, end in given_spans for at in range(start, end)} - {at for start, end in holes for at in range(start, end)}
    assert [at for start, end in left for at in range(start, end)] == sorted(covered)


def test_finds_pages_of_zeros() -> None:
    data = bytearray(6 * PAGE)
    data[2 * PAGE + 4095] = 1
    data[5 * PAGE] = 1
    assert zero_runs(bytes(data)) == [(0, 2 * PAGE), (3 * PAGE, 5 * PAGE)]
