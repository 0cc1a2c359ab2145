"""Checked requests to one instance: every answer is computed again and compared.

In: an address and the :class:`~loadgen.checks.Target` it is asked as. Out: how many answers came, how many were wrong or missing, and
the first few problems in words. Used by the parts of :mod:`loadgen.bench`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from infra.tasks import TaskGroup
from loadgen.arrivals import ROWS
from loadgen.checks import Target
from loadgen.errors import AttemptFailed

#: Clients that ask one instance at the same time, each request on a connection of its own: fewest and most.
_CLIENTS = (4, 16)
#: An answer that takes longer is missing, s.
_ANSWER_S = 30.0
_PROBLEMS_KEPT = 5


@dataclass
class Answers:
    """What came of some requests to one instance.

    Attributes:
        asked: requests sent.
        wrong: answered, but not right.
        failed: not answered.
        seconds: how long they took together.
        problems: the first few, for people.
    """

    asked: int = 0
    wrong: int = 0
    failed: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For the JSON."""
        rate = round(self.asked / self.seconds) if self.seconds else 0
        return {"asked": self.asked, "wrong": self.wrong, "failed": self.failed, "per_second": rate, "problems": self.problems}


async def ask(target: Target, address: str, count: int, seed: int) -> Answers:
    """Send ``count`` requests for random rows from several clients at once; an instance must keep its token throughout."""
    answers = Answers()
    tokens: dict[str, str] = {}
    chooser = random.Random(seed)
    rows = (chooser.randrange(ROWS) for _ in range(count))
    fewest, most = _CLIENTS
    clients = min(count, most, max(fewest, target.concurrency))
    tasks = TaskGroup("bench")
    began = time.monotonic()
    try:
        await asyncio.gather(*(tasks.spawn(_client(target, address, rows, answers, tokens), f"client {i}") for i in range(clients)))
    finally:
        await tasks.close()
    answers.seconds = time.monotonic() - began
    return answers


async def _client(target: Target, address: str, rows: Iterator[int], answers: Answers, tokens: dict[str, str]) -> None:
    for row in rows:
        answers.asked += 1
        try:
            async with asyncio.timeout(_ANSWER_S):
                status, body = await target.ask(address, target.path(row), "")
        except (AttemptFailed, TimeoutError) as error:
            answers.failed += 1
            _note(answers, str(error) or f"no answer within {_ANSWER_S:.0f} s")
            continue
        problem = _judge(target, status, body, row, tokens)
        if problem:
            answers.wrong += 1
            _note(answers, f"row {row}: {problem}")


def _judge(target: Target, status: int, body: bytes, row: int, tokens: dict[str, str]) -> str:
    if status != 200:
        return f"status {status}: {body[:80]!r}"
    verdict = target.inspect(body, row)
    first = tokens.setdefault("token", verdict.token)
    if not verdict.problem and first != verdict.token:
        return f"its token was {first} and is {verdict.token} now: another process"
    return verdict.problem


def _note(answers: Answers, problem: str) -> None:
    if len(answers.problems) < _PROBLEMS_KEPT:
        answers.problems.append(problem)
