"""The manifest: everything about a checkpoint but its bytes. Pure.

In: what :mod:`agent.checkpoint` measured. Out: msgpack whose SHA-256 is the checkpoint's name, so that whoever trusts the pointer
``functions/<function>/current`` can verify every byte below it. Objects of one function, each sealed (:mod:`agent.store.seal`)::

    functions/<function>/current                      pointer: the checkpoint's name and generation, signed
    functions/<function>/<checkpoint>/head            manifest, CRIU's metadata images, file changes
    functions/<function>/<checkpoint>/working-set     pages needed before the first response
    functions/<function>/chunks/<aa>/<name>           all other pages, zstd; the name is a keyed digest of what is inside
    functions/<function>/suspects/<name>              empty, not sealed: the chunk of this name was found corrupt
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

import msgspec

from agent.errors import ImageInvalid

#: The third is sealed, the fourth has layers of a form of their own.
FORMAT = 4
CHUNK_BYTES = 1 << 20
HEAD_MAGIC = b"THAWHEAD"
#: What a manifest holds may take 30 times its size in memory.
MANIFEST_BYTES_MAX = 8 << 20
#: Of the archive unpacked, and of the working set both packed and unpacked.
ARCHIVE_BYTES_MAX = 512 << 20
WORKING_SET_BYTES_MAX = 4 << 30
#: Pages files and pids, as text.
_NUMBER = re.compile("0|[1-9][0-9]{0,8}")
PAGE = 4096

Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 44)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes elsewhere, and how to know them: size and SHA-256 as stored, size after unpacking."""

    size: Size
    digest: Digest
    unpacked: Size


class MappedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the root that the process maps; it must be the same where the checkpoint is restored."""

    path: str
    size: Size
    digest: Digest


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Pages of a pages file."""

    offset: Size
    size: Size


class Pages(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pages file.

    Attributes:
        size: its bytes.
        chunks: the digest of each chunk, None for a chunk of zeros.
        zeros: pages of zeros, which are neither in the working set nor ever copied. In order and apart, as all spans.
        ahead: runs of pages that were used during the warm-up: a fault in one brings what is around it.
    """

    size: Size
    chunks: list[Digest | None]
    zeros: list[Span] = []
    ahead: list[Span] = []


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a pages file that the working set holds, in the order of the object."""

    pages_id: int
    offset: Size
    size: Size


class Fresh(msgspec.Struct, frozen=True, array_like=True):
    """Memory that is touched early and has no content in the image: where in the process, how much."""

    address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
    size: Size


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checkpoint.

    Attributes:
        function, function_digest, files_digest: what it is a checkpoint of; both digests must match the function's.
        criu, kernel, machine, cpu_flags: where it was made; flags must be a subset of those of the restoring node.
        root_pid: pid (inside) of the session leader.
        outputs: CRIU's names of the pipes that were standard output and error.
        mapped_files: files that must be the same on the restoring node.
        archive: metadata images and file changes, in the head object.
        working_set, extents: the working-set object and which bytes of which pages file it holds.
        fresh: by pid (as text), what the pager puts in place before resume.
        pages, chunk_bytes: all pages, by pages id (as text).
        key: id of the ring key by which chunks are named and sealed.
        image_bytes: size of all pages and metadata.
    """

    format: int = FORMAT
    function: str
    function_digest: str
    files_digest: str
    created_ns: int
    criu: str
    kernel: str
    machine: str
    cpu_flags: list[str]
    root_pid: int
    outputs: list[str]
    mapped_files: list[MappedFile]
    archive: Blob
    working_set: Blob
    extents: list[Extent]
    fresh: dict[str, list[Fresh]]
    pages: dict[str, Pages]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=PAGE, le=64 << 20)] = CHUNK_BYTES
    image_bytes: Size
    key: str


def encode(manifest: Manifest) -> bytes:
    """Canonical bytes."""
    return msgspec.msgpack.encode(manifest)


def name(encoded: bytes) -> str:
    """The checkpoint's name: 32 hex digits of the manifest's SHA-256."""
    return hashlib.sha256(encoded).hexdigest()[:32]


def decode(encoded: bytes, expected: str) -> Manifest:
    """Read and check a manifest.

    Args:
        encoded: its bytes.
        expected: the checkpoint's name.

    Raises:
        ImageInvalid: other bytes than the name says, another format, impossible numbers.
    """
    if name(encoded) != expected:
        raise ImageInvalid(f"the manifest of checkpoint {expected} is corrupt: its digest does not match its name")
    try:
        _check_format(encoded)
        manifest = _DECODER.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageInvalid(f"the manifest of checkpoint {expected} cannot be read: {error}") from error
    _check(manifest)
    return manifest


class _Format(msgspec.Struct):
    format: int = 0


_DECODER, _FORMATS = msgspec.msgpack.Decoder(Manifest), msgspec.msgpack.Decoder(_Format)


def _check_format(encoded: bytes) -> None:
    """Before fields are looked at, so that another format is called that and not corrupt."""
    found = _FORMATS.decode(encoded).format
    if found != FORMAT:
        raise ImageInvalid(f"checkpoint format {found} is not known here (this is {FORMAT}); make the checkpoint again")


def _check(manifest: Manifest) -> None:
    if manifest.chunk_bytes % PAGE:
        raise ImageInvalid("the chunk size is not a multiple of the page size")
    if max(manifest.archive.size, manifest.archive.unpacked) > ARCHIVE_BYTES_MAX:
        raise ImageInvalid("the checkpoint's archive is larger than this version accepts")
    if max(manifest.working_set.size, manifest.working_set.unpacked) > WORKING_SET_BYTES_MAX:
        raise ImageInvalid("the checkpoint is larger than this version accepts")
    sizes = {}
    for key, pages in manifest.pages.items():
        if not _NUMBER.fullmatch(key) or pages.size % PAGE or len(pages.chunks) != -(-pages.size // manifest.chunk_bytes):
            raise ImageInvalid(f"pages file {key!r}: size and number of chunks do not fit")
        if not (_in_order(pages.zeros, pages.size) and _in_order(pages.ahead, pages.size)):
            raise ImageInvalid(f"pages file {key!r}: spans are not whole pages in order")
        sizes[int(key)] = pages.size
    total = 0
    for extent in manifest.extents:
        if extent.offset % PAGE or extent.size % PAGE or extent.offset + extent.size > sizes.get(extent.pages_id, -1):
            raise ImageInvalid("the working set refers to pages that are not there")
        total += extent.size
    if total != manifest.working_set.unpacked:
        raise ImageInvalid("the working set and its extents differ in size")
    for pid, runs in manifest.fresh.items():
        if not _NUMBER.fullmatch(pid) or any(run.address % PAGE or run.size % PAGE for run in runs):
            raise ImageInvalid("a recorded run is not made of whole pages")


def _in_order(spans: list[Span], size: int) -> bool:
    at = 0
    for span in spans:
        if span.offset < at or span.offset % PAGE or span.size % PAGE or span.size == 0:
            return False
        at = span.offset + span.size
    return at <= size


def pack_head(encoded_manifest: bytes, archive: bytes) -> bytes:
    """The head object."""
    return HEAD_MAGIC + len(encoded_manifest).to_bytes(4, "big") + encoded_manifest + archive


def unpack_head(head: bytes | bytearray, expected: str) -> tuple[Manifest, bytes, bytes]:
    """Take a head object apart.

    Returns:
        The manifest, its bytes, and the verified (still packed) archive.

    Raises:
        ImageInvalid: anything in it is not as named.
    """
    if head[:8] != HEAD_MAGIC or len(head) < 12:
        raise ImageInvalid(f"the head of checkpoint {expected} is not a Thaw checkpoint")
    size = int.from_bytes(head[8:12], "big")
    if size > MANIFEST_BYTES_MAX or 12 + size > len(head):
        raise ImageInvalid(f"the head of checkpoint {expected} is cut short")
    encoded, archive = bytes(head[12 : 12 + size]), bytes(head[12 + size :])
    manifest = decode(encoded, expected)
    verify(archive, manifest.archive, f"the archive of checkpoint {expected}")
    return manifest, encoded, archive


def verify(data: bytes | bytearray, blob: Blob, what: str) -> None:
    """Check size and digest.

    Raises:
        ImageInvalid: they differ; ``what`` is named.
    """
    if len(data) != blob.size or hashlib.sha256(data).digest() != blob.digest:
        raise ImageInvalid(f"{what} is corrupt: its digest does not match the manifest")


def pointer_key(function: str) -> str:
    """Key of the current-checkpoint pointer."""
    return f"functions/{function}/current"


def head_key(function: str, checkpoint: str) -> str:
    """Key of the head object."""
    return f"functions/{function}/{checkpoint}/head"


def working_set_key(function: str, checkpoint: str) -> str:
    """Key of the working-set object."""
    return f"functions/{function}/{checkpoint}/working-set"


def chunk_key(function: str, name: str) -> str:
    """Key of one chunk.

    Args:
        function: whose.
        name: of :meth:`agent.store.seal.Sealer.chunk_name`.
    """
    return f"functions/{function}/chunks/{name[:2]}/{name}"


def suspect_key(function: str, name: str = "") -> str:
    """Key of the note that a chunk is corrupt; without a name the prefix of all notes."""
    return f"functions/{function}/suspects/{name}"
