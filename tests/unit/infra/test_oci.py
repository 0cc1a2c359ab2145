from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest

from infra.errors import ImageError
from infra.kubernetes import oci


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "content"
    (found / "etc").mkdir(parents=True)
    (found / "etc" / "words").write_text("words")
    (found / "link").symlink_to("etc/words")
    program = found / "program"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    return found


def contents(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file is not None}


def layer(archive: Path, index: int = 0) -> tarfile.TarFile:
    found = contents(archive)
    manifest = json.loads(found[blob(json.loads(found["index.json"])["manifests"][0]["digest"])])
    path = archive.with_suffix(f".layer-{index}")
    path.write_bytes(found[blob(manifest["layers"][index]["digest"])])
    return tarfile.open(path)


def blob(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def test_every_digest_and_size_in_an_archive_is_that_of_its_content(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    image = oci.write(
        archive, "localhost/a/b:1", [oci.tree(folder), [oci.Entry("more", b"1")]], oci.Config(command=("/program",), user="7:8")
    )
    found = contents(archive)
    for name, content in found.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"
    manifest = json.loads(found[blob(image.digest)])
    for described in (manifest["config"], *manifest["layers"]):
        assert len(found[blob(described["digest"])]) == described["size"]
    config = json.loads(found[blob(manifest["config"]["digest"])])
    # Layers are not compressed: what a layer is called is also what it holds.
    assert config["rootfs"]["diff_ids"] == [described["digest"] for described in manifest["layers"]]
    assert (config["config"]["Entrypoint"], config["config"]["User"]) == (["/program"], "7:8")


def test_an_image_has_two_names_of_which_one_is_its_content(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    image = oci.write(archive, "localhost:5000/a:1", [oci.tree(folder)])
    manifests = json.loads(contents(archive)["index.json"])["manifests"]
    assert [entry["annotations"]["io.containerd.image.name"] for entry in manifests] == ["localhost:5000/a:1", image.pinned]
    assert image.pinned == f"localhost:5000/a@{image.digest}"
    assert oci.read(archive) == image


def test_the_same_content_is_the_same_archive(folder: Path, tmp_path: Path) -> None:
    first = oci.write(tmp_path / "a.tar", "localhost/a:1", [oci.tree(folder, "app")])
    os.utime(folder / "program", (1, 1))
    if os.geteuid() == 0:
        os.chown(folder / "program", 5, 5)
    entries = list(reversed(list(oci.tree(folder, "app"))))
    second = oci.write(tmp_path / "b.tar", "localhost/a:1", [entries])
    assert first == second
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    (folder / "etc" / "words").write_text("other")
    assert oci.write(tmp_path / "c.tar", "localhost/a:1", [oci.tree(folder, "app")]).digest != first.digest


def test_layers_hold_files_links_and_every_parent(folder: Path, tmp_path: Path) -> None:
    oci.write(tmp_path / "image.tar", "localhost/a:1", [oci.tree(folder, "opt/app")])
    with layer(tmp_path / "image.tar") as tar:
        assert tar.getnames() == ["opt", "opt/app", "opt/app/etc", "opt/app/etc/words", "opt/app/link", "opt/app/program"]
        assert tar.getmember("opt/app/link").linkname == "etc/words"
        assert tar.getmember("opt/app/program").mode == 0o755
        assert {(member.uid, member.gid, member.mtime) for member in tar} == {(0, 0, 0)}


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", ""])
def test_names_that_leave_the_image_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="can't be in an image"):
        oci.write(tmp_path / "image.tar", "localhost/a:1", [[oci.Entry(path, b"")]])
    assert list(tmp_path.glob("image.tar-*")) == []


def test_what_is_no_image_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="needs a name and a tag"):
        oci.write(tmp_path / "image.tar", "localhost:5000/a", [])
    with pytest.raises(ImageError, match="is in the image twice"):
        oci.write(tmp_path / "image.tar", "localhost/a:1", [[oci.Entry("a", b"1"), oci.Entry("a", b"2")]])
    with pytest.raises(ImageError, match=r"gone can't go into the image: No such file"):
        oci.write(tmp_path / "image.tar", "localhost/a:1", [[oci.Entry("a", tmp_path / "gone")]])
    os.mkfifo(folder / "pipe")
    with pytest.raises(ImageError, match="neither file, folder nor link"):
        list(oci.tree(folder))
    (tmp_path / "text").write_text("text")
    with pytest.raises(ImageError, match="is not an image archive"):
        oci.read(tmp_path / "text")
