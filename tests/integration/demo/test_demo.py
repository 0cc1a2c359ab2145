"""The demo's whole path, in small, while its parts are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.stack, pytest.mark.timeout(600)]


def run_demo(state: Path, out: Path, *options: str, during: object = None) -> tuple[dict[str, object], str, int]:
    command = [sys.executable, "-m", "thaw", "--state-dir", str(state), "demo", "--out", str(out), *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []

        def follow() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if during is not None:
                    during(line)  # type: ignore[operator]

        reader = threading.Thread(target=follow)
        reader.start()
        assert process.stdout is not None
        output = process.stdout.read()
        reader.join()
    lines = output.splitlines()
    assert lines, "".join(said)
    return json.loads(lines[-1]), "".join(said), process.returncode


def test_every_request_is_answered_while_scaler_and_agent_are_killed(tmp_path: Path) -> None:
    killed: list[str] = []

    def kill(name: str) -> None:
        log = (tmp_path / "state" / "demo" / "logs" / "installation.log").read_text()
        pid = int(re.findall(rf"{name}: started \(pid (\d+)\)", log)[-1])
        os.kill(pid, signal.SIGKILL)
        killed.append(name)

    def during(line: str) -> None:
        if "load with checkpoints:" in line:
            for delay_s, name in ((3.0, "scaler"), (8.0, "agent"), (14.0, "scaler")):
                threading.Timer(delay_s, kill, [name]).start()

    began = time.monotonic()
    result, said, code = run_demo(
        tmp_path / "state",
        tmp_path / "out",
        *("--sample", "index", "--sample", "echo", "--from", "600", "--to", "1000", "--seconds", "20"),
        during=during,
    )
    assert killed == ["scaler", "agent", "scaler"], said
    assert code == 0, said
    assert result["answered"] == result["requests"] and result["requests"] > 50
    assert result["wrong"] == 0 and result["leaked"] == 0, said
    assert result["starts"]["restore"] > 0  # type: ignore[index]
    assert 0 <= result["unaccounted_share"] <= 0.05  # type: ignore[operator]
    page = Path(str(result["report"])).read_text()
    assert "<svg" in page and not re.search(r'(src|href)="https?:', page)
    assert not (tmp_path / "state" / "demo").exists(), "the demo leaves nothing but its report"
    assert time.monotonic() - began < 300


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "thaw", "--state-dir", str(state), "demo", "--out", str(tmp_path / "out"), "--sample", "echo"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "load with checkpoints:" in line:
                process.send_signal(signal.SIGINT)
        process.wait(60)
        assert process.returncode != 0
    left = [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(state).encode() in _read(path) or str(state).encode() in _read(path.with_name("environ"))
    ]
    assert left == []
    assert not [name for name in os.listdir("/sys/class/net") if name.startswith("thawde")]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
