"""How modes are brought about: what the agent is asked, in which order, and what is counted. The agent is a script."""

import asyncio
import itertools

import msgspec
import pytest

from agent.api.function import from_builtins
from agent.api.messages import (
    CheckpointInfo,
    CheckpointPublished,
    CommandFailed,
    Evict,
    Evicted,
    InstanceExited,
    InstanceInfo,
    Inventory,
    MakeCheckpoint,
    Prepare,
    PrepareDone,
    Release,
    StandbyInfo,
    Start,
    StartDone,
    StartFailed,
)
from agent.api.records import StartRecord
from infra.settings import Settings
from loadgen.bench import asking, density, fanout, modes
from loadgen.bench.asking import Answers
from loadgen.bench.book import Book
from loadgen.bench.modes import Subject, measure, rounds, with_policy
from loadgen.errors import LoadImpossible

MS = 1_000_000
IMAGE_BYTES = 1_000_000


class ScriptedLink:
    """An agent that does what it is told: it thaws what it has on standby and restores otherwise."""

    def __init__(self):
        self.commands = []
        self.standbys = []
        self.cached = True
        self.crashes = []
        self.refuse_prepare_after = 1 << 30
        self.lose_standbys = self.fail_starts = False
        self.numbers = itertools.count(1)

    async def call(self, kind, *, deadline_s=0.0, **fields):
        return await self.send(kind, **fields)

    def send(self, kind, **fields):
        answer = asyncio.get_running_loop().create_future()
        command = kind(id=str(next(self.numbers)), deadline_ns=0, **fields)
        self.commands.append(command)
        answer.set_result(self.answer(command))
        return answer

    def answer(self, command):
        match command:
            case MakeCheckpoint():
                info = CheckpointInfo(function="f", function_digest="d", checkpoint="c", image_bytes=IMAGE_BYTES, complete=True)
                return CheckpointPublished(command_id=command.id, function="f", function_digest="d", checkpoint=info)
            case Prepare():
                return self.prepare(command)
            case Start():
                return self.start(command)
            case Evict():
                self.cached = False
                return Evicted(command_id=command.id, function="f")
            case Release():
                self.standbys = [name for name in self.standbys if name != command.instance]
                held = 9_000_000 if command.instance.startswith("i-") else 0
                return InstanceExited(instance=command.instance, function="f", reason="released", command_id=command.id, pss_bytes=held)

    def prepare(self, command):
        if len(self.standbys) >= self.refuse_prepare_after:
            return CommandFailed(command_id=command.id, function="f", command="Prepare", reason="refused", message="no room")
        name = f"f-{command.id}"
        if not self.lose_standbys:
            self.standbys.append(name)
        standby = StandbyInfo(
            standby=name, function="f", function_digest="d", checkpoint="c", pss_bytes=4_000_000, made_ns=0, command_id=command.id
        )
        return PrepareDone(command_id=command.id, standby=standby)

    def start(self, command):
        name, policy = command.function.name, command.function.spec.policy
        if self.fail_starts:
            return StartFailed(command_id=command.id, function=name, reason="no_room", message="the node is full")
        instance, prefetched, mode = f"i-{command.id}", 10, "restore"
        if policy.checkpoint == "off":
            mode, prefetched = "cold", 0
        elif self.standbys and name == "f":
            instance, mode = self.standbys.pop(), "thaw"
        elif not self.cached:
            mode, self.cached = "remote", True
        elif policy.memory == "whole":
            prefetched = IMAGE_BYTES // 4096
        record = StartRecord(command_id=command.id, function=name, start_mode=mode, ended_ns=5 * MS, pages_prefetched=prefetched)
        info = InstanceInfo(
            instance=instance, function=name, function_digest="d", address="h:1", start_mode=mode, started_ns=0, command_id=command.id
        )
        return StartDone(command_id=command.id, instance=info, record=record)


@pytest.fixture
def asked(monkeypatch):
    """Nothing is really waited for or asked over the network."""
    found = []

    async def ask(target, address, count, seed):
        found.append(count)
        return Answers(asked=count, seconds=1.0)

    async def inventory(settings):
        info = CheckpointInfo(function="f", function_digest="d", checkpoint="c", image_bytes=1, complete=True)
        return Inventory(node="n", memory_mb=1, memory_free_mb=1, checkpoints=[info])

    async def nothing(*_):
        return 0.0

    async def available():
        return 1000 - len(found)

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.setattr(modes, "inventory", inventory)
    monkeypatch.setattr(modes.host, "pss_bytes", lambda node, instance: 500_000_000)
    monkeypatch.setattr(modes.host, "background_ms_per_s", nothing)
    monkeypatch.setattr(modes.host, "settled_available_mb", available)
    for module in (modes, fanout, density):
        monkeypatch.setattr(module, "PAUSE_S", 0)
    monkeypatch.setattr(modes, "_STANDBY_REST_S", 0)
    return found


@pytest.fixture
def link():
    return ScriptedLink()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def subject(link, lines):
    function = from_builtins({"metadata": {"name": "f"}, "spec": {"command": ["/f"], "port": 1}})
    return Subject(Settings(), link, Book(lines.append), function)


def test_modes_turn_within_rounds_and_cold_starts_are_spread():
    plan = rounds(30, 10, ("thaw", "restore", "remote", "whole", "cold"))
    assert all(row[-1] == "remote" for row in plan)
    assert [sum(row.count(mode) for row in plan) for mode in ("thaw", "restore", "remote", "whole", "cold")] == [30, 30, 30, 30, 10]
    assert {row[0] for row in plan} == {"thaw", "restore", "whole"}
    assert all(1 <= sum(row.count("cold") for row in plan[at : at + 3]) <= 2 for at in range(0, 30, 3))
    assert rounds(1, 2, ("cold",)) == [["cold", "cold"]]
    assert rounds(2, 9, ("remote",)) == [["remote"], ["remote"]]


def test_the_policy_says_the_mode(subject):
    assert [with_policy(subject.function, mode).spec.policy.memory for mode in ("restore", "thaw", "remote", "whole")] == [
        "lazy",
        "lazy",
        "lazy",
        "whole",
    ]
    assert with_policy(subject.function, "cold").spec.policy.checkpoint == "off"
    assert with_policy(subject.function, "cold").digest == subject.function.digest


async def test_every_mode_is_measured_and_counted(subject, link, asked):
    found = await measure(subject, 4, 2, 100)
    assert {mode: found[mode]["n"] for mode in ("thaw", "restore", "remote", "whole", "cold")} == {
        "thaw": 4,
        "restore": 4,
        "remote": 4,
        "whole": 4,
        "cold": 2,
    }
    assert (found["standby_pss_mb"], found["cold_pss_mb"], found["image_bytes"]) == (4.0, 500.0, IMAGE_BYTES)
    assert found["running_pss_mb"] == 9.0
    assert found["working_set_bytes"] == 40960
    assert found["other"] == {}
    assert found["requests"]["thaw"] == {"asked": 100, "wrong": 0, "failed": 0, "per_second": 100, "problems": []}
    assert asked.count(100) == 5
    starts = sum(isinstance(command, Start) for command in link.commands)
    assert sum(isinstance(command, Release) for command in link.commands) == starts


async def test_a_standby_that_was_lost_is_not_a_thaw_and_is_released(subject, link, lines, asked):
    link.lose_standbys = True
    found = await measure(subject, 2, 0, 0, ("thaw",))
    assert found["thaw"]["n"] == 0
    assert found["other"] == {"thaw": {"restore": 2}}
    released = {command.instance for command in link.commands if isinstance(command, Release)}
    assert all(f"f-{command.id}" in released for command in link.commands if isinstance(command, Prepare))
    assert any("was to be thaw was restore" in line for line in lines)


async def test_an_agent_that_makes_no_standby_is_said(subject, link, asked):
    link.refuse_prepare_after = 0
    with pytest.raises(LoadImpossible, match="no standby of f: no room"):
        await measure(subject, 1, 0, 0)


async def test_a_failed_start_is_not_counted_and_the_bench_goes_on(subject, link, lines, asked):
    link.fail_starts = True
    found = await measure(subject, 2, 0, 0, ("restore",))
    assert found["restore"]["n"] == 0
    assert found["other"] == {"restore": {"failed: no_room": 2}}
    assert any("the node is full" in line for line in lines)


async def test_fanout_sends_all_at_once_and_ends_each(subject, link, asked):
    await subject.checkpoint()
    found = await fanout.measure(subject, [5])
    assert found["5"]["starts"] == 50
    assert found["5"]["repeats"] == 10
    starts = [place for place, command in enumerate(link.commands) if isinstance(command, Start)]
    assert any(starts[at : at + 5] == list(range(starts[at], starts[at] + 5)) for at in range(len(starts) - 4))
    assert sum(isinstance(command, Release) for command in link.commands) == len(starts)


async def test_density_counts_what_is_held_and_keeps_it_held(subject, link, asked):
    found = await density.measure(subject, 10)
    assert (found["standbys"], found["pss_mb"], found["refused"]) == (10, 4.0, [])
    assert found["with_standbys"]["thaw"]["n"] == density._STARTS
    assert found["with_standbys"]["restore"]["n"] == density._STARTS + 1
    assert found["other"] == {}
    assert link.standbys == []
    checkpoints = [command.function.name for command in link.commands if isinstance(command, MakeCheckpoint)]
    assert checkpoints == ["f-twin"]


async def test_density_ends_where_the_node_refuses(subject, link, asked):
    link.refuse_prepare_after = 6
    found = await density.measure(subject, 10)
    assert found["standbys"] == 6
    assert found["refused"] == ["no standby of f: no room"]
    assert link.standbys == []


def test_wrong_missing_and_crashed_are_all_wrong(subject, lines):
    subject.book.answers("f", Answers(asked=5, wrong=1, failed=2, problems=["its value is 7"]))
    subject.book.crashed(["f: i-1 ended by itself: killed, code -11"])
    assert subject.book.wrong == 4
    assert any("its value is 7" in line for line in lines)
    assert any("code -11" in line for line in lines)


def test_records_of_a_part_are_found_by_part_and_function(subject):
    record = StartRecord(command_id="1", function="f", start_mode="restore")
    subject.book.start("modes", "restore", record)
    subject.book.start("density", "restore", record)
    subject.book.start("modes", "restore", msgspec.structs.replace(record, function="g"))
    assert len(subject.book.of("modes", "f")) == 1
