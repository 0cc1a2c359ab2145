"""Each kind of program under load after each kind of start: every answer is checked, byte by byte.

``THAW_TEST_REQUESTS=10000 pytest -s tests/integration/agent/test_programs.py`` asks more, and ``-s`` shows what each start took.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from agent.api.function import Function, from_builtins, read_yaml
from agent.api.messages import (
    CheckpointPublished,
    Evict,
    Evicted,
    InstanceExited,
    MakeCheckpoint,
    Prepare,
    PrepareDone,
    Release,
    StartDone,
)
from infra.settings import Settings
from loadgen import functions_setup
from loadgen.checks import PROGRAMS, Target, Verdict, target_of
from tests.integration.agent import mutator
from tests.integration.agent.asking import Tally, ask_many
from tests.integration.agent.harness import AgentUnderTest, host_leftovers, running_agent

pytestmark = [pytest.mark.root, pytest.mark.stack]

REQUESTS = int(os.environ.get("THAW_TEST_REQUESTS", "400"))
#: Start modes in the order in which each program goes through them, with how many instances are started at once.
MODES = {"cold": 1, "restore": 2, "thaw": 2, "remote": 1}


def a_program(name: str, settings: Settings) -> tuple[Function, Target]:
    """A sample function, or the mutator."""
    if name != "mutator":
        (document,) = functions_setup.prepare(settings.paths.cache_dir, print, samples=[name])
        (function,) = read_yaml(document.read_text(), str(document), document.parent)
        return function, target_of(function)
    spec = {
        "command": ["/usr/bin/python3", "/srv/mutator.py"],
        "port": 8080,
        "files": [{"source": mutator.__file__, "target": "/srv/mutator.py"}],
        "readiness": {"path": "/do?row=0"},
        "warmUp": [{"path": f"/do?row={row}"} for row in range(len(mutator.OPERATIONS))],
        "limits": {"memoryMb": 768, "pids": 256},
    }
    return from_builtins({"metadata": {"name": name}, "spec": spec}), Target(name, 8, "/do?row={}".format, _inspect_mutator)


def _inspect_mutator(body: bytes, row: int) -> Verdict:
    answer = json.loads(body)
    token = answer.get("token", "")
    wrong = answer.get("row") != row or answer.get("value") != mutator.value(token, row)
    return Verdict(token, f"row {row} has another value" if wrong else "")


@pytest.mark.parametrize("name", [*PROGRAMS, "mutator"])
async def test_a_program_answers_right_after_each_kind_of_start(stack_settings: Settings, tmp_path: Path, name: str) -> None:
    function, target = a_program(name, stack_settings)
    async with running_agent(stack_settings, tmp_path / f"run-{name}") as agent:
        tokens: dict[str, set[str]] = {}
        for mode, count in MODES.items():
            await _make_possible(agent, function, mode, count)
            reports = await agent.start_at_once(function, count)
            assert [(report.record.start_mode, report.record.fallback_reason) for report in reports] == [(mode, "")] * count
            for number, report in enumerate(reports):
                tally = await ask_many(target, report.instance.address, REQUESTS, seed=len(tokens) * 10 + number)
                _show(name, report, tally)
                assert (tally.right, tally.wrong[:3], tally.failed[:3]) == (REQUESTS, [], [])
                tokens.setdefault(mode, set()).update(tally.tokens)
            for report in reports:
                gone = await agent.call(Release, instance=report.instance.instance)
                assert isinstance(gone, InstanceExited) and gone.reason == "released", gone
        donors = [found for mode, found in tokens.items() if mode != "cold"]
        assert all(len(found) == 1 and found == donors[0] for found in donors), "every restored instance is of the one donor"
        assert tokens["cold"] != donors[0] or name == "web", "the donor is another process; web draws no token"
        assert await agent.stop() == 0
    assert host_leftovers(agent) == []


async def _make_possible(agent: AgentUnderTest, function: Function, mode: str, count: int) -> None:
    """Bring the node to where a start is of this mode."""
    if mode == "restore":
        published = await agent.call(MakeCheckpoint, function=function, timeout_s=120)
        assert isinstance(published, CheckpointPublished), published
        print(f"{function.name}: image {published.checkpoint.image_bytes >> 10} KiB, checkpoint {published.seconds}", file=sys.stderr)
    elif mode == "thaw":
        for _ in range(count):
            prepared = await agent.call(Prepare, function=function)
            assert isinstance(prepared, PrepareDone), prepared
    elif mode == "remote":
        evicted = await agent.call(Evict, function_name=function.name)
        assert isinstance(evicted, Evicted), evicted


def _show(name: str, report: StartDone, tally: Tally) -> None:
    record = report.record
    phases = {phase.name: round((phase.end_ns - phase.start_ns) / 1e6, 1) for phase in record.phases}
    print(
        f"{name}: {record.start_mode} {record.total_ns / 1e6:.1f} ms, working set {record.pages_prefetched * 4} KiB, faulted "
        f"{record.pages_faulted * 4} KiB, s3 {record.bytes_by_tier.get('s3', 0) >> 10} KiB; {tally.right} right "
        f"({tally.on_kept} on kept connections), {len(tally.wrong)} wrong, {len(tally.failed)} failed; {phases}",
        file=sys.stderr,
    )
