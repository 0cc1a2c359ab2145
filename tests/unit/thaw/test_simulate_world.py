from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from thaw.simulate import simulate


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [f"f,{at_s}.0,0.5" for at_s in range(10, 1000, 30)] + [f"g,{at_s}.5,2.0" for at_s in range(10, 1000, 70)]
    (tmp_path / "e.csv").write_text("\n".join(["func,time,duration", *rows]) + "\n")
    return tmp_path / "e.csv"


def figures(trace: Path, *options: str) -> Any:
    done = CliRunner().invoke(simulate, ["--trace", str(trace), "--policy", "thaw", "--no-timing", "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["policies"]["thaw"]


def test_nodes_have_the_planner_decide_for_all(trace: Path) -> None:
    nodes = ("--nodes", "2", "--node-memory-gb", "0.5")
    found = figures(trace, *nodes)
    assert sum(found["starts"].values()) == 48
    assert found["starts_by_node"].keys() == {"node-1", "node-2"} and "worse_share" in found
    assert found == figures(trace, *nodes)


def test_measured_costs_are_drawn(trace: Path, tmp_path: Path) -> None:
    reference, shipped = figures(trace), figures(trace, "--costs", "measured")
    assert reference["delay_max_ms"] == 40.0 != shipped["delay_max_ms"]
    assert shipped == figures(trace, "--costs", "measured") != figures(trace, "--costs", "measured", "--seed", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", "2"), "--nodes and --node-memory-gb go together"),
        (("--nodes", "2", "--node-memory-gb", "0.5", "--policy", "hybrid-60"), "no policy hybrid-60 with --nodes"),
        (("--costs", "missing.json"), "missing.json can't be read as costs"),
    ],
)
def test_what_does_not_go_together_is_said(trace: Path, options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(simulate, ["--trace", str(trace), *options])
    assert done.exit_code != 0 and message in done.output + str(done.exception)
