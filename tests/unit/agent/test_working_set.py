"""From touched pages to the working set."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.criu.images import PAGE, PageMap, Run
from agent.store.workingset import merge, plan

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
    extents, recorded = plan(maps, [(1000, 0x31000), (1000, 0x10000), (1000, 0x11000), (1000, 0x999000)])
    assert [(item.pages_id, item.offset, item.size) for item in extents] == [
        (1, 0, 2 * PAGE),
        (1, 4 * PAGE, PAGE),
        (1, 6 * PAGE, PAGE),
    ]
    assert recorded == {1000: [(0x10000, 0x12000), (0x31000, 0x32000)]}
