"""Small files that are replaced whole, and files that may be gone when they are read.

In: a path and its content. Out: the file, of which readers see the old or the new content and never half of one. Used wherever Thaw tells
other processes of itself, or keeps keys.
"""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace a file. Not for two writers at once."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.rename(path)


def write_private(path: Path, content: bytes, *, lasting: bool = False) -> None:
    """Replace a file by one that only this user can read; ``lasting``: it is on the disk when this returns."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        if lasting:
            file.flush()
            os.fsync(file.fileno())
    new.rename(path)


def read_or_empty(path: Path) -> str:
    """A text file, as those of /proc, whose process may just have ended: then it is empty."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
