from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import processes

STAT = "4711 (a) b (c) S 1 4711 4711 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1 1 1"


def test_command_names_may_hold_parentheses() -> None:
    assert processes.parse_stat(STAT) == ((4711, 987654), "S")


@pytest.mark.parametrize("text", ["", "x", "1 (a) S", "4711 (a S 1"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        processes.parse_stat(text)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[processes.Identity]:
    identity = launch(tmp_path, ["sleep", "600"])
    yield identity
    processes.stop(identity, grace_s=5)


def launch(folder: Path, command: list[str]) -> processes.Identity:
    return processes.start(command, record=folder / "pid", output=folder / "out", cwd=folder, environment={"PATH": os.environ["PATH"]})


def test_the_record_is_there_before_the_program(tmp_path: Path) -> None:
    identity = launch(tmp_path, ["cat", str(tmp_path / "pid")])
    deadline = time.monotonic() + 10
    while identity.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "out").read_text().split()[0] == str(identity.pid)


def test_started_processes_are_found_again(sleeper: processes.Identity, tmp_path: Path) -> None:
    assert processes.read(tmp_path / "pid") == sleeper == processes.identity_of(sleeper.pid)
    assert sleeper.alive()
    assert os.getsid(sleeper.pid) != os.getsid(0)


def test_stopping_waits_until_it_is_gone(sleeper: processes.Identity) -> None:
    processes.stop(sleeper)
    assert not sleeper.alive()
    processes.stop(sleeper)


def test_a_recycled_number_is_left_alone(sleeper: processes.Identity) -> None:
    earlier = dataclasses.replace(sleeper, start_ticks=sleeper.start_ticks - 1)
    other_boot = dataclasses.replace(sleeper, boot_id="another")
    for identity in (earlier, other_boot):
        assert not identity.alive()
        processes.stop(identity)
    assert sleeper.alive()


def test_what_ignores_term_is_killed(tmp_path: Path) -> None:
    identity = launch(tmp_path, ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"])
    deadline = time.monotonic() + 10
    while not (tmp_path / "out").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes.stop(identity, grace_s=0.2)
    assert not identity.alive()


def test_a_stopped_process_still_ends_by_term(sleeper: processes.Identity) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    began = time.monotonic()
    processes.stop(sleeper, grace_s=30)
    assert time.monotonic() - began < 20


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    identity = processes.identity_of(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identity is not None
    assert not identity.alive()
    child.wait()


@pytest.mark.parametrize("text", ["", "nonsense", f"{STAT}\n", f"{STAT}\nboot\nmore"])
def test_damaged_records_count_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(text)
    assert processes.read(tmp_path / "pid") is None
    assert processes.read(tmp_path / "absent") is None
