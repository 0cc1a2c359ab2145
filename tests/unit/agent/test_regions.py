"""The layout of an address space against a page-by-page model."""

from hypothesis import given
from hypothesis import strategies as st

from agent.pager.regions import Region, Regions

PAGE = 4096
SPACE = 64

operations = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), st.integers(0, SPACE - 1), st.integers(1, 16)),
        st.tuples(st.just("move"), st.integers(0, SPACE - 17), st.integers(0, SPACE - 17), st.integers(1, 16)),
    ),
    max_size=20,
)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=6, unique_by=lambda item: item[0]), operations)
def test_follows_the_model(initial: list[tuple[int, int]], steps: list[tuple]) -> None:  # type: ignore[type-arg]
    regions, model, offset = [], {}, 0
    for slot, pages in sorted(initial):
        start = slot * 8
        regions.append(Region(start * PAGE, (start + pages) * PAGE, offset * PAGE))
        model.update({start + page: offset + page for page in range(pages)})
        offset += pages
    subject = Regions(regions)
    for step in steps:
        if step[0] == "cut":
            _, start, size = step
            subject.cut(start * PAGE, (start + size) * PAGE)
            model = {page: where for page, where in model.items() if not start <= page < start + size}
        else:
            _, source, target, size = step
            if abs(source - target) < size:
                continue  # the kernel refuses an mremap onto itself
            subject.move(source * PAGE, target * PAGE, size * PAGE)
            moved = {page - source + target: where for page, where in model.items() if source <= page < source + size}
            model = {
                page: where for page, where in model.items() if not source <= page < source + size and not target <= page < target + size
            }
            model.update(moved)
    for page in range(SPACE + 16):
        region = subject.find(page * PAGE)
        found = None if region is None else (region.offset + page * PAGE - region.start) // PAGE
        assert found == model.get(page)


def test_a_copy_is_independent() -> None:
    parent = Regions([Region(0, 2 * PAGE, 0)])
    child = parent.copy()
    parent.cut(0, PAGE)
    assert child.find(0) == Region(0, 2 * PAGE, 0)
    assert parent.find(0) is None
