"""The node's bookkeeping: what it was asked once it does once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.api.function import Function, FunctionSpec, Metadata
from agent.api.messages import CommandFailed, Message, Prepare, PrepareDone, Start, StartDone
from agent.epochs import Epochs
from agent.instance import Instance
from agent.node import Node
from infra.tasks import TaskGroup

FUNCTION = Function(metadata=Metadata(name="f"), spec=FunctionSpec(command=["serve"], port=8080))


class _Standbys:
    def add(self, instance: Instance) -> None:
        """Held."""

    async def make(self, *_: Any) -> Any:
        await asyncio.sleep(3600)


class _Starter:
    """Counts starts; none of them ends."""

    started = 0

    async def start(self, *_: Any) -> Any:
        self.started += 1
        await asyncio.sleep(3600)


def adopted(**fields: Any) -> Instance:
    sandbox: Any = SimpleNamespace(address="198.18.0.2")
    return Instance("f-1", FUNCTION, sandbox, Path("log"), command_id="c-1", **fields)


@pytest.mark.parametrize(
    ("instance", "command", "answer"),
    [
        ({"started_ns": 5}, Start, StartDone),
        ({"made_ns": 5}, Prepare, PrepareDone),
    ],
)
async def test_a_command_that_the_agent_before_has_carried_out_is_answered_and_not_done_again(
    tmp_path: Path, instance: dict[str, int], command: Any, answer: type
) -> None:
    tasks, starter, reports = TaskGroup("test"), _Starter(), list[Message]()
    workshop: Any = SimpleNamespace(tasks=tasks)
    nothing: Any = None
    node = Node("n", workshop, nothing, starter, _Standbys(), nothing, nothing, Epochs(tmp_path / "e"), reports.append)  # type: ignore[arg-type]
    node.adopt([adopted(**instance)])
    node.handle(command(id="c-1", deadline_ns=1 << 62, function=FUNCTION))
    await asyncio.sleep(0)
    assert [type(report) for report in reports] == [answer]
    assert starter.started == 0
    node.handle(Start(id="c-2", deadline_ns=1 << 62, function=FUNCTION))
    await asyncio.sleep(0.01)
    assert starter.started == 1
    await tasks.close()


async def test_a_prepare_that_waits_for_its_turn_ends_at_its_deadline(tmp_path: Path) -> None:
    tasks, reports = TaskGroup("test"), list[Message]()
    workshop: Any = SimpleNamespace(tasks=tasks, pool=SimpleNamespace(check_room=lambda *_: None))
    nothing: Any = None
    node = Node("n", workshop, nothing, nothing, _Standbys(), nothing, nothing, Epochs(tmp_path / "e"), reports.append)  # type: ignore[arg-type]
    node.handle(Prepare(id="c-1", deadline_ns=time.time_ns() + 50_000_000, function=FUNCTION))
    await asyncio.sleep(0.2)
    assert [type(report) for report in reports] == [CommandFailed]
    await tasks.close()
