"""Root files of a function: read-only layers on the node, and what each instance gets anew.

In: a function's ``root`` and ``files``. Out: :class:`RootLayers` (lower directories of the overlay, and a digest of the files' content
that a checkpoint must match), and the identity file that tells an instance who it is. Used by :mod:`agent.node` and the sequences.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agent.api.function import Function
from agent.errors import FunctionInvalid


@dataclass(frozen=True)
class RootLayers:
    """What a function sees read-only.

    Attributes:
        root: lower directory of the overlay; empty: a container's own, which no folder of the node shows.
        layer: the function's files on the node, laid out as in the root; empty when it has none.
        targets: paths of ``layer`` that are bound over the root. They cannot be a second lower directory: the kernel refuses
            layers of which one is inside the other (ELOOP), and the root is usually ``/``.
        files_digest: hex SHA-256 over names, modes and contents of the files; of a pod: over the names of its images.
    """

    root: str
    layer: str
    targets: tuple[str, ...]
    files_digest: str

    @property
    def search(self) -> tuple[str, ...]:
        """Directories of the node in which a path of the root is looked for, first match wins."""
        return tuple(path for path in (self.layer, self.root) if path)

    @property
    def binds(self) -> tuple[tuple[str, str], ...]:
        """(source on the node, target in the root)."""
        return tuple((self.layer + target, target) for target in self.targets)


def prepare(function: Function, layers: Path) -> RootLayers:
    """Copy the function's ``files`` into a layer of their own (once per content) and name the lower directories.

    Blocking; reads every file.

    Raises:
        FunctionInvalid: a source is missing or unreadable, or ``root`` is no directory.
    """
    spec = function.spec
    if not Path(spec.root).is_dir():
        raise FunctionInvalid(f"spec.root: {spec.root} is not a directory on this node", function=function.name)
    if not spec.files:
        return RootLayers(spec.root, "", (), hashlib.sha256(b"").hexdigest())
    layers.mkdir(parents=True, exist_ok=True)
    try:
        digest = _digest(function)
        final = layers / digest[:32]
        if not final.exists():
            _build(function, layers, final)
    except OSError as error:
        raise FunctionInvalid(f"spec.files: {error.filename}: {error.strerror}", function=function.name) from error
    return RootLayers(spec.root, str(final), _topmost([item.target for item in spec.files]), digest)


def identity(*, instance: str, function: str, checkpoint: str) -> bytes:
    """What an instance is told about itself, in ``/run/thaw/instance.json``: with a new seed at each start and resume.

    Args:
        instance, function, checkpoint: names; no checkpoint: an empty text.
    """
    content = {
        "instance": instance, "function": function, "checkpoint": checkpoint, "seed": os.urandom(32).hex(), "resumed_ns": time.time_ns(),
    }  # fmt: skip
    return json.dumps(content).encode() + b"\n"


def put_identity(folder_fd: int, content: bytes, user: int) -> None:
    """Write ``instance.json``, whatever is there, while the process does not run.

    Args:
        folder_fd: where; may belong to the instance, so nothing in it is followed.
        content: of :func:`identity`.
        user: who may read it.
    """
    name = "instance.json"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{name}.new", dir_fd=folder_fd)
    fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400, dir_fd=folder_fd)
    try:
        os.fchown(fd, user, user)
        os.write(fd, content)
    finally:
        os.close(fd)
    os.rename(f"{name}.new", name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)


def _topmost(targets: list[str]) -> tuple[str, ...]:
    """Targets that are not inside another one."""
    paths = sorted({PurePosixPath(target) for target in targets})
    return tuple(str(path) for path in paths if not any(parent in paths for parent in path.parents))


def _make_parents(root: Path, target: Path) -> None:
    for parent in reversed(target.relative_to(root).parents[:-1]):
        path = root / parent
        if not path.exists():
            path.mkdir()
            path.chmod(0o755)


def _digest(function: Function) -> str:
    """Hex SHA-256 over names, modes and bytes of the files, without Python's caches, which hold dates."""
    seen = hashlib.sha256()
    pending = [(Path(item.source), item.target) for item in reversed(function.spec.files)]
    top = {target for _, target in pending}
    while pending:
        source, name = pending.pop()
        status = source.stat() if name in top else source.lstat()
        if stat.S_ISLNK(status.st_mode):
            seen.update(f"l {name} {source.readlink()}\n".encode())
        elif stat.S_ISDIR(status.st_mode):
            seen.update(f"d {name}\n".encode())
            children = sorted(source.iterdir(), reverse=True)
            pending.extend((child, f"{name}/{child.name}") for child in children if child.name != "__pycache__")
        elif stat.S_ISREG(status.st_mode):
            with source.open("rb") as content:
                seen.update(f"f {name} {_mode(status):o} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return seen.hexdigest()


def _build(function: Function, layers: Path, final: Path) -> None:
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=layers))
    try:
        building.chmod(0o755)
        for item in function.spec.files:
            target = building / item.target.lstrip("/")
            _make_parents(building, target)
            _copy(Path(item.source).resolve(), target)
        building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _mode(status: os.stat_result) -> int:
    """Readable by all, and executable by all or none: functions run as another user than the owner of their files."""
    return 0o755 if status.st_mode & 0o111 else 0o644


def _copy(source: Path, target: Path) -> None:
    status = source.lstat()
    if stat.S_ISLNK(status.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISDIR(status.st_mode):
        target.mkdir(exist_ok=True)
        target.chmod(0o755)
        for child in source.iterdir():
            _copy(child, target / child.name)
    elif stat.S_ISREG(status.st_mode):
        shutil.copyfile(source, target)
        target.chmod(_mode(status))
        # Python trusts its compiled files only next to sources with the date they were compiled from.
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
