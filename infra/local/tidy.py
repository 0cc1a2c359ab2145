"""Which folders of the cache nobody needs any more: older versions of a tool or of a part of an image.

In: a folder that was just installed. Out: folders beside it of the same kind that can go. Names end in a digest of what went in, so that
each change of a source makes a folder; without this they would stay for ever. Next: :func:`infra.local.install.install_folder` removes
them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path

#: ``image-scaler-0123456789ab``, ``kafka-4.3.1-0123456789ab``: what it is, perhaps its version, and the digest.
_NAME = re.compile(r"(?P<kind>.+?)(-[0-9]+(\.[0-9]+)+)?-[0-9a-f]{12,16}")
#: So many of a kind stay, the ones used last: two checkouts side by side must not build for each other in turns.
KEPT = 2
#: What was used within this time stays too, s.
RECENT_S = 86_400.0


def old_versions(made: Path, receipt: str) -> list[Path]:
    """Other folders of the kind of ``made`` that were not used for a day, are not among the newest, and no process has to do with.

    Args:
        made: the new folder.
        receipt: file in each installed folder, whose time is that of its last use.
    """
    kind = _kind(made)
    if kind is None:
        return []
    used: dict[Path, float] = {}
    for folder in made.parent.iterdir():
        if _kind(folder) == kind and (folder / receipt).is_file():
            used[folder] = (folder / receipt).stat().st_mtime
    newest_first = sorted(used, key=lambda folder: used[folder], reverse=True)
    old = [folder for folder in newest_first[KEPT:] if folder != made and used[folder] < time.time() - RECENT_S]
    return [folder for folder in old if folder not in _in_use(old)] if old else []


def _kind(folder: Path) -> str | None:
    match = _NAME.fullmatch(folder.name)
    return match["kind"] if match else None


def _in_use(folders: Collection[Path]) -> set[Path]:
    """Those that a process runs from, stands in, has open (as whoever called ``install_folder`` has) or was told of."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        for name in _named(process):
            found.update(folder for folder in folders if f"{folder}/" in name or f"{folder.resolve()}/" in name)
    return found


def _named(process: Path) -> Iterator[str]:
    try:
        yield (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", "/ ") + "/"
        for link in (process / "exe", process / "cwd", *(process / "fd").iterdir()):
            yield os.readlink(link) + "/"  # noqa: PTH115
    except OSError:
        return  # it has ended, or is another user's
