"""``thaw keys``: makes, rotates, shows, and never shows what is secret."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from infra import imagekeys
from infra.errors import KeysInvalid
from thaw.cli import cli


def test_made_rotated_shown(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, ["--state-dir", str(tmp_path), "keys", *words])
        assert done.exit_code == 0, done.output
        return done.output

    folder = tmp_path / "image-keys"
    assert run("make") == f"made: {folder}\n"
    assert run("make") == f"left as it is: {folder}\n"
    first = imagekeys.load(folder)
    run("rotate")
    run("rotate", str(folder), "--signing")
    after = imagekeys.load(folder)
    assert (len(after.ring), len(after.signing), len(after.trusted)) == (2, 2, 2)
    shown = run("show")
    newest = list(after.ring)[-1]
    assert f"ring     {next(iter(first.ring))}\nring     {newest}  (for new checkpoints)\n" in shown
    secrets = [line.split()[1] for name in ("ring", "signing") for line in (folder / name).read_text().splitlines()]
    assert not any(secret in shown for secret in secrets)
    assert all(line.split()[1] in shown for line in (folder / "trusted").read_text().splitlines())


def test_without_keys_the_remedy_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["--state-dir", str(tmp_path), "keys", "rotate"])
    assert isinstance(done.exception, KeysInvalid) and "thaw keys make" in str(done.exception)
    assert not (tmp_path / "image-keys").exists()
