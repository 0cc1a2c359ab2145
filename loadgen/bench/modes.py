"""One start at a time, by start mode: how each mode is brought about, and one function's figures.

In: an agent (:class:`~loadgen.bench.link.AgentLink`) and a function. Out: its entry of the result. Modes are interleaved in rounds, so
that drift of the machine hits all alike. What a start *was* is told by its record; one that was something else is not counted.

==========  ==============================================================================================
restore     policy.memory ``lazy``, the whole image in the node's cache
whole       policy.memory ``whole``: the same image, every page before resume, as ``criu restore`` does it
thaw        a standby is made first; the start uses it up
cold        policy.checkpoint ``off``
remote      the image is evicted first; last of a round, because the image has to come back before the next
==========  ==============================================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.api.function import Function
from agent.api.messages import (
    CheckpointPublished,
    Evict,
    Evicted,
    Fetch,
    InstanceExited,
    InstanceInfo,
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
from loadgen.bench import asking, host
from loadgen.bench.book import Book
from loadgen.bench.figures import MODES, counted, median, others, summary
from loadgen.bench.link import AgentLink, inventory
from loadgen.checks import target_of
from loadgen.errors import LoadImpossible

#: Pause after a start, s: the pool of sandboxes is full again, as it is on a node that is not overloaded.
PAUSE_S = 0.3
#: Longest wait for an image to leave or to fill the cache, s, and how often it is looked at.
_CACHE_S, _POLL_S = 120.0, 0.05
#: A download that failed is asked for again after this long, s.
_FETCH_AGAIN_S = 10.0
#: A standby is made in the background; longest wait for one, s.
_PREPARE_S = 60.0
#: A standby waits this long before it is used, s: nothing of its making is still going on.
_STANDBY_REST_S = 0.2
_MB = 1e6


@dataclass
class Subject:
    """One function on one agent, and the ways to start it.

    Attributes:
        settings: where the agent is.
        link: to it.
        book: of the run.
        function: its document as shipped; policies are set for each start.
        image_bytes: of its checkpoint, once it has one.
        standby_pss: bytes of each standby, when it was made.
        cold_pss: bytes of each cold instance that was looked at, after its first request.
        running_pss: bytes of each restored instance at its end, after its first request.
    """

    settings: Settings
    link: AgentLink
    book: Book
    function: Function
    image_bytes: int = 0
    standby_pss: list[int] = field(default_factory=list)
    cold_pss: list[int] = field(default_factory=list)
    running_pss: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The function's."""
        return self.function.name

    async def checkpoint(self) -> None:
        """Freeze and publish it; the image is in the node's cache then.

        Raises:
            LoadImpossible: it cannot be frozen.
        """
        published = await self.link.call(MakeCheckpoint, function=self.function)
        if not isinstance(published, CheckpointPublished):
            raise LoadImpossible(f"no checkpoint of {self.name}: {published.message}")
        self.image_bytes = published.checkpoint.image_bytes

    async def once(self, part: str, mode: str, requests: int = 1, seed: int = 0) -> asking.Answers:
        """Bring about one start of ``mode``, ask the instance, and end it.

        Raises:
            LoadImpossible: it could not be brought about.
        """
        standby = None
        if mode == "thaw":
            standby = await self.prepare()
            await asyncio.sleep(_STANDBY_REST_S)
        elif mode == "remote":
            await self.evict()
        done = await self.start(part, mode)
        answers = asking.Answers()
        if done is not None:
            answers = await asking.ask(target_of(self.function), done.address, requests, seed)
            self.book.answers(self.name, answers)
            if mode == "cold":
                self.cold_pss.append(await asyncio.to_thread(host.pss_bytes, self.settings.agent.node_name, done.instance))
            held = await self.release(done.instance)
            if mode == "restore" and held:
                self.running_pss.append(held)
        if standby is not None and (done is None or done.instance != standby.standby):
            await self.release(standby.standby)
        if mode == "remote":
            await self.until_cached()
        await asyncio.sleep(PAUSE_S)
        return answers

    async def start(self, part: str, mode: str) -> InstanceInfo | None:
        """One start of ``mode``, entered in the books; None when it failed."""
        return self.enter(part, mode, await self.link.call(Start, function=with_policy(self.function, mode)))

    def enter(self, part: str, mode: str, report: Any) -> InstanceInfo | None:
        """Enter the report of a start."""
        if isinstance(report, StartDone):
            self.book.start(part, mode, report.record, self.image_bytes)
            return report.instance
        if not isinstance(report, StartFailed):
            raise LoadImpossible(f"a start of {self.name} was answered with {type(report).__name__}")
        failed = report.record or StartRecord(command_id=report.command_id, function=self.name)
        self.book.start(part, mode, msgspec.structs.replace(failed, outcome=report.reason))
        self.book.say(f"{self.name} did not start: {report.message}")
        return None

    async def prepare(self) -> StandbyInfo:
        """Make one standby.

        Raises:
            LoadImpossible: the agent does not make one.
        """
        report = await self.link.call(Prepare, deadline_s=_PREPARE_S, function=with_policy(self.function, "thaw"))
        if not isinstance(report, PrepareDone):
            raise LoadImpossible(f"no standby of {self.name}: {report.message}")
        self.standby_pss.append(report.standby.pss_bytes)
        return report.standby

    async def release(self, instance: str) -> int:
        """End an instance or a standby; returns the bytes that an instance held just before, 0 when that is not known."""
        report = await self.link.call(Release, instance=instance)
        return report.pss_bytes if isinstance(report, InstanceExited) else 0

    async def evict(self) -> None:
        """Empty the node's cache of it; a download of the start before may still use the image."""
        give_up = time.monotonic() + _CACHE_S
        while not isinstance(report := await self.link.call(Evict, function_name=self.name), Evicted):
            if time.monotonic() > give_up:
                raise LoadImpossible(f"the image of {self.name} stays in use: {report.message}")
            await asyncio.sleep(_POLL_S)

    async def until_cached(self) -> None:
        """Wait until every page of the image is on the node again."""
        give_up = time.monotonic() + _CACHE_S
        ask_at = time.monotonic() + _FETCH_AGAIN_S
        while not any(item.function == self.name and item.complete for item in (await inventory(self.settings)).checkpoints):
            if time.monotonic() > give_up:
                raise LoadImpossible(f"the image of {self.name} did not come back to the node's cache within {_CACHE_S:.0f} s")
            if time.monotonic() > ask_at:
                ask_at += _FETCH_AGAIN_S
                await self.link.call(Fetch, function=self.function)
            await asyncio.sleep(_POLL_S)


def with_policy(function: Function, mode: str) -> Function:
    """The document with the policies that bring about ``mode``."""
    policy = msgspec.structs.replace(
        function.spec.policy,
        checkpoint="off" if mode == "cold" else "auto",
        memory="whole" if mode == "whole" else "lazy",
    )
    return msgspec.structs.replace(function, spec=msgspec.structs.replace(function.spec, policy=policy))


def rounds(starts: int, cold_starts: int, modes: Sequence[str]) -> list[list[str]]:
    """What is started when: every round holds each mode once, in turning order; cold starts are spread evenly; remote is last.

    >>> rounds(2, 1, ("thaw", "restore", "remote", "cold"))
    [['thaw', 'restore', 'remote'], ['restore', 'thaw', 'cold', 'remote']]
    """
    local = [mode for mode in modes if mode not in ("cold", "remote")]
    colds = cold_starts if "cold" in modes else 0
    plan = []
    for row in range(max(starts, 1)):
        turn = row % len(local) if local else 0
        due = (row + 1) * colds // max(starts, 1) - row * colds // max(starts, 1)
        plan.append([*local[turn:], *local[:turn], *["cold"] * due, *(["remote"] if "remote" in modes else [])])
    return plan


async def measure(subject: Subject, starts: int, cold_starts: int, requests: int, modes: Sequence[str] = MODES) -> dict[str, Any]:
    """Every mode of one function.

    Args:
        subject: the function.
        starts: of each mode but cold.
        cold_starts: cold ones.
        requests: checked requests to one instance of each mode, after the measured starts.
        modes: which of :data:`~loadgen.bench.figures.MODES`.

    Raises:
        LoadImpossible: it cannot be checkpointed, or a mode cannot be brought about.
    """
    say, name = subject.book.say, subject.name
    say(f"{name}: checkpoint")
    await subject.checkpoint()
    await subject.once("first", "restore")  # the image is mapped and its pages are in the page cache
    plan = rounds(starts, cold_starts, modes)
    for number, row in enumerate(plan):
        for mode in row:
            await subject.once("modes", mode, seed=number)
        if (number + 1) % 10 == 0 or number + 1 == len(plan):
            say(f"{name}: round {number + 1} of {len(plan)}")
    asked: dict[str, dict[str, Any]] = {}
    if requests:
        for mode in modes:
            answers = await subject.once("requests", mode, requests, seed=len(asked))
            asked[mode] = answers.figures()
            say(f"{name}: {answers.asked} requests after {mode}: {answers.wrong} wrong, {answers.failed} failed, {answers.seconds:.1f} s")
    found = figures(subject, modes)
    found["requests"] = asked
    say(f"{name}: " + ", ".join(f"{mode} p50 {found[mode]['p50_ms']:.1f} ms" for mode in modes))
    return found


def figures(subject: Subject, modes: Sequence[str]) -> dict[str, Any]:
    """One function's entry of the result, without its requests."""
    measured = subject.book.of("modes", subject.name)
    records = {mode: counted(measured, mode) for mode in modes}
    found: dict[str, Any] = {mode: summary(items) for mode, items in records.items()}
    remote = records.get("remote", [])
    found["standby_pss_mb"] = median((value / _MB for value in subject.standby_pss), 3)
    found["cold_pss_mb"] = median((value / _MB for value in subject.cold_pss), 3)
    found["running_pss_mb"] = median((value / _MB for value in subject.running_pss), 3)
    found["image_bytes"] = subject.image_bytes
    found["working_set_bytes"] = int(median(item.pages_prefetched * 4096 for item in records.get("restore", [])))
    found["remote_bytes_before_response"] = int(median(item.bytes_by_tier.get("s3", 0) for item in remote))
    found["bytes_by_tier"] = {mode: _tiers(items) for mode, items in records.items()}
    found["other"] = others(measured)
    return found


def _tiers(records: Sequence[StartRecord]) -> dict[str, int]:
    tiers = sorted({tier for record in records for tier in record.bytes_by_tier})
    return {tier: int(median(record.bytes_by_tier.get(tier, 0) for record in records)) for tier in tiers}
