"""The bench measures what it says, in small: the whole command on the smallest function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODES = ("thaw", "restore", "remote", "whole", "cold")


def bench(tmp_path: Path, *options: str, timeout_s: float = 250) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thaw", "--state-dir", str(tmp_path / "state"), "bench", "restore", *options]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.root
@pytest.mark.stack
def test_every_mode_is_what_it_claims(tmp_path: Path) -> None:
    options = ["--sample", "echo", "-n", "3", "--cold", "2", "--requests", "200", "--fanout", "1,5", "--density", "3", "--check", "--json"]
    done = bench(tmp_path, *options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result == json.loads((tmp_path / "out" / "restore.json").read_text())
    echo = result["functions"]["echo"]
    assert {mode: echo[mode]["n"] for mode in MODES} == {"thaw": 3, "restore": 3, "remote": 3, "whole": 3, "cold": 2}
    for mode in MODES:
        assert 0 < echo[mode]["p50_ms"] <= echo[mode]["p90_ms"] <= echo[mode]["p99_ms"] <= echo[mode]["max_ms"]
        assert echo["requests"][mode]["asked"] == 200
    assert echo["remote_bytes_before_response"] > 0
    assert echo["image_bytes"] > echo["working_set_bytes"] > 0
    assert 0 < echo["standby_pss_mb"] < echo["cold_pss_mb"]
    assert {mode: result["demand_to_response"][mode]["n"] for mode in ("thaw", "restore", "remote")} == {
        "thaw": 3,
        "restore": 3,
        "remote": 3,
    }
    for mode in ("thaw", "restore", "remote"):
        assert "demand" in result["demand_to_response"][mode]["phases_ms"]
    fan = result["fanout"]["5"]
    assert fan["starts"] == 5 * fan["repeats"]
    assert 0 < fan["first_ms"] <= fan["median_ms"] <= fan["last_ms"]
    assert result["density"]["standbys"] == 3
    assert (result["wrong"], result["failed"]) == (0, [])
    assert "targets" in done.stderr
    starts = [json.loads(line) for line in (tmp_path / "out" / "starts.jsonl").read_text().splitlines()]
    assert {item["part"] for item in starts} >= {"modes", "requests", "fanout-1", "fanout-5", "density", "demand"}
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert not (tmp_path / "state" / "bench").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fanout", "1,many"), "'1,many' is not a list of whole numbers above 0"),
        (("--fanout", "0"), "'0' is not a list"),
        (("--sample", "nobody"), "'nobody' is not one of"),
        (("--mode", "lukewarm"), "'lukewarm' is not one of"),
    ],
)
def test_a_call_that_cannot_work_says_so(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = bench(tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
