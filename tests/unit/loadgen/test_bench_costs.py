from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from agent.api.records import StartRecord
from loadgen.bench.costs import costs
from loadgen.bench.figures import Measured
from loadgen.errors import LoadImpossible
from scaler.simulate import measured
from thaw.bench import bench

MS = 1_000_000
BEGAN_NS = 1_764_028_800_000_000_000  # 2025-11-25
RESULT = {
    "functions": {"index": {"standby_pss_mb": 4.2, "cold_pss_mb": 500.0, "running_pss_mb": 10.0}},
    "command": "thaw bench restore",
    "machine": {"processor": "P"},
}


def starts(*modes: str) -> list[Measured]:
    return [
        Measured(
            part="modes",
            asked=mode,
            kind=mode,
            record=StartRecord(command_id="c", function="index", started_ns=BEGAN_NS, ended_ns=BEGAN_NS + (place + 1) * number * MS),
        )
        for place, mode in enumerate(modes)
        for number in range(1, 6)
    ]


def test_a_bench_gives_what_the_simulator_reads(tmp_path: Path) -> None:
    (tmp_path / "restore.json").write_text(json.dumps(RESULT))
    lines = [msgspec.json.encode(item) for item in starts("thaw", "restore", "remote", "cold")]
    (tmp_path / "starts.jsonl").write_bytes(b"\n".join(lines))
    done = CliRunner().invoke(bench, ["costs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    value = json.loads(done.output)
    assert (value["date"], value["function"], value["machine"], value["starts"]["thaw"]) == ("2025-11-25", "index", {"processor": "P"}, 5)
    assert value["starts_ms"]["restore"][::5] == [2.0, 4.0, 6.0, 8.0, 10.0]
    (tmp_path / "costs.json").write_text(done.output)
    world = measured.world(tmp_path / "costs.json", seed=1)
    assert (world.thaw_s, world.cold_s, world.standby_mb, world.running_share) == pytest.approx((0.003, 0.012, 4.2, 0.02))


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(LoadImpossible, match="no function web; it has index"):
        costs(RESULT, starts("thaw"), "web")
    with pytest.raises(LoadImpossible, match="no remote, no cold of index"):
        costs(RESULT, starts("thaw", "restore"), "index")
