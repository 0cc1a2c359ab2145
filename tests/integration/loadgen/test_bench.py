"""The bench measures what it says, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.stack]


def test_every_mode_is_what_it_claims(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thaw", "--state-dir", str(tmp_path / "state"), "bench", "restore"]
    options = ["--sample", "echo", "-n", "3", "--cold", "2", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "restore.json").read_text())
    echo = result["functions"]["echo"]
    assert {mode: echo[mode]["n"] for mode in ("cold", "restore", "remote")} == {"cold": 2, "restore": 3, "remote": 3}
    assert echo["remote_bytes_before_response"] > 0 and result["wrong"] == 0
    for mode in ("cold", "restore", "remote"):
        assert 0 < echo[mode]["p50_ms"] <= echo[mode]["p99_ms"] <= echo[mode]["max_ms"]
    assert not (tmp_path / "state" / "bench").exists()
