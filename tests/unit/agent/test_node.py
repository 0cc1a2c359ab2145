"""The node's bookkeeping: what it was asked once it does once."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.api.function import Function, FunctionSpec, Metadata
from agent.api.messages import (
    CommandFailed,
    CommandTaken,
    Evict,
    Fetch,
    MakeCheckpoint,
    Message,
    Prepare,
    PrepareDone,
    Release,
    Start,
    StartDone,
)
from agent.epochs import Epochs
from agent.errors import Refused
from agent.instance import Instance
from agent.lease import Scalers
from agent.node import Node
from infra.settings import AgentSettings
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


def _node(folder: Path, workshop: Any, reports: list[Message], *, catalog: Any = None, starter: Any = None, standbys: Any = None) -> Node:
    """A node that has only what a test asks of it."""
    nothing: Any = None
    epochs = Epochs(folder / "e")
    return Node("n", workshop, catalog, starter, standbys, nothing, nothing, epochs, Scalers(15.0), reports.append, asyncio.Event())


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
    workshop: Any = SimpleNamespace(settings=AgentSettings(), tasks=tasks)
    node = _node(tmp_path, workshop, reports, starter=starter, standbys=_Standbys())
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
    workshop: Any = SimpleNamespace(settings=AgentSettings(), tasks=tasks, pool=SimpleNamespace(check_room=lambda *_: None))
    node = _node(tmp_path, workshop, reports, standbys=_Standbys())
    node.handle(Prepare(id="c-1", deadline_ns=time.time_ns() + 50_000_000, function=FUNCTION))
    await asyncio.sleep(0.2)
    assert [type(report) for report in reports] == [CommandTaken, CommandFailed]
    assert node._underway == {}
    await tasks.close()


async def _for_ever(*_: Any, **__: Any) -> Any:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(
    "command",
    [
        functools.partial(Fetch, function=FUNCTION),
        functools.partial(MakeCheckpoint, function=FUNCTION),
        functools.partial(Evict, function_name="f"),
        functools.partial(Release, instance="f-1"),
    ],
    ids=lambda command: command.func.__name__,
)
async def test_a_command_of_which_a_stage_hangs_is_answered_at_its_deadline(tmp_path: Path, command: Any) -> None:
    tasks, reports = TaskGroup("test"), list[Message]()
    workshop: Any = SimpleNamespace(settings=AgentSettings(), tasks=tasks)
    hanging: Any = SimpleNamespace(resolve=_for_ever, evict=_for_ever)
    node = _node(tmp_path, workshop, reports, catalog=hanging)
    node._leaving["f-1"] = adopted()  # its end, which another release has asked for, hangs
    node.handle(command(id="c-1", deadline_ns=time.time_ns() + 50_000_000))
    await asyncio.sleep(0.2)
    answer = reports[-1]
    assert isinstance(answer, CommandFailed) and answer.reason == "not_ready" and "deadline" in answer.message
    assert node._underway == {} and node._checkpointing == set()
    await tasks.close()


async def test_what_is_being_made_is_told_to_every_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, reports, starter = TaskGroup("test"), list[Message](), _Starter()
    workshop: Any = SimpleNamespace(settings=AgentSettings(), tasks=tasks)
    catalog: Any = SimpleNamespace(images=list)
    node = _node(tmp_path, workshop, reports, catalog=catalog, starter=starter)
    monkeypatch.setattr(starter, "start", _for_ever)
    node.handle(Start(id="c-1", deadline_ns=7 << 60, function=FUNCTION))
    await asyncio.sleep(0)
    (taken,) = reports
    assert taken == CommandTaken(id="c-1", kind="start", function="f", function_digest=FUNCTION.digest, until_ns=7 << 60)
    assert node.inventory().underway == [taken]
    await tasks.close()
    assert node.inventory().underway == []


def test_a_node_that_no_scaler_reaches_begins_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, one, other = 100.0, object(), object()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    scalers: Any = Scalers(15.0)
    now_s += 10
    scalers.check()
    scalers.add(one)
    scalers.add(other)
    now_s += 100
    scalers.discard(one)
    scalers.discard(one)
    scalers.check()
    scalers.discard(other)
    now_s += 14
    scalers.check()
    now_s += 2
    with pytest.raises(Refused, match=r"no scaler has been heard for 16\.0 s, and agent\.lease_s is 15"):
        scalers.check()
    scalers.add(one)
    scalers.check()
