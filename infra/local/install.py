"""What every installer shares: locks, digests, logged commands, and folders that appear whole or not at all.

In: calls of :mod:`infra.local.criu`, :mod:`infra.local.broker`, :mod:`infra.local.objectstore` and
:mod:`infra.local.native`. Out: finished folders in the cache, each with a receipt of the digests of what it holds.
Next: :mod:`infra.local.stack` runs what was installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from infra.errors import InstallError
from infra.local import tidy

#: Takes one line of progress for a person to read.
Report = Callable[[str], None]

RECEIPT = "receipt.json"
LOCK = ".lock"
_TEMPORARY = ".building-"
#: Folders that this process works with, open: nobody removes them as old (:mod:`infra.local.tidy`) while it lives.
_held: dict[Path, int] = {}


def digest(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, sha256: str, *, remedy: str = "remove it and install again") -> None:
    """Check one file against the digest that it must have.

    Raises:
        InstallError: the file is missing or has other content; the message names the file, both digests and ``remedy``.
    """
    try:
        found = digest(path)
    except OSError as error:
        raise InstallError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if found != sha256:
        raise InstallError(f"{path} is not what it should be (sha256 {found}, expected {sha256}): {remedy}")


def verify_receipt(folder: Path) -> None:
    """Check each file of an installed folder against the receipt written when it was made.

    Raises:
        InstallError: a file is missing or changed, or there is no receipt.
    """
    remedy = f"remove {folder} and run `thaw stack install`"
    try:
        files = json.loads((folder / RECEIPT).read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise InstallError(f"{folder} has no readable {RECEIPT}: {remedy}") from error
    for name, sha256 in files.items():
        verify(folder / name, sha256, remedy=remedy)


def run(
    command: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 900.0,
) -> str:
    """Run one command of an installation with its output in a log.

    Args:
        command: program and arguments.
        what: what it does, for the error message.
        log: file that gets standard output and error, appended.
        cwd: working directory.
        environment: variables set in addition to the process's own.
        timeout_s: the command is ended after this long, s.

    Returns:
        What this command added to the log.

    Raises:
        InstallError: it could not be run, failed, or took too long; the message ends with the last lines of the log.
    """
    start = log.stat().st_size if log.exists() else 0
    words = [str(word) for word in command]
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                words,
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise InstallError(f"{what}: {words[0]} is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise InstallError(f"{what}: {words[0]} did not finish in {timeout_s:.0f} s, see {log}") from error
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in text.splitlines()[-15:])
        raise InstallError(f"{what}: {words[0]} failed with code {done.returncode}; its last words:\n{tail}")
    return text


@contextlib.contextmanager
def exclusive(file: Path, report: Report, *, timeout_s: float = 1800.0) -> Iterator[None]:
    """Hold a lock file, so that two runs never do the same work at once.

    The kernel drops the lock when its holder dies, so that a killed run blocks nobody.

    Raises:
        InstallError: another run still holds it after ``timeout_s``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        deadline = time.monotonic() + timeout_s
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InstallError(f"another run of thaw has held {file} for {timeout_s:.0f} s") from None
                if not told:
                    report(f"waiting for another run of thaw, which holds {file}")
                    told = True
                time.sleep(0.2)
        yield


def install_folder(
    final: Path, build: Callable[[Path], Sequence[str]], report: Report, *, title: str, force: bool = False, keep_old: bool = False
) -> Path:
    """Make a folder of the cache once: built beside its place, then renamed into it.

    An interrupted build leaves only a ``.building-`` folder, which the next build of the same thing removes. A new folder takes the
    place of those of its kind that nobody uses any more.

    Args:
        final: where the folder ends up; an existing one is left as it is.
        build: fills the folder it is given and returns the names of the files that the receipt must cover.
        report: gets the progress.
        title: what is installed, for progress.
        force: replace an existing folder.
        keep_old: older folders of its kind stay, because others name them.
    """
    if not force and _use(final):
        return final
    with exclusive(final.parent / LOCK, report):
        if not force and _use(final):
            return final
        discard(final)
        prefix = f"{_TEMPORARY}{final.name}-"
        for left_over in final.parent.glob(f"{prefix}*"):
            discard(left_over)
        began = time.monotonic()
        report(f"installing {title}")
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        try:
            files = build(temporary)
            receipt = {"title": title, "sha256": {name: digest(temporary / name) for name in files}}
            (temporary / RECEIPT).write_text(json.dumps(receipt, indent=1))
            temporary.chmod(0o755)
            temporary.rename(final)
        finally:
            if temporary.exists():
                discard(temporary)
        report(f"installed {title} in {time.monotonic() - began:.0f} s")
        _use(final)
        for folder in [] if keep_old else tidy.old_versions(final, RECEIPT):
            report(f"removing {folder.name}, which was not used lately")
            discard(folder)
    return final


def _use(folder: Path) -> bool:
    """Note that a folder is used, now and while this process lives; False: it is not there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    before = _held.pop(folder, None)
    if before is not None:
        os.close(before)
    _held[folder] = descriptor
    with contextlib.suppress(OSError):  # in an image nobody may write there, and nothing is removed
        os.utime(folder / RECEIPT)
    return True


def discard(folder: Path) -> None:
    """Remove a folder, the read-only folders of Go's module cache included."""
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
