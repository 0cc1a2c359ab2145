"""Small disks of their own for parts of the installation, which can be filled to the last byte.

In: folders. Out: an ext4 of limited size, in a file, mounted on each for as long as a ``with`` block lasts. (Not a tmpfs: the object store
keeps metadata in extended attributes, which a tmpfs has only since Linux 6.6.) Used by :mod:`loadgen.chaos.faults`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from loadgen.errors import LoadImpossible

_FILLER = ".thaw-chaos-filler"


class Disk:
    """One mounted folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / _FILLER
        self._device = folder.stat().st_dev

    def fill(self) -> None:
        """Leave no byte free: whoever writes gets ENOSPC."""
        with self._filler.open("ab") as file:
            if os.fstat(file.fileno()).st_dev != self._device:
                return  # it is not mounted any more: never fill the machine's own disk
            # Smaller and smaller, because others write and delete meanwhile.
            for divisor in (1, 2, 4, 8, 16):
                free = os.statvfs(self.folder)
                with contextlib.suppress(OSError):
                    size = file.seek(0, os.SEEK_END)
                    os.posix_fallocate(file.fileno(), size, max(4096, free.f_bavail * free.f_frsize // divisor))
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), 4096)

    def free(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(files: Path, sizes_mb: Mapping[Path, int]) -> Iterator[dict[Path, Disk]]:
    """Mount a disk of each size on each folder; unmounted on every way out.

    Args:
        files: folder for the disks' own files, sparse.
        sizes_mb: by folder.

    Raises:
        LoadImpossible: the kernel refuses, or mkfs is missing.
    """
    files.mkdir(parents=True, exist_ok=True)
    done: list[Path] = []
    try:
        for number, (folder, size_mb) in enumerate(sizes_mb.items()):
            folder.mkdir(parents=True, exist_ok=True)
            image = files / f"disk-{number}.ext4"
            with image.open("wb") as file:
                file.truncate(size_mb << 20)
            _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,nodiscard", str(image))
            _run("mount", "-o", "loop,nodiscard", str(image), str(folder))
            done.append(folder)
            # The broker takes it for a partition's folder.
            (folder / "lost+found").rmdir()
        yield {folder: Disk(folder) for folder in done}
    finally:
        for folder in reversed(done):
            # Lazily when something is still open there: it goes with the last process that has it.
            if subprocess.run(["umount", folder], capture_output=True, check=False).returncode:
                subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def _run(*command: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LoadImpossible(f"cannot make a small disk: {error}") from error
    if result.returncode:
        raise LoadImpossible(f"cannot make a small disk: {' '.join(command)}: {result.stderr.strip()}")
