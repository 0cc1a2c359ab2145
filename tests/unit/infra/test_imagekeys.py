"""The folder of image keys: made once, whole, for nobody else to read; what is wrong in it is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import imagekeys
from infra.errors import KeysInvalid


def test_a_folder_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "keys"
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: imagekeys.make(folder), range(8))) == 1
    keys = imagekeys.load(folder)
    assert len(keys.ring) == len(keys.signing) == len(keys.trusted) == 1 and set(keys.signing) == set(keys.trusted)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(("ring", "signing", "trusted"), 0o600)
    assert [path.name for path in folder.parent.iterdir()] == ["keys"], "nothing half-made is left"
    assert not imagekeys.make(folder) and imagekeys.load(folder) == keys


def test_a_rotation_adds_and_keeps(tmp_path: Path) -> None:
    imagekeys.make(tmp_path / "keys")
    before = imagekeys.load(tmp_path / "keys")
    ring, signing = imagekeys.add_ring_key(tmp_path / "keys"), imagekeys.add_signing_key(tmp_path / "keys")
    after = imagekeys.load(tmp_path / "keys")
    assert list(after.ring) == [*before.ring, ring] and list(after.signing) == list(after.trusted) == [*before.signing, signing]
    assert all(after.ring[key_id] == key for key_id, key in before.ring.items())


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("ring", "", "holds no key"),
        ("trusted", "# none yet\n\n", "holds no key"),
        ("ring", "one AAAA\n", "line 1: not an id and 32 bytes"),
        ("ring", "no-key-at-all\n", "line 1: not an id"),
        ("ring", "UPPER " + "A" * 43 + "=\n", "line 1: not an id"),
        ("signing", "# it\none " + "A" * 43 + "=\none " + "B" * 42 + "A=\n", "line 3: a second key with the id one"),
    ],
)
def test_what_is_malformed_is_named_without_telling_it(tmp_path: Path, file: str, text: str, said: str) -> None:
    imagekeys.make(tmp_path / "keys")
    (tmp_path / "keys" / file).write_text(text)
    with pytest.raises(KeysInvalid, match=said) as caught:
        imagekeys.load(tmp_path / "keys")
    assert "AAAA" not in str(caught.value) and file in str(caught.value)


@pytest.mark.parametrize("file", ["ring", "signing"])
def test_secrets_that_others_can_read_are_refused(tmp_path: Path, file: str) -> None:
    imagekeys.make(tmp_path / "keys")
    (tmp_path / "keys" / file).chmod(0o640)
    with pytest.raises(KeysInvalid, match="can be read by others"):
        imagekeys.load(tmp_path / "keys")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeysInvalid, match=r"keys/ring.*thaw keys make"):
        imagekeys.load(tmp_path / "keys")
    imagekeys.make(tmp_path / "keys")
    (tmp_path / "keys" / "signing").unlink()
    assert imagekeys.load(tmp_path / "keys").signing == {}
