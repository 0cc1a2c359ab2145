"""What one scaler has asked for and another one decides on next: it is known, counts, and is not asked for again."""

from __future__ import annotations

import pytest
from scaler_harness import NS, Harness, function, only, prepares, starts

from agent.api.messages import (
    CommandFailed,
    CommandTaken,
    Fetch,
    Inventory,
    MakeCheckpoint,
    PrepareDone,
    StandbyInfo,
    StartDone,
    StartFailed,
)
from agent.api.records import StartRecord
from scaler.events import NodeReport, ShardGained, ShardLost, ShardReady


@pytest.fixture
def harness() -> Harness:
    """A scaler that has no shard yet, and knows the function and the node."""
    harness = Harness(shards=())
    harness.node()
    harness.apply(function(standby=0))
    return harness


def gain(harness: Harness, epoch: int = 2, level: int = 0) -> list:
    """The shard is this scaler's from now on, and its demand is read again."""
    harness.do(ShardGained(shard=0, epoch=epoch))
    if level:
        harness.demand(level)
    return harness.do(ShardReady(shard=0))


def taken(harness: Harness, command: str = "start", number: int = 1, document=None) -> CommandTaken:
    document = document or function()
    return CommandTaken(id=f"other-{number}", kind=command, function="f", function_digest=document.digest, until_ns=harness.now + 60 * NS)


def tell(harness: Harness, report) -> list:
    return harness.do(NodeReport(node="n1", report=report))


def reconnect(harness: Harness, *underway: CommandTaken) -> list:
    inventory = Inventory(node="n1", memory_mb=16000, memory_free_mb=8000, underway=list(underway))
    return harness.do(NodeReport(node="n1", report=inventory, connected=True))


def done(harness: Harness, command_id: str) -> list:
    info = harness.info(f"i-{command_id}", function(), command_id=command_id)
    record = StartRecord(command_id=command_id, function="f", start_mode="restore", ended_ns=harness.now)
    return tell(harness, StartDone(command_id=command_id, instance=info, record=record))


def test_a_start_that_another_scaler_has_asked_for_is_not_asked_for_again(harness):
    tell(harness, taken(harness))
    assert len(starts(gain(harness, level=2))) == 1, "the other one of two"
    assert starts(done(harness, "other-1")) == []
    state = harness.planner.explain("f")
    assert (len(state.instances), state.starting) == (1, 1)


def test_what_is_being_made_is_known_from_the_inventory_too(harness):
    reconnect(harness, taken(harness, number=1), taken(harness, number=2))
    assert starts(gain(harness, level=2)) == []


def test_a_start_of_another_scaler_that_fails_is_made_good(harness):
    tell(harness, taken(harness))
    gain(harness, level=1)
    tell(harness, StartFailed(command_id="other-1", function="f", reason="criu", message="no"))
    assert len(starts(harness.pass_s(1))) == 1


def test_a_start_of_another_scaler_that_is_never_answered_is_made_good(harness):
    tell(harness, taken(harness))
    assert starts(gain(harness, level=1)) == []
    assert starts(harness.pass_s(61)) == []
    assert len(starts(harness.pass_s(5))) == 1


def test_what_an_agent_that_was_started_again_no_longer_does_is_made_good_at_once(harness):
    tell(harness, taken(harness))
    gain(harness, level=1)
    assert len(starts(reconnect(harness))) == 1


def test_an_answer_that_was_missed_is_found_in_the_inventory(harness):
    tell(harness, taken(harness))
    gain(harness, level=1)
    commands = harness.node(instances=[harness.info("i1", function(), command_id="other-1")])
    assert starts(commands) == []
    assert len(harness.planner.explain("f").instances) == 1
    assert "other-1" not in harness.planner._world.pending


def test_a_shard_that_comes_back_finds_its_own_starts(harness):
    (start,) = starts(gain(harness, level=1))
    harness.do(ShardLost(shard=0))
    assert starts(gain(harness, epoch=4, level=1)) == []
    harness.done(start)
    assert len(harness.planner.explain("f").instances) == 1


def test_who_has_lost_the_shard_does_nothing_about_a_start_that_fails(harness):
    (start,) = starts(gain(harness, level=1))
    harness.do(ShardLost(shard=0))
    harness.failed(start)
    assert harness.pass_s(70) == []
    assert not harness.planner._world.pending


def test_a_node_that_is_lost_takes_the_starts_of_others_along(harness):
    harness.node("n2")
    tell(harness, taken(harness))
    gain(harness, level=1)
    (start,) = starts(harness.lost("n1"))
    assert start.node == "n2"


def test_one_checkpoint_is_made_at_a_time_whoever_asked_for_it(harness):
    tell(harness, taken(harness, "checkpoint"))
    fetches = only(Fetch, gain(harness, level=1))
    for fetch in fetches:
        harness.fetched(fetch)
    (start,) = [command for command in harness.commands if starts([command])]
    assert only(MakeCheckpoint, harness.done(start, mode="cold")) == []
    failed = CommandFailed(command_id="other-1", function="f", command="MakeCheckpoint", reason="host", message="no")
    tell(harness, failed)
    assert len(only(MakeCheckpoint, harness.pass_s(15))) == 1


def test_standbys_that_another_scaler_has_asked_for_count():
    harness = Harness(shards=())
    harness.node()
    document = function(standby=2)
    harness.apply(document)
    tell(harness, taken(harness, "prepare", document=document))
    for fetch in only(Fetch, gain(harness)):
        commands = harness.fetched(fetch, checkpoint="cp")
    (prepare,) = prepares(commands)
    info = StandbyInfo(
        standby="theirs",
        function="f",
        function_digest=document.digest,
        checkpoint="cp",
        pss_bytes=1,
        made_ns=harness.now,
        command_id="other-1",
    )
    assert tell(harness, PrepareDone(command_id="other-1", standby=info)) == []
    harness.prepared(prepare)
    assert harness.planner.explain("f").standbys == 2


def test_a_command_whose_time_is_over_is_not_taken_over(harness):
    late = taken(harness)
    harness.now += 63 * NS
    tell(harness, late)
    assert len(starts(gain(harness, level=1))) == 1
