"""OCI image archives made without a Docker engine, from lists of files.

In: :class:`Entry` lists, one per layer. Out: a tar file that ``ctr images import`` and ``skopeo`` read, the same bytes for the same
content, and the digest that names it. The format is of https://github.com/opencontainers/image-spec v1.1 (image-layout.md, manifest.md,
config.md, layer.md). Next: :func:`infra.kubernetes.cluster.life.load_image` gives it to the nodes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from infra.errors import ImageError

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Entry:
    """One file, folder or symbolic link of an image. Owned by root."""

    #: Where in the image, without the leading slash.
    path: str
    #: A file on this machine, content, the target of a symbolic link (str), or None for a folder.
    source: Path | bytes | str | None
    #: Permissions; None: those of the file on this machine, 0755 for a folder, 0644 for content.
    mode: int | None = None


@dataclass(frozen=True)
class Config:
    """How containers of an image start when nothing else is said."""

    #: Program and arguments.
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    #: ``uid:gid``; numbers, so that Kubernetes can tell that it is not root.
    user: str = ""
    folder: str = "/"
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """What an archive holds."""

    #: Name and tag.
    reference: str
    #: Digest of its manifest, ``sha256:…``.
    digest: str

    @property
    def pinned(self) -> str:
        """Its name by content, ``name@sha256:…``."""
        return f"{self.reference.rpartition(':')[0]}@{self.digest}"


def tree(folder: Path, at: str = "") -> Iterator[Entry]:
    """Yield everything below a folder of this machine, to be put at ``at`` in the image; links stay links.

    Raises:
        ImageError: there is a device, socket or pipe in it.
    """
    for path in sorted(folder.rglob("*")):
        name = str(PurePosixPath(at) / path.relative_to(folder).as_posix())
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            yield Entry(name, str(path.readlink()))
        elif stat.S_ISDIR(kind):
            yield Entry(name, None, stat.S_IMODE(kind))
        elif stat.S_ISREG(kind):
            yield Entry(name, path)
        else:
            raise ImageError(f"{path} is neither file, folder nor link: leave it out of the image")


def write(archive: Path, reference: str, layers: Sequence[Iterable[Entry]], config: Config | None = None) -> Image:
    """Write an image archive.

    Args:
        archive: where to.
        reference: name and tag, e.g. ``localhost/thaw/agent:1``.
        layers: what it holds, the lowest first; what rarely changes belongs into a layer of its own.
        config: how its containers start.

    Raises:
        ImageError: a name is unusable or taken twice, or a file can't be read.
    """
    name, _, tag = reference.rpartition(":")
    if not name or not tag or "/" in tag:
        raise ImageError(f"an image needs a name and a tag, such as localhost/thaw/agent:1, not {reference!r}")
    with tempfile.TemporaryDirectory(prefix=f"{archive.name}-", dir=archive.parent) as folder:
        files = [_write_layer(Path(folder) / f"layer-{index}", entries) for index, entries in enumerate(layers)]
        described = [_descriptor(_LAYER, digest, path.stat().st_size) for path, digest in files]
        settings = _config(config or Config(), [digest for _, digest in files])
        manifest = _encode(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": _descriptor(_CONFIG, _digest(settings), len(settings)),
                "layers": described,
            }
        )
        image = Image(reference, _digest(manifest))
        # Twice the same image: by its tag, and by its content for pods that name exactly this one.
        named = [
            {
                **_descriptor(_MANIFEST, image.digest, len(manifest)),
                "platform": {"architecture": _architecture(), "os": "linux"},
                "annotations": {"io.containerd.image.name": text, "org.opencontainers.image.ref.name": tag},
            }
            for text in (reference, image.pinned)
        ]
        index = _encode({"schemaVersion": 2, "mediaType": _INDEX, "manifests": named})
        with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
            _add(tar, "oci-layout", io.BytesIO(_encode({"imageLayoutVersion": "1.0.0"})))
            _add(tar, "index.json", io.BytesIO(index))
            for content in (manifest, settings):
                _add(tar, _blob(_digest(content)), io.BytesIO(content))
            for digest, path in {digest: path for path, digest in files}.items():
                with path.open("rb") as layer:
                    _add(tar, _blob(digest), layer)
    return image


def read(archive: Path) -> Image:
    """Say what an archive that :func:`write` made holds.

    Raises:
        ImageError: it is no such archive.
    """
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile("index.json")
            first = json.loads(file.read())["manifests"][0] if file is not None else {}
        return Image(first["annotations"]["io.containerd.image.name"], first["digest"])
    except (OSError, tarfile.TarError, ValueError, LookupError) as error:
        raise ImageError(f"{archive} is not an image archive: {error}") from error


def _write_layer(path: Path, entries: Iterable[Entry]) -> tuple[Path, str]:
    """Write one layer, sorted and complete with parent folders; return it with its digest."""
    found: dict[str, Entry] = {}
    for entry in entries:
        parts = PurePosixPath(entry.path).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ImageError(f"{entry.path!r} can't be in an image: names are relative to its root")
        name = "/".join(parts)
        if name in found and (entry.source is not None or found[name].source is not None):
            raise ImageError(f"{name} is in the image twice")
        found[name] = entry
    for name in list(found):
        for parent in PurePosixPath(name).parents:
            if str(parent) != ".":
                found.setdefault(str(parent), Entry(str(parent), None))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, entry in sorted(found.items()):
            _add_entry(tar, name, entry)
    with path.open("rb") as file:
        return path, f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _add_entry(tar: tarfile.TarFile, name: str, entry: Entry) -> None:
    if entry.source is None:
        _add(tar, name, None, tarfile.DIRTYPE, 0o755 if entry.mode is None else entry.mode)
    elif isinstance(entry.source, str):
        _add(tar, name, None, tarfile.SYMTYPE, 0o777, entry.source)
    elif isinstance(entry.source, bytes):
        _add(tar, name, io.BytesIO(entry.source), mode=0o644 if entry.mode is None else entry.mode)
    else:
        try:
            with entry.source.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) if entry.mode is None else entry.mode
                _add(tar, name, file, mode=mode)
        except OSError as error:
            raise ImageError(f"{entry.source} can't go into the image: {error.strerror}") from error


def _add(
    tar: tarfile.TarFile, name: str, content: IO[bytes] | None, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, target: str = ""
) -> None:
    # Time, owner and group stay 0: they would be different on each machine.
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = kind, mode, target
    if content is not None:
        info.size = content.seek(0, io.SEEK_END)
        content.seek(0)
    tar.addfile(info, content)


def _config(config: Config, layers: Sequence[str]) -> bytes:
    how: dict[str, Any] = {
        "Env": [f"{name}={value}" for name, value in sorted(config.environment.items())],
        "Entrypoint": list(config.command),
        "WorkingDir": config.folder,
    }
    if config.user:
        how["User"] = config.user
    if config.labels:
        how["Labels"] = dict(sorted(config.labels.items()))
    return _encode(
        {
            "created": "1970-01-01T00:00:00Z",
            "architecture": _architecture(),
            "os": "linux",
            "config": how,
            "rootfs": {"type": "layers", "diff_ids": list(layers)},
        }
    )


def _architecture() -> str:
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size}


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _blob(digest: str) -> str:
    return f"blobs/sha256/{digest.partition(':')[2]}"
