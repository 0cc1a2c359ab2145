"""The scaler on a real broker, with an agent that does what it is told: from demand to command, through every kind of death."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import time

import pytest
from click.testing import CliRunner
from scaler_world import scripted_agent

from agent.api.messages import Evict, Fetch, MakeCheckpoint, Prepare, Release, Start
from infra.telemetry import trace_id
from scaler.demand import FORECASTS_TOPIC
from thaw import explain
from thaw.functions import get_functions, write_functions

pytestmark = pytest.mark.stack
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_demand_starts_instances_and_silence_releases_them(world, producer):
    name = await world.apply(idle_s=0.2)
    await world.scaler()
    await world.send(producer, name, 3)
    await world.agent.until(lambda: world.agent.running(name) == 3)
    await world.send(producer, name, 0)
    await world.agent.until(lambda: world.agent.running(name) == 0)
    assert len(world.agent.of(Start)) == 3
    assert len(world.agent.of(Release)) == 3


async def test_a_start_leaves_a_complete_record_and_one_trace(world, producer):
    name = await world.apply()
    await world.scaler()
    await world.send(producer, name, 1, traceparent=PARENT)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    (record,) = await world.start_records(name, 1)
    (command,) = world.agent.of(Start)
    assert trace_id(command.traceparent) == trace_id(PARENT)
    assert record["traceparent"] == command.traceparent
    assert record["command_id"] == command.id
    assert record["demand"]["topic"] == "thaw.demand"
    assert record["total_ns"] == record["ended_ns"] - record["started_ns"] > 0
    assert record["unaccounted_ns"] == 0
    phases = [phase["name"] for phase in record["phases"]]
    assert phases[-5:] == ["receive", "decide", "dispatch", "agent.queue", "ready"] or "wait" in phases
    await stop(world)
    spans = [json.loads(line) for line in (world.settings.paths.state_dir / "traces" / "scaler.jsonl").read_text().splitlines()]
    (root,) = [span for span in spans if span["name"] == "start"]
    assert root["trace_id"] == trace_id(PARENT)
    assert root["parent_id"] == PARENT.split("-")[2]
    assert root["attributes"]["criu.restore_time"] == 7
    assert root["attributes"]["bytes.memory"] == 5
    children = [span["name"] for span in spans if span["parent_id"] == root["span_id"]]
    assert children == phases


async def test_the_first_cold_start_makes_a_checkpoint_that_the_next_start_uses(world, producer):
    name = await world.apply(idle_s=0.0)
    await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: name in world.agent.checkpoints)
    await world.send(producer, name, 2)
    records = await world.start_records(name, 2)
    assert [record["start_mode"] for record in records] == ["cold", "restore"]
    state = await world.state(name, lambda state: state.checkpoint and len(state.instances) == 2)
    assert state.rung == "running"
    assert state.last_start_mode == "restore"
    assert state.last_start_ms > 0
    assert len(world.agent.of(MakeCheckpoint)) == 1


async def test_standbys_are_made_used_replaced_and_released(world, producer):
    name = await world.apply(standby=2, idle_s=0.0)
    await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.waiting(name) == 2)
    await world.send(producer, name, 2)
    await world.agent.until(lambda: world.agent.running(name) == 2 and len(world.agent.of(Prepare)) == 3)
    records = await world.start_records(name, 2)
    assert [record["start_mode"] for record in records] == ["cold", "thaw"]
    await world.send(producer, name, 0)
    state = await world.state(name, lambda state: not state.instances and state.standbys == 2)
    assert (state.rung, state.standbys_wanted, state.standbys_mb, state.last_start_mode) == ("standby", 2, 8.2, "thaw")
    await write_functions(world.settings.kafka, {name: None})
    await world.agent.until(lambda: world.agent.waiting(name) == 0 and bool(world.agent.of(Evict)))
    assert isinstance(world.agent.commands[-1][1], Evict), "the image goes last"


async def test_a_scaler_that_was_killed_counts_the_standbys_that_are_there(world, producer):
    name = await world.apply(standby=3)
    first = await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.waiting(name) == 3)
    first.send_signal(signal.SIGKILL)
    await first.wait()
    await world.scaler()
    await world.send(producer, name, 2)
    await world.agent.until(lambda: world.agent.running(name) == 2 and world.agent.waiting(name) == 3)
    assert len(world.agent.of(Prepare)) == 4


async def test_a_deleted_function_is_released_and_evicted(world, producer):
    name = await world.apply()
    await world.scaler()
    await world.send(producer, name, 2)
    await world.agent.until(lambda: world.agent.running(name) == 2 and name in world.agent.checkpoints)
    await write_functions(world.settings.kafka, {name: None})
    await world.agent.until(lambda: world.agent.running(name) == 0 and bool(world.agent.of(Evict)))


async def test_demand_of_an_unknown_function_is_acted_on_once_it_is_applied(world, producer):
    known = await world.apply()
    await world.scaler()
    later = f"{known}-later"
    world.names.append(later)
    await world.send(producer, later, 2)
    await world.send(producer, known, 1)
    await world.agent.until(lambda: world.agent.running(known) == 1)
    assert world.agent.running(later) == 0
    await world.apply_as(later)
    await world.agent.until(lambda: world.agent.running(later) == 2)
    for record in await world.start_records(later, 2):
        assert record["demand"] is not None


async def test_refused_and_failed_starts_are_made_good(world, producer):
    outcomes = {1: "refused", 2: "criu", 3: 0.0}
    world.agent.starts = lambda command, number: outcomes.get(number, 0.0)
    name = await world.apply()
    await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    records = await world.start_records(name, 3)
    assert sorted(record["outcome"] for record in records) == ["criu", "ready", "refused"]
    assert len({record["started_ns"] for record in records}) == 1, "the delay counts from the demand, also over retries"
    assert all(record["unaccounted_ns"] == 0 for record in records)


async def test_a_scaler_that_was_killed_rebuilds_levels_and_instances_from_the_log(world, producer):
    name = await world.apply()
    first = await world.scaler()
    await world.send(producer, name, 1, source="quiet")
    await world.send(producer, name, 1, source="busy")
    await world.agent.until(lambda: world.agent.running(name) == 2)
    first.send_signal(signal.SIGKILL)
    await first.wait()
    # Nobody reads now. An older level must not be acted on, the newest must, and the quiet source still counts.
    await world.send(producer, name, 7, source="busy")
    await world.send(producer, name, 3, source="busy")
    await world.scaler()
    await world.agent.until(lambda: world.agent.running(name) == 4)
    await world.state(name, lambda state: state.level == 4 and state.sources == 2)
    assert len(world.agent.of(Start)) == 4


async def test_a_source_that_spoke_long_before_the_replay_window_still_counts(world, producer):
    """The committed offset is that of the oldest record that counts, not of the newest that was read."""
    name = await world.apply()
    other = await world.apply()
    world.settings = replace_scaler(world.settings, source_ttl_s=0.2)  # the window by time is 0.4 s
    first = await world.scaler()
    await world.send(producer, name, 2, source="quiet", ttl=600.0)
    await world.agent.until(lambda: world.agent.running(name) == 2)
    for _ in range(25):
        await world.send(producer, name, 0, source="busy")
        await world.send(producer, other, 0)
        await asyncio.sleep(0.1)  # let commits happen
    first.send_signal(signal.SIGKILL)
    await first.wait()
    await world.scaler()
    await world.state(name, lambda state: state.level == 2)
    assert world.agent.running(name) == 2


async def test_after_a_kill_the_shards_are_free_at_once_on_the_same_machine(world, producer):
    """The session timeout is far beyond the test's own: only a leave in the name of the dead member can free the shards."""
    world.settings = replace_kafka(world.settings, session_timeout_ms=120_000)
    name = await world.apply()
    first = await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    first.send_signal(signal.SIGKILL)
    await first.wait()
    await world.scaler()
    await world.send(producer, name, 2)
    await world.agent.until(lambda: world.agent.running(name) == 2, timeout_s=60)


async def test_two_scalers_share_the_shards_and_one_takes_over_from_the_other(world, producer):
    names = [await world.apply() for _ in range(8)]
    await world.scaler()
    await world.send(producer, names[0], 1)
    await world.agent.until(lambda: world.agent.running(names[0]) == 1)
    second = await world.scaler()
    await asyncio.to_thread(wait_for_text, world, 1, "this scaler owns shard")
    for name in names:
        await world.send(producer, name, 1)
    await world.agent.until(lambda: all(world.agent.running(name) == 1 for name in names))
    epochs = {command.shard: command.epoch for command in world.agent.of(Start)}
    second.send_signal(signal.SIGTERM)
    assert await second.wait() == 0
    for name in names:
        await world.send(producer, name, 2)
    await world.agent.until(lambda: all(world.agent.running(name) == 2 for name in names))
    newest = {command.shard: command.epoch for command in world.agent.of(Start)}
    # What the other had has a new owner with a newer epoch; the rest may not have been given a new one yet.
    assert all(newest[shard] >= epoch for shard, epoch in epochs.items())
    assert any(newest[shard] > epoch for shard, epoch in epochs.items())
    assert len(world.agent.of(Start)) == 16


async def test_sigterm_ends_with_code_0_and_leaves_the_group(world, producer):
    world.settings = replace_kafka(world.settings, session_timeout_ms=120_000)
    name = await world.apply()
    first = await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    first.send_signal(signal.SIGTERM)
    assert await first.wait() == 0
    assert not list((world.settings.paths.state_dir / "scaler").glob("*"))
    await world.scaler()
    await world.send(producer, name, 2)
    await world.agent.until(lambda: world.agent.running(name) == 2)


async def test_an_agent_that_restarts_elsewhere_gets_the_unanswered_command_again(world, producer):
    world.settings = replace_scaler(world.settings, agents="", node_grace_s=30.0)
    tell_agent_file(world)
    name = await world.apply()
    world.agent.starts = lambda command, number: 3600.0
    await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: len(world.agent.of(Start)) == 1)
    (command,) = world.agent.of(Start)
    await world.agent.close()
    # The new agent knows nothing of the command, and listens on another port.
    world.agent._answers.clear()
    world.agent.starts = lambda command, number: 0.0
    world.agent.port = 0
    await world.agent.start()
    tell_agent_file(world)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    assert [item.id for item in world.agent.of(Start)] == [command.id] * 2


async def test_what_a_lost_node_ran_is_started_on_another(world, producer):
    second = scripted_agent(world.settings, world.folder, "second")
    await second.start()
    try:
        world.settings = replace_scaler(world.settings, agents=f"{world.settings.scaler.agents},127.0.0.1:{second.port}", node_grace_s=0.3)
        name = await world.apply(maximum=4)
        await world.scaler()
        await world.send(producer, name, 4)
        await world.agent.until(lambda: world.agent.running(name) + second.running(name) == 4)
        assert world.agent.running(name) == second.running(name) == 2
        await world.agent.stop()
        await second.until(lambda: second.running(name) == 4)
    finally:
        await second.close()


async def test_every_node_is_asked_to_fetch(world, producer):
    await world.scaler()
    name = await world.apply()
    await world.agent.until(lambda: any(command.function.name == name for command in world.agent.of(Fetch)))


async def test_every_change_of_level_reaches_the_agent(world, producer, capsys):
    """Reports the delay from demand to command; asserts only that nothing is lost and every phase is accounted for."""
    name = await world.apply(maximum=200)
    await world.scaler()
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    for level in range(2, 101):
        await world.send(producer, name, level)
        await asyncio.sleep(0.02)
    await world.agent.until(lambda: world.agent.running(name) == 100)
    records = await world.start_records(name, 100)
    assert all(record["unaccounted_ns"] == 0 for record in records)
    delays = {
        phase: sorted((item["end_ns"] - item["start_ns"]) / 1e6 for record in records for item in record["phases"] if item["name"] == phase)
        for phase in ("receive", "decide", "dispatch")
    }
    with capsys.disabled():
        print("", *(f"{phase} p50 {values[len(values) // 2]:.2f} ms" for phase, values in delays.items()))


async def stop(world) -> None:
    for process in world.scalers:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0, world.log()


def replace_scaler(settings, **fields):
    return dataclasses.replace(settings, scaler=dataclasses.replace(settings.scaler, **fields))


def replace_kafka(settings, **fields):
    return dataclasses.replace(settings, kafka=dataclasses.replace(settings.kafka, **fields))


def tell_agent_file(world) -> None:
    world.settings.agent_file.parent.mkdir(parents=True, exist_ok=True)
    world.settings.agent_file.write_text(json.dumps({"host": "127.0.0.1", "port": world.agent.port}))


def wait_for_text(world, index: int, text: str) -> None:
    for _ in range(300):
        path = world.folder / f"scaler-{index}.log"
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in the log of scaler {index}")


async def test_a_function_without_idle_seconds_is_held_as_its_forecast_says_and_explained(world, producer):
    name = await world.apply(idle_s=None)
    await world.scaler()
    for _ in range(2):
        await world.send(producer, name, 1)
        await world.agent.until(lambda: world.agent.running(name) >= 1)
        await world.send(producer, name, 0)
    state = await world.state(name, lambda state: state.explanation is not None and state.explanation.slots and not state.level)
    # Nobody asks for it, and its forecast keeps it.
    assert (state.demanded, state.wanted) == (0, 1)
    assert state.explanation.slots[0].rung == "running"
    assert state.explanation.expected_ns > 0
    assert world.agent.of(Release) == []
    said = await asyncio.to_thread(CliRunner().invoke, explain.command, [name], obj=world.settings)
    assert said.exit_code == 0, said.output
    for words in ("Demand asks for 0 instances", "the forecast holds 1 more", "standby", "Slot 0, idle for", "Next request: expected"):
        assert words in said.output
    table = await asyncio.to_thread(CliRunner().invoke, get_functions, [name], obj=world.settings)
    assert "NEXT" in table.output and (" in " in table.output or "any moment" in table.output)
    missing = await asyncio.to_thread(CliRunner().invoke, explain.command, ["nobody"], obj=world.settings)
    assert missing.exit_code == 1 and "there is no function nobody" in missing.output


async def test_what_was_learned_outlives_the_scaler(world, producer):
    name = await world.apply(idle_s=None)
    first = await world.scaler()
    for _ in range(3):
        await world.send(producer, name, 1)
        await world.agent.until(lambda: world.agent.running(name) >= 1)
        await world.send(producer, name, 0)
    await world.state(name, lambda state: state.explanation is not None and state.explanation.slots and not state.level)
    first.send_signal(signal.SIGTERM)
    assert await first.wait() == 0
    assert len(await world.table(FORECASTS_TOPIC, name)) >= 1
    await world.scaler()

    async def said() -> str:
        return world.log()

    await world.eventually(said, lambda log: "forecasts read: " in log and "forecasts read: 0" not in log)
    await world.state(name, lambda state: state.explanation is not None and state.explanation.slots)
