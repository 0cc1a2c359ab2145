"""The shipped scaler and agent under faults, deterministically: nothing is lost, nothing leaks, and each safeguard is needed."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from thaw.faults import campaign, plan, world
from thaw.faults.safeguards import SAFEGUARDS
from thaw.faults.shrink import shrink
from thaw.simulate_faults import command

SEEDS = 2000
#: Without a safeguard one of so many seeds fails.
SEEDS_WITHOUT = 1500


@pytest.mark.timeout(600)
def test_every_promise_is_kept() -> None:
    failed = [f"seed {result.seed}: {result.violation}" for result in campaign.many(1, SEEDS) if result.violation is not None]
    assert not failed, f"thaw simulate-faults --seeds 1 --seed N tells the story of one: {failed}"


@pytest.fixture(scope="module")
def without() -> dict[str, campaign.Result | None]:
    """Of each safeguard the first seed that fails without it."""
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = {name: pool.submit(campaign.first_failing, SEEDS_WITHOUT, name) for name in SAFEGUARDS}
        return {name: future.result() for name, future in found.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_a_safeguard_that_is_left_out_is_missed(safeguard: str, without: dict[str, campaign.Result | None]) -> None:
    assert without[safeguard] is not None


def test_a_failure_is_told_in_a_few_steps(without: dict[str, campaign.Result | None]) -> None:
    first = without["adoption"]
    assert first is not None and first.violation is not None
    whole = plan.make(first.seed)
    shortest, outcome = shrink(whole, "adoption")
    assert outcome.violation is not None and outcome.violation.kind == first.violation.kind
    assert len(shortest.steps) <= min(6, len(whole.steps) - 1)
    assert any("kill agent" in line for line in outcome.story)


def test_a_seed_is_the_same_in_every_process() -> None:
    told = []
    for hash_seed in ("1", "2"):
        program = "from thaw.faults import plan, world; print(world.run(plan.make(7), story=True))"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        told.append(subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True).stdout)
    assert told[0] == told[1] == f"{world.run(plan.make(7), story=True)}\n"


def test_the_command_tells_what_failed_and_how() -> None:
    done = CliRunner().invoke(command, ["--seeds", "60", "--without", "idempotence", "--processes", "1", "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["failed"][0]["kind"] == "2: one command, two instances"
    assert any("kill" in line or "reset" in line or "cut" in line for line in figures["story"])
    kept = CliRunner().invoke(command, ["--seeds", "2", "--processes", "1"])
    assert kept.exit_code == 0 and "2 runs" in kept.output and "0 failed" in kept.output
