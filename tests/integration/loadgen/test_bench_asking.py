"""Checked requests: what an instance that misbehaves is caught at."""

import pytest

from agent.api.function import from_builtins
from loadgen.bench.asking import ask
from loadgen.checks import target_of

ECHO = {
    "metadata": {"name": "echo", "labels": {"thaw.dev/check": "echo"}},
    "spec": {"command": ["/opt/echo/echo"], "port": 8080, "limits": {"concurrency": 4}},
}


@pytest.fixture
def target():
    return target_of(from_builtins(ECHO))


async def test_every_answer_is_counted(target, make_instance):
    instance = await make_instance()
    answers = await ask(target, instance.address, 100, 1)
    assert (answers.asked, answers.wrong, answers.failed, answers.problems) == (100, 0, 0, [])
    assert answers.figures()["per_second"] > 0


@pytest.mark.parametrize(
    ("script", "wrong", "failed", "problem"),
    [
        (("wrong", "ok", "wrong"), 2, 0, "its value is"),
        (("error",), 1, 0, "status 500"),
        (("cut", "garbage"), 0, 2, "ended inside the answer"),
    ],
)
async def test_wrong_and_missing_answers_are_told_apart(target, make_instance, script, wrong, failed, problem):
    instance = await make_instance(*script)
    answers = await ask(target, instance.address, 20, 1)
    assert (answers.asked, answers.wrong, answers.failed) == (20, wrong, failed)
    assert any(problem in text for text in answers.problems)


async def test_nobody_there_is_a_missing_answer(target):
    answers = await ask(target, "127.0.0.1:1", 3, 1)
    assert (answers.asked, answers.failed) == (3, 3)
