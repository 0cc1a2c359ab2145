"""Certificates in files: which are refused before a stream is opened, and what is said."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from infra import tls
from infra.errors import SettingsError, TlsError
from infra.local import authority
from infra.local.authority import Authority
from infra.settings import PathSettings, Settings, TlsSettings
from infra.tls import Identity
from thaw.certificate import command

OURS = Authority.make()


@pytest.fixture
def files(tmp_path: Path) -> TlsSettings:
    certificate, key = OURS.issue("thaw://agent/n1", "thaw://agent/n2")
    for name, content in (("ca.crt", OURS.pem), ("tls.crt", certificate), ("tls.key", key)):
        (tmp_path / name).write_bytes(content)
    return TlsSettings("on", *(str(tmp_path / name) for name in ("ca.crt", "tls.crt", "tls.key")))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ca.crt", None, r"tls\.ca: .*ca\.crt cannot be read: No such file"),
        ("ca.crt", b"nothing", r"tls\.ca: .*holds no certificate of an authority"),
        ("tls.crt", b"nothing", r"tls\.certificate: .*is no certificate"),
        ("tls.crt", b"", r"tls\.certificate: .*is no certificate"),
        ("tls.key", b"nothing", "do not belong together"),
        ("tls.key", OURS.issue("thaw://agent/n1")[1], "do not belong together"),
        ("tls.crt", OURS.issue("thaw://scaler/s")[0], r"is not for thaw://agent/n1, its SAN URIs are: thaw://scaler/s\. Have one issued"),
        ("tls.crt", OURS.issue("https://elsewhere/n1")[0], "is not for thaw://agent/n1"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, files: TlsSettings, file: str, content: bytes | None, message: str) -> None:
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TlsError, match=message):
        tls.credentials(Settings(tls=files), "agent", "n1")


def test_a_key_with_a_password_does_not_ask_at_the_terminal(tmp_path: Path, files: TlsSettings) -> None:
    locked = tmp_path / "locked.key"
    subprocess.run(["openssl", "pkcs8", "-topk8", "-in", files.key, "-out", locked, "-passout", "pass:word"], check=True)
    with pytest.raises(TlsError, match="the key has a password"):
        tls.credentials(Settings(tls=dataclasses.replace(files, key=str(locked))), "agent", "n1")


def test_one_certificate_may_be_for_several(files: TlsSettings) -> None:
    settings = Settings(tls=files)
    for node in ("n1", "n2"):
        assert tls.credentials(settings, "agent", node) is not None
    with pytest.raises(TlsError, match="not for thaw://agent/n3"):
        tls.credentials(settings, "agent", "n3")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"key": ""}, "set all three, or none"), ({"mode": "maybe"}, "'maybe' is neither on nor off")],
)
def test_settings_that_contradict_each_other(files: TlsSettings, wrong: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        tls.credentials(Settings(tls=dataclasses.replace(files, **wrong)), "agent", "n1")


@pytest.mark.parametrize(("days", "message"), [(3, "ends at"), (-3, "has ended at"), (30, "")])
def test_the_end_of_a_certificate_is_told(
    tmp_path: Path, files: TlsSettings, caplog: pytest.LogCaptureFixture, days: int, message: str
) -> None:
    certificate, key = OURS.issue("thaw://agent/n1", life=datetime.timedelta(days=days))
    (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    with caplog.at_level(logging.WARNING):
        tls.credentials(Settings(tls=files), "agent", "n1")
    assert (message in caplog.text and "renew it" in caplog.text) if message else not caplog.records


def test_identities_are_exact() -> None:
    found = tls.identities(["thaw://agent/*", "thaw://scaler/a/b", "https://agent/x", "thaw://agent", "thaw://", "agent/n1"])
    assert found == (Identity("agent", "*"), Identity("scaler", "a/b"))
    assert Identity("agent", "*").covers("agent", "n1") and not Identity("agent", "n*").covers("agent", "n1")
    assert not Identity("agent", "n1").covers("agent", "n10") and not Identity("scaler", "*").covers("agent", "n1")
    assert tls.identities_of(None) == tls.identities_of({"subjectAltName": (("DNS", "thaw://agent/n1"),)}) == ()


def test_an_authority_that_nearly_ends_is_replaced_with_all_that_it_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [path.read_bytes() for path in authority.ensure(tmp_path / "tls", "thaw://agent/n1")]
    monkeypatch.setattr(authority, "_LEFT", authority.LIFE + datetime.timedelta(days=1))
    after = [path.read_bytes() for path in authority.ensure(tmp_path / "tls", "thaw://agent/n1")]
    assert not set(before) & set(after)


def test_what_is_no_authority_is_a_clear_error(tmp_path: Path) -> None:
    authority.ensure(tmp_path / "tls", "thaw://agent/n1")
    (tmp_path / "tls" / "ca.key").write_bytes(OURS.issue("thaw://agent/n1")[1])
    with pytest.raises(TlsError, match=r"do not belong together.*Remove that folder"):
        authority.ensure(tmp_path / "tls", "thaw://agent/n1")


def test_certificates_for_other_machines(tmp_path: Path) -> None:
    settings = Settings(paths=PathSettings(state_dir=tmp_path))
    out = tmp_path / "out"
    done = CliRunner().invoke(command, ["thaw://agent/n2", "thaw://watcher/w", "--out", str(out)], obj=settings)
    assert done.exit_code == 0, done.output
    assert (out / "tls.key").stat().st_mode & 0o777 == 0o600
    given = TlsSettings("on", *(str(out / name) for name in ("ca.crt", "tls.crt", "tls.key")))
    for role, name in (("agent", "n2"), ("watcher", "")):
        tls.credentials(Settings(tls=given), role, name)
    assert (out / "ca.crt").read_bytes() == (tmp_path / "tls" / "ca.crt").read_bytes()
    for wrong in ("n2", "thaw://admin/x", "thaw://agent/"):
        assert CliRunner().invoke(command, [wrong, "--out", str(out)], obj=settings).exit_code == 2
