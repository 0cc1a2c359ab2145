from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from infra.local import install, tidy

DAY_S = tidy.RECENT_S


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this process holds, let go: as if another one had installed it."""
    monkeypatch.setattr(install, "_held", held := {})
    yield
    for descriptor in held.values():
        os.close(descriptor)


def make(cache: Path, name: str, **more: bool) -> Path:
    def build(folder: Path) -> Sequence[str]:
        (folder / "tool").write_text("tool")
        return ["tool"]

    return install.install_folder(cache / name, build, lambda _line: None, title=name, **more)


def old(cache: Path, name: str, days: float) -> Path:
    """A folder that was used for the last time some days ago, by a process that is gone."""
    folder = cache / name
    folder.mkdir()
    (folder / "tool").write_text("tool")
    (folder / install.RECEIPT).write_text("{}")
    then = time.time() - days * DAY_S
    os.utime(folder / install.RECEIPT, (then, then))
    return folder


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.name != install.LOCK}


def test_what_was_not_used_for_a_day_goes_but_for_the_newest(tmp_path: Path) -> None:
    for number, days in ((1, 4.0), (2, 3.0), (3, 2.0)):
        old(tmp_path, f"tool-{number:016x}", days)
    old(tmp_path, f"tool-packages-{1:012x}", 9.0)
    (tmp_path / f"tool-{9:016x}").mkdir()  # somebody else's: without a receipt
    make(tmp_path, f"tool-{4:016x}")
    assert names(tmp_path) == {f"tool-{number:016x}" for number in (3, 4, 9)} | {f"tool-packages-{1:012x}"}


def test_versions_are_of_one_kind(tmp_path: Path) -> None:
    for number, version in enumerate(("4.1.0", "4.2.0", "4.2.1")):
        old(tmp_path, f"broker-{version}-{number:012x}", 9.0 - number)
    make(tmp_path, f"broker-4.3.1-{7:012x}")
    assert names(tmp_path) == {f"broker-4.2.1-{2:012x}", f"broker-4.3.1-{7:012x}"}


def test_using_a_folder_keeps_it(tmp_path: Path) -> None:
    for number in range(4):
        old(tmp_path, f"tool-{number:016x}", 9.0 - number)
    make(tmp_path, f"tool-{0:016x}")  # it is there: only used
    os.close(install._held.pop(tmp_path / f"tool-{0:016x}"))
    make(tmp_path, f"tool-{7:016x}")
    assert names(tmp_path) == {f"tool-{number:016x}" for number in (0, 7)}
    for number in (1, 2):
        make(tmp_path, f"tool-{number:016x}")
    assert len(names(tmp_path)) == 4, "all were used today"


@pytest.mark.parametrize(
    "code",
    [
        "file = open(folder + '/tool')",
        "os.chdir(folder)",
        "pass",  # its command line names the folder
        "install._use(Path(folder)); os.utime(folder + '/receipt.json', (1, 1))",
    ],
    ids=["open", "working directory", "command line", "installed by it"],
)
def test_what_a_process_has_to_do_with_stays(tmp_path: Path, code: str) -> None:
    used = old(tmp_path, f"tool-{1:016x}", 9.0)
    for number in (2, 3):
        old(tmp_path, f"tool-{number:016x}", 5.0)
    # But for one of the cases the command line says nothing.
    given = str(used) if code == "pass" else " ".join(str(ord(letter)) for letter in str(used))
    begin = "import os, sys; from pathlib import Path; from infra.local import install; codes = sys.argv[1]"
    decoded = "folder = ''.join(chr(int(code)) for code in codes.split())" if code != "pass" else "pass"
    words = [sys.executable, "-c", f"{begin}; {decoded}; {code}; print(1, flush=True); input()", given]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        make(tmp_path, f"tool-{7:016x}")
        assert len(names(tmp_path)) == 3 and used.name in names(tmp_path)
        process.communicate(b"\n")


def test_what_others_name_stays(tmp_path: Path) -> None:
    for number in range(4):
        old(tmp_path, f"index-{number:016x}", 9.0)
    make(tmp_path, f"index-{7:016x}", keep_old=True)
    assert len(names(tmp_path)) == 5
