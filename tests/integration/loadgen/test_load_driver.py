"""The driver against real connections: every request is answered or accounted for, whatever its instance does."""

import asyncio
import dataclasses
import itertools
import json
import logging
import time

import pytest

from infra.settings import PathSettings, ScalerSettings, Settings, TlsSettings
from loadgen import driver, endpoints, watch
from loadgen.arrivals import Arrival, bursts, uniform
from loadgen.checks import sample_targets
from loadgen.driver import LoadOptions
from loadgen.errors import LoadImpossible, TargetUnknown
from loadgen.result import read_requests

QUICK = LoadOptions(deadline_s=10, attempt_timeout_s=2, connect_timeout_s=3, lead_s=0.05, drain_s=2)
ONE = [Arrival(0.0, "echo", 7)]


@pytest.fixture
def load(agent_settings, tracer, producer):
    async def run(arrivals, settings=agent_settings, **options):
        async with asyncio.timeout(30):
            return await driver.run(
                settings,
                arrivals,
                sample_targets(),
                tracer,
                producer=producer,
                out=options.pop("out", None),
                services=options.pop("services", None),
                options=dataclasses.replace(QUICK, **options),
            )

    return run


async def test_requests_to_a_running_instance_are_answered_in_time(load, agent, make_instance, producer, tmp_path):
    instance = await make_instance()
    agent.up("i1", instance.address)
    arrivals = uniform(100, 1.0, ["echo"], seed=1)
    result = await load(arrivals, out=tmp_path)
    assert (result.requests, result.answered, result.wrong, result.failed) == (100, 100, 0, 0)
    assert sorted(instance.requests) == sorted(arrival.row for arrival in arrivals)
    assert result.latency["warm"].n == 100
    assert result.latency["warm"].p50_ms < 100
    records = sorted(read_requests(tmp_path / "requests.jsonl"), key=lambda record: record.number)
    gaps = [(later.intended_ns - earlier.intended_ns) / 1e6 for earlier, later in itertools.pairwise(records)]
    assert gaps == pytest.approx([10.0] * 99)
    assert all(r.intended_ns <= r.sent_ns <= r.dispatched_ns <= r.response_ns for r in records)
    assert records == sorted(result.records, key=lambda record: record.number)


async def test_demand_goes_up_with_a_trace_and_down_to_zero(load, agent, make_instance, producer, spans):
    agent.up("i1", (await make_instance()).address)
    result = await load([Arrival(0.0, "echo", 1), Arrival(0.2, "echo", 2)])
    assert sum(event.arrivals for event in producer.events) == 2
    assert producer.events[-1].in_flight == 0
    assert max(event.in_flight for event in producer.events) >= 1
    sequence = [event.seq for event in producer.events]
    assert sequence == sorted(set(sequence))
    traces = {context.split("-")[1] for context in producer.contexts if context}
    assert traces == {record.trace_id for record in result.records}
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert set(by_name) == {"request", "http"}
    assert by_name["http"].parent.span_id == by_name["request"].context.span_id
    assert by_name["request"].parent is None
    (first, *_) = sorted(result.records, key=lambda record: record.number)
    (root, *_) = [s for s in spans.get_finished_spans() if s.name == "request"]
    assert (root.start_time, root.end_time) == (first.intended_ns, first.response_ns)


@pytest.mark.parametrize("mode", ["thaw", "restore", "remote", "cold"])
async def test_a_request_that_waited_for_a_start_is_counted_under_its_mode(load, agent, make_instance, producer, spans, mode):
    instance = await make_instance()
    producer.on_event = lambda event: event.in_flight and agent.up("i1", instance.address, start_mode=mode)
    result = await load([Arrival(0.0, "echo", 1), Arrival(0.4, "echo", 2)])
    assert [(record.mode, record.outcome) for record in result.records] == [(mode, "ok"), ("warm", "ok")]
    assert result.latency["started"].n == result.latency[mode].n == 1
    assert {span.name for span in spans.get_finished_spans()} == {"request", "first_response", "http"}
    kind = "cold" if mode == "cold" else "restored"
    assert result.tokens["echo"][kind].instances == 1


async def test_behind_a_service_what_is_refused_is_tried_again_and_any_instance_may_answer(load, make_instance, spans):
    instance = await make_instance()
    instance.script = ["cut", "error"]
    arrivals = [Arrival(0.0, "echo", 1), Arrival(0.3, "echo", 2), Arrival(0.6, "echo", 3)]
    running = asyncio.create_task(load(arrivals, services={"echo": instance.address}))
    await asyncio.sleep(0.5)
    instance.token = "ffeeddccbbaa9988"  # another process answers from now on
    result = await running
    records = sorted(result.records, key=lambda record: record.number)
    assert [(record.mode, record.outcome, record.retries) for record in records] == [
        (driver.SERVICE, "ok", 2),
        ("warm", "ok", 0),
        ("warm", "ok", 0),
    ]
    assert {record.token for record in records} == {"00112233445566aa", "ffeeddccbbaa9988"}


async def test_load_is_open_loop(load, agent, make_instance):
    instance = await make_instance()
    instance.delay_s = 0.5
    agent.up("i1", instance.address)
    result = await load(uniform(20, 0.5, ["echo"], seed=1))
    sent = [record.sent_ns for record in result.records]
    assert (max(sent) - min(sent)) / 1e9 < 2  # a closed loop would have taken 10 x 0.5 s
    assert instance.busy_max > 1


async def test_the_wait_for_a_slot_counts_and_concurrency_is_kept(load, agent, make_instance):
    instance = await make_instance()
    instance.delay_s = 0.2
    agent.up("i1", instance.address)
    result = await load(bursts([(32, 0.0)], ["echo"], seed=1))
    assert instance.busy_max == 16  # limits.concurrency of the sample
    assert result.answered == 32
    assert result.latency["warm"].max_ms > 390


@pytest.mark.parametrize("trouble", ["cut", "error", "garbage", "silent"])
async def test_a_failed_attempt_is_made_again_elsewhere(load, agent, make_instance, trouble, monkeypatch):
    monkeypatch.setattr(endpoints, "SUSPECT_S", (0.5, 0.5))
    bad = await make_instance(*[trouble] * 10)
    good = await make_instance()
    agent.up("bad", bad.address)
    agent.up("good", good.address)
    result = await load(ONE, attempt_timeout_s=0.3)
    (record,) = result.records
    assert (record.outcome, record.instance, record.retries, record.problem) == ("ok", "good", 1, "")
    assert (result.retries, bad.requests, good.requests) == (1, [7], [7])


async def test_an_instance_that_dies_in_mid_request_loses_no_request(load, agent, make_instance):
    first, second = await make_instance("silent"), await make_instance()
    agent.up("first", first.address)

    async def kill():
        await first.came.wait()
        agent.down("first")  # its sandbox vanishes: no byte comes from it any more
        agent.up("second", second.address)

    killing = asyncio.create_task(kill())
    result = await load(ONE, attempt_timeout_s=60)
    await killing
    (record,) = result.records
    assert (record.outcome, record.instance, record.retries) == ("ok", "second", 1)
    assert record.latency_ms < 5000


async def test_an_instance_that_is_gone_before_its_agent_says_so_is_tried_again_later(load, agent, make_instance):
    instance = await make_instance()
    address = instance.address
    await instance.stop()
    agent.up("i1", address)
    later = await make_instance()

    async def replace():
        await asyncio.sleep(0.3)
        agent.down("i1")
        agent.up("i2", later.address)

    replacing = asyncio.create_task(replace())
    result = await load(ONE)
    await replacing
    (record,) = result.records
    assert (record.outcome, record.instance) == ("ok", "i2")
    assert record.retries >= 1


async def test_a_wrong_answer_is_counted_and_not_repeated(load, agent, make_instance):
    instance = await make_instance("wrong", "ok", "refuse")
    agent.up("i1", instance.address)
    result = await load(uniform(10, 0.3, ["echo"], seed=1))
    assert (result.answered, result.wrong, result.failed, result.retries) == (3, 2, 0, 0)
    problems = sorted(record.problem for record in result.records)
    assert problems[0] == ""
    assert problems[1].startswith("its value is")
    assert problems[2].startswith("status 404")


async def test_an_instance_whose_token_changes_is_wrong(load, agent, make_instance):
    instance = await make_instance()
    agent.up("i1", instance.address)

    async def change():
        await instance.came.wait()
        await asyncio.sleep(0.05)
        instance.token = "ffffffffffffffff"

    changing = asyncio.create_task(change())
    result = await load([Arrival(0.0, "echo", 1), Arrival(0.5, "echo", 2)])
    await changing
    assert [record.outcome for record in result.records] == ["ok", "wrong"]
    assert "another process" in result.records[1].problem


async def test_a_request_that_nobody_answers_fails_at_its_deadline(load, producer):
    began = time.monotonic()
    result = await load([Arrival(0.0, "echo", 1), Arrival(0.1, "ledger", 1)], deadline_s=0.5)
    assert time.monotonic() - began < 5
    assert (result.requests, result.answered, result.failed) == (2, 0, 2)
    assert all("no answer within 0.5 s (0 instances were known)" in problem for problem in [r.problem for r in result.records])
    assert {event.function: event.in_flight for event in producer.events} == {"echo": 0, "ledger": 0}


async def test_a_request_whose_instance_only_fails_says_why_at_its_deadline(load, agent, make_instance):
    agent.up("i1", (await make_instance(*["error"] * 100)).address)
    result = await load(ONE, deadline_s=0.6)
    (record,) = result.records
    assert record.outcome == "failed"
    assert record.retries >= 2
    assert "answered 500" in record.problem


async def test_an_agent_that_starts_again_is_found_again(load, agent, make_instance, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(watch, "RECONNECT_S", (0.02, 0.05))
    first, second = await make_instance(), await make_instance()
    agent.up("i1", first.address)

    async def restart():
        await first.came.wait()
        await agent.stop()
        await first.stop()
        agent.endpoints.clear()
        await agent.start()
        agent.up("i2", second.address)

    restarting = asyncio.create_task(restart())
    result = await load(uniform(20, 1.5, ["echo"], seed=1))
    await restarting
    assert (result.answered, result.wrong, result.failed) == (30, 0, 0)
    assert len(agent.hellos) >= 2
    assert {hello.role for hello in agent.hellos} == {"watcher"}
    assert second.requests


async def test_instances_known_before_their_agent_went_away_are_still_used(load, agent, make_instance, caplog):
    caplog.set_level(logging.CRITICAL)
    instance = await make_instance()
    agent.up("i1", instance.address)

    async def stop():
        await instance.came.wait()
        await agent.stop()

    stopping = asyncio.create_task(stop())
    result = await load(uniform(20, 0.5, ["echo"], seed=1))
    await stopping
    assert (result.answered, len(instance.requests)) == (10, 10)


async def test_the_agent_of_this_machine_is_found_by_its_file_read_anew(load, agent, make_instance, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(watch, "RECONNECT_S", (0.02, 0.05))
    settings = dataclasses.replace(Settings(), paths=PathSettings(cache_dir=tmp_path, state_dir=tmp_path), tls=TlsSettings(mode="off"))

    def publish():
        settings.agent_file.write_text(json.dumps({"host": "127.0.0.1", "port": agent.port, "pid": 1}))

    publish()
    instance = await make_instance()
    agent.up("i1", instance.address)

    async def move():
        await instance.came.wait()
        await agent.stop()
        agent.port = 0
        await agent.start()
        publish()
        await agent.until_greeted(2)

    moving = asyncio.create_task(move())
    result = await load(uniform(20, 1, ["echo"], seed=1), settings=settings)
    await moving
    assert result.answered == 20


async def test_an_unknown_function_is_refused_before_anything_is_sent(load, producer):
    with pytest.raises(TargetUnknown, match="no function 'nope'; known: cache, echo, index"):
        await load([Arrival(0.0, "nope", 1)])
    assert producer.events == []


@pytest.mark.parametrize(
    ("agents", "message"),
    [
        ("127.0.0.1:9", "cannot reach the agent 127.0.0.1:9"),
        ("nonsense", "'nonsense' is not host:port"),
        ("", "no agent runs on this machine"),
    ],
)
async def test_an_agent_that_is_not_there_is_a_clear_error_and_quick(load, producer, tmp_path, agents, message):
    settings = dataclasses.replace(
        Settings(),
        paths=PathSettings(cache_dir=tmp_path, state_dir=tmp_path),
        scaler=ScalerSettings(agents=agents),
    )
    began = time.monotonic()
    with pytest.raises(LoadImpossible, match=message):
        await load(ONE, settings=settings, connect_timeout_s=0.5)
    assert time.monotonic() - began < 3
    assert producer.events == []


async def test_something_that_is_not_an_agent_is_a_clear_error(load, make_instance):
    instance = await make_instance()
    settings = dataclasses.replace(Settings(), scaler=ScalerSettings(agents=instance.address))
    with pytest.raises(LoadImpossible, match="cannot reach the agent"):
        await load(ONE, settings=settings, connect_timeout_s=0.5)


async def test_a_run_that_is_stopped_tells_the_scaler_that_nothing_is_wanted(load, producer):
    running = asyncio.create_task(load(ONE))
    async with asyncio.timeout(5):
        while not producer.events:
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [event.in_flight for event in producer.events][-1] == 0
    assert all(event.in_flight >= 0 for event in producer.events)


async def test_a_run_without_arrivals_ends_at_once(load):
    result = await load([])
    assert (result.requests, result.answered) == (0, 0)
