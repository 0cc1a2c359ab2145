from __future__ import annotations

import json

from click.testing import CliRunner

from thaw.bench import planner


def test_a_small_run_gives_every_figure() -> None:
    small = [
        "--functions",
        "50",
        "--events",
        "400",
        "--warm-events",
        "400",
        "--cold-events",
        "200",
        "--paced-events",
        "200",
        "--memory-functions",
        "200",
        "--json",
    ]
    result = CliRunner().invoke(planner, small)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["functions"] == 50 and figures["memory_functions"] == 200
    assert figures["events_per_s"] > 0 and figures["cold_events_per_s"] > 0 and figures["bytes_per_function"] > 0
    assert 0 < figures["handle_p50_ms"] <= figures["handle_p99_ms"] <= figures["handle_max_ms"]
    assert list(figures["packed_bytes_by_requests"]) == ["8", "48", "958"]
