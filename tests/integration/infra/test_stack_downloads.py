"""Installed tools that are not what they were: one flipped byte is refused before anything runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import settings as settings_module
from infra.errors import InstallError
from infra.local import broker, criu, objectstore, stack
from infra.settings import Settings

pytestmark = pytest.mark.stack


def ignore(_line: str) -> None:
    pass


def with_a_copy(of: Callable[[Settings], Path], stack_settings: Settings, tmp_path: Path) -> tuple[Settings, Path]:
    """Copy one installed tool into a cache of the test's own."""
    flags = {"paths.cache_dir": tmp_path / "cache", "paths.state_dir": tmp_path / "state"}
    settings = settings_module.load(environment={}, flags=flags)
    shutil.copytree(of(stack_settings), of(settings))
    return settings, of(settings)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_byte_in_a_jar(stack_settings: Settings, tmp_path: Path) -> None:
    settings, home = with_a_copy(broker.folder, stack_settings, tmp_path)
    broker.ensure(settings, ignore)
    flip(home / "libs" / "kafka-clients-4.3.1.jar")
    with pytest.raises(InstallError, match=rf"kafka-clients-4\.3\.1\.jar is not what .*remove {home} and run `thaw stack install`"):
        broker.ensure(settings, ignore)


def test_a_jar_too_many_or_too_few(stack_settings: Settings, tmp_path: Path) -> None:
    settings, home = with_a_copy(broker.folder, stack_settings, tmp_path)
    shutil.copy(home / "libs" / "re2j-1.8.jar", home / "libs" / "aaa.jar")
    with pytest.raises(InstallError, match=r"aaa\.jar does not belong there"):
        broker.ensure(settings, ignore)
    (home / "libs" / "aaa.jar").unlink()
    (home / "libs" / "re2j-1.8.jar").unlink()
    with pytest.raises(InstallError, match=r"re2j-1\.8\.jar cannot be read"):
        broker.ensure(settings, ignore)


def test_a_flipped_byte_in_the_object_store(stack_settings: Settings, tmp_path: Path) -> None:
    settings, home = with_a_copy(objectstore.folder, stack_settings, tmp_path)
    objectstore.ensure(settings, ignore)
    flip(home / "versitygw")
    with pytest.raises(InstallError, match="versitygw is not what it should be"):
        objectstore.ensure(settings, ignore)


def test_a_flipped_byte_in_criu_stops_up(stack_settings: Settings, tmp_path: Path) -> None:
    settings, home = with_a_copy(criu.folder, stack_settings, tmp_path)
    assert criu.criu_path(settings) == home / "criu"
    flip(home / "criu")
    with pytest.raises(InstallError, match="criu is not what it should be"):
        stack.up(settings, ignore)
    assert not settings.stack_file.exists()


def test_what_is_not_installed_says_how(tmp_path: Path) -> None:
    settings = settings_module.load(environment={}, flags={"paths.cache_dir": tmp_path})
    with pytest.raises(InstallError, match="run `thaw stack install`"):
        criu.criu_path(settings)
