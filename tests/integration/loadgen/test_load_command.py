"""``thaw load`` as a user calls it: a process of its own, a real broker, and the table of functions."""

import asyncio
import json
import sys

import msgpack
import pytest

from infra import kafka
from infra.kafka import Topic
from loadgen.result import read_requests
from scaler.demand import DEMAND_TOPIC, FUNCTIONS_TOPIC

NAME = "load-command"


async def thaw(settings, agent, *arguments):
    """Exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "thaw",
        "--state-dir",
        str(settings.paths.state_dir / "load-command"),
        "--set",
        f"kafka.bootstrap_servers={settings.kafka.bootstrap_servers}",
        "--set",
        f"scaler.agents=127.0.0.1:{agent.port}",
        "--set",
        "tls.mode=off",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, errors = await process.communicate()
    return process.returncode, out.decode(), errors.decode()


@pytest.fixture
async def applied(stack_settings):
    """A function that is asked and checked as the sample ``echo``."""
    document = {
        "metadata": {"name": NAME, "labels": {"thaw.dev/check": "echo"}},
        "spec": {"command": ["/opt/echo/echo"], "port": 8080, "limits": {"concurrency": 4}},
    }
    await kafka.ensure_topics(stack_settings.kafka, [Topic(DEMAND_TOPIC), Topic(FUNCTIONS_TOPIC, 1, {"cleanup.policy": "compact"})])
    async with kafka.started(kafka.producer(stack_settings.kafka, "test"), stack_settings.kafka) as producer:
        await producer.send_and_wait(FUNCTIONS_TOPIC, msgpack.packb(document), NAME.encode())
        yield NAME
        await producer.send_and_wait(FUNCTIONS_TOPIC, None, NAME.encode())


@pytest.mark.stack
async def test_one_json_object_and_the_raw_data(stack_settings, agent, make_instance, applied, tmp_path):
    agent.up("i1", (await make_instance()).address, function=NAME)
    code, out, errors = await thaw(
        stack_settings,
        agent,
        *("load", "--function", NAME, "--uniform", "20", "--burst", "5@0.5", "--duration", "1", "--out", str(tmp_path), "--json"),
    )
    assert code == 0, errors
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["requests"], result["answered"], result["wrong"], result["failed"]) == (25, 25, 0, 0)
    assert result["latency"]["warm"]["n"] == 25
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert len(read_requests(tmp_path / "requests.jsonl")) == 25
    code, out, _ = await thaw(stack_settings, agent, "trace", "--function", NAME)
    assert code == 0
    assert "25 traces" in out


@pytest.mark.stack
async def test_a_trace_is_replayed_and_a_wrong_answer_is_the_exit_code(stack_settings, agent, make_instance, applied):
    agent.up("i1", (await make_instance("ok", "wrong")).address, function=NAME)
    code, out, errors = await thaw(
        stack_settings, agent, *("load", "--function", NAME, "--from", "60", "--to", "120", "--time-factor", "60", "--seed", "3")
    )
    assert code == 1, errors
    assert "1 wrong" in out
    assert "its value is" in out
    assert "requests.jsonl" in out


@pytest.mark.stack
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--function", "nobody", "--burst", "1@0"), 1, "no function 'nobody'; known:"),
        (("--burst", "many"), 1, "'many' is not a burst"),
        (("--map", "nonsense"), 2, "--map takes TRACE=NAME"),
        (("--map", "zzzz=load-command"), 1, "the mapping matches none"),
        (("--trace", "/nowhere.csv"), 1, "cannot read trace /nowhere.csv"),
        (("--from", "100000"), 1, "there is no arrival"),
        (("--poisson", "-3"), 1, "the rate must be above 0"),
    ],
)
async def test_a_call_that_cannot_work_says_so_in_one_sentence(stack_settings, agent, applied, arguments, code, message):
    found, out, errors = await thaw(stack_settings, agent, "load", *arguments)
    assert found == code, errors
    assert message in errors
    assert "Traceback" not in errors
    assert out == ""


@pytest.mark.stack
async def test_an_agent_that_is_not_there_ends_the_command(stack_settings, agent, applied):
    await agent.stop()
    code, _, errors = await thaw(stack_settings, agent, "load", "--function", NAME, "--burst", "1@0")
    await agent.start()
    assert code == 1
    assert "cannot reach the agent" in errors
    assert "Traceback" not in errors
