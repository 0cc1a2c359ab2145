"""Which pages are on the node."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.pager.pages import PAGE, ImagePages, PagesFile

CHUNK = 4 * PAGE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pages-1.img").write_bytes(b"\0" * (10 * PAGE))
    return tmp_path


def test_a_chunk_of_zeros_is_here_and_the_working_set_is_here(folder: Path) -> None:
    pages = ImagePages(folder, {1: [b"a", None, b"c"]}, CHUNK, [(1, PAGE, PAGE)], complete=False)
    file = pages.files[1]
    assert file.available(0, PAGE) == 0
    assert file.available(PAGE, 2 * PAGE) == PAGE
    assert file.available(4 * PAGE, 6 * PAGE) == 4 * PAGE
    assert pages.missing() == [(1, 0), (1, 2)]
    file.write(0, b"x" * CHUNK)
    file.mark(0, CHUNK)
    file.write(8 * PAGE, b"y" * (2 * PAGE))
    file.mark(8 * PAGE, 2 * PAGE)
    assert pages.complete and pages.missing() == []
    assert (folder / "pages-1.img").read_bytes()[8 * PAGE :] == b"y" * (2 * PAGE)
    pages.close()


def test_what_has_arrived_is_known_to_the_next_pager_of_the_same_boot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_again() -> PagesFile:
        return PagesFile(folder / "pages-1.img", complete=False)

    file = open_again()
    file.write(4 * PAGE, b"x" * CHUNK)
    file.mark(4 * PAGE, CHUNK)  # and is killed: nothing is closed in good order
    again = open_again()
    assert [again.available(at * PAGE, PAGE) for at in range(10)] == [0] * 4 + [PAGE] * 4 + [0] * 2
    (folder / "boot_id").write_text("another boot")
    monkeypatch.setattr("infra.local.processes._BOOT_ID", folder / "boot_id")
    later = open_again()
    assert later.available(4 * PAGE, PAGE) == 0 and later.missing_chunks(CHUNK) == [0, 1, 2]
    for item in (file, again, later):
        item.close()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10)), max_size=8), st.integers(0, 9), st.integers(1, 10))
def test_available_counts_pages_up_to_the_first_gap(marks: list[tuple[int, int]], at: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pages")
        path.write_bytes(bytes(10 * PAGE))
        file = PagesFile(path, complete=False)
        here = [False] * 10
        for start, count in marks:
            count = min(count, 10 - start)
            file.mark(start * PAGE, count * PAGE)
            here[start : start + count] = [True] * count
        size = min(size, 10 - at)
        expected = next((index for index in range(size) if not here[at + index]), size)
        assert file.available(at * PAGE, size * PAGE) == expected * PAGE
        assert file.complete == all(here)
        file.close()
