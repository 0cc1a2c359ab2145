from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.errors import InstallError
from infra.local import install, native


def ignore(_line: str) -> None:
    pass


def test_a_changed_byte_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tool"
    file.write_bytes(b"content")
    sha256 = install.digest(file)
    install.verify(file, sha256)
    file.write_bytes(b"contenT")
    with pytest.raises(InstallError, match=rf"{file} is not what it should be .*expected {sha256}"):
        install.verify(file, sha256)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"gone cannot be read \(No such file or directory\): do this"):
        install.verify(tmp_path / "gone", "0" * 64, remedy="do this")


def build_tool(folder: Path) -> Sequence[str]:
    (folder / "tool").write_bytes(b"tool")
    return ["tool"]


def test_folders_appear_whole_with_a_receipt(tmp_path: Path) -> None:
    final = install.install_folder(tmp_path / "tool-1", build_tool, ignore, title="tool")
    install.verify_receipt(final)
    (final / "tool").write_bytes(b"fool")
    with pytest.raises(InstallError, match=r"remove .*tool-1 and run `thaw stack install`"):
        install.verify_receipt(final)


def test_a_folder_without_receipt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"no readable receipt\.json"):
        install.verify_receipt(tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Sequence[str]:
        (folder / "half").write_bytes(b"half")
        raise InstallError("no network")

    with pytest.raises(InstallError, match="no network"):
        install.install_folder(tmp_path / "tool-1", fail, ignore, title="tool")
    assert [path.name for path in tmp_path.iterdir()] == [install.LOCK]


def test_what_a_killed_build_left_is_cleared(tmp_path: Path) -> None:
    left_over = tmp_path / ".building-tool-1-abc"
    left_over.mkdir()
    (left_over / "part").write_text("x")
    other = tmp_path / ".building-other-1-abc"
    other.mkdir()
    install.install_folder(tmp_path / "tool-1", build_tool, ignore, title="tool")
    assert not left_over.exists()
    assert other.exists()


def test_there_once_is_there_for_good_unless_forced(tmp_path: Path) -> None:
    final = install.install_folder(tmp_path / "tool-1", build_tool, ignore, title="tool")
    (final / "mark").touch()
    install.install_folder(tmp_path / "tool-1", build_tool, ignore, title="tool")
    assert (final / "mark").exists()
    install.install_folder(tmp_path / "tool-1", build_tool, ignore, title="tool", force=True)
    assert not (final / "mark").exists()


def build_slowly(folder: Path) -> Sequence[str]:
    (folder.parent / "builds").open("a").write("x")
    time.sleep(0.2)
    return build_tool(folder)


def install_slowly(cache: Path) -> None:
    install.install_folder(cache / "tool-1", build_slowly, ignore, title="tool")


def test_installations_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=install_slowly, args=(tmp_path,)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_the_lock_gives_up_and_names_itself(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl,sys; f=open({str(tmp_path / 'lock')!r},'a'); fcntl.flock(f,2); print(1,flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline()
        said: list[str] = []
        with pytest.raises(InstallError, match="lock"), install.exclusive(tmp_path / "lock", said.append, timeout_s=0.3):
            pass
        assert len(said) == 1
        holder.kill()
    with install.exclusive(tmp_path / "lock", ignore, timeout_s=10):
        pass


def test_commands_fail_with_their_last_words(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r"trying: sh failed with code 3.*\n    broken pipe dream"):
        install.run(["sh", "-c", "echo broken pipe dream; exit 3"], what="trying", log=tmp_path / "log")
    with pytest.raises(InstallError, match="trying: no-such-tool is not installed"):
        install.run(["no-such-tool"], what="trying", log=tmp_path / "log")
    with pytest.raises(InstallError, match="did not finish"):
        install.run(["sleep", "9"], what="trying", log=tmp_path / "log", timeout_s=0.1)


def test_commands_return_only_their_own_output(tmp_path: Path) -> None:
    install.run(["echo", "first"], what="trying", log=tmp_path / "log")
    assert install.run(["echo", "second"], what="trying", log=tmp_path / "log") == "second\n"
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


def test_native_programs_are_compiled_once_per_source(tmp_path: Path) -> None:
    source = tmp_path / "hello.c"
    source.write_text("int main(void) { return 7; }\n")
    program = native.build(source, tmp_path / "cache")
    assert subprocess.call([program]) == 7
    assert native.build(source, tmp_path / "cache") == program
    source.write_text("int main(void) { return 8; }\n")
    changed = native.build(source, tmp_path / "cache")
    assert changed != program
    assert subprocess.call([changed]) == 8


def test_native_errors_show_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int main(void) { return nothing; }\n")
    with pytest.raises(InstallError, match=r"(?s)compiling .*bad\.c: gcc failed.*nothing"):
        native.build(source, tmp_path / "cache")
    with pytest.raises(InstallError, match="cannot read"):
        native.build(tmp_path / "absent.c", tmp_path / "cache")
