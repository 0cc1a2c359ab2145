"""What dies is started again; nothing outlives the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
from infra.local.supervise import Supervisor
commands = {"one": ["sleep", "600"], "two": ["sh", "-c", "sleep 601 & exec sleep 602"]}
Supervisor(commands, Path(sys.argv[1]), lambda line: print(line, flush=True)).run()
"""


@contextmanager
def supervisor(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def pid_in(line: str) -> int:
    return int(line.rpartition("(pid ")[2].rstrip(")\n"))


def until(reached: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_starts_again_reaps_orphans_and_stops_everything(tmp_path: Path) -> None:
    with supervisor(tmp_path) as process:
        assert process.stdout is not None
        first, second = pid_in(process.stdout.readline()), pid_in(process.stdout.readline())
        os.kill(first, signal.SIGKILL)
        assert "one: ended with signal 9" in process.stdout.readline()
        again = process.stdout.readline()
        assert again.startswith("one: started") and pid_in(again) != first
        children = f"/proc/{second}/task/{second}/children"
        until(lambda: bool(Path(children).read_text().split()))
        orphan = int(Path(children).read_text().split()[0])
        os.kill(second, signal.SIGKILL)
        until(lambda: not exists(second))
        os.kill(orphan, signal.SIGKILL)
        until(lambda: not exists(orphan))  # no zombie: the supervisor adopted and reaped it
    assert process.returncode == 0
    assert not exists(pid_in(again))
