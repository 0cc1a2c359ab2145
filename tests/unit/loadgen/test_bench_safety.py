"""The cost of safety is the difference of two installations that are asked in turns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.api.records import StartRecord
from infra.settings import Settings
from loadgen.bench import safety
from loadgen.bench.safety import Side
from loadgen.errors import LoadImpossible


class FakeInstallation:
    def __init__(self, settings: Settings, thaw: Any, out: Path, say: Any) -> None:
        self.name, self.settings = out.name, settings
        self.removed = False

    @contextlib.contextmanager
    def stack(self) -> Iterator[Settings]:
        yield self.settings

    @contextlib.contextmanager
    def background(self, name: str) -> Iterator[None]:
        yield

    def remove(self) -> None:
        REMOVED.append(self.name)

    def keep_logs(self) -> str:
        return "logs"


REMOVED: list[str] = []


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is measured, in order; ``on`` takes 10 ms and ``off`` 9, but for one start each that was something else."""
    asked: list[tuple[str, int]] = []
    REMOVED.clear()

    async def measure(installation: FakeInstallation, settings: Any, document: Any, starts: int, modes: Any, book: Any) -> dict[str, Any]:
        asked.append((installation.name, starts))
        took_ms = {"on": 10, "off": 9}[installation.name]
        for mode in modes:
            for _ in range(starts):
                book.start("demand", mode, StartRecord(command_id="c", function="f", start_mode=mode, ended_ns=took_ms * 1_000_000))
        book.start("demand", "thaw", StartRecord(command_id="c", function="f", start_mode="cold", ended_ns=10**10))
        return {"failed": "it hangs" if settings.agent.node_name == "broken" else ""}

    monkeypatch.setattr(safety, "Installation", FakeInstallation)
    monkeypatch.setattr(safety.demand, "measure", measure)
    monkeypatch.setattr(safety.functions_setup, "prepare", lambda *_, **__: [Path("f.yaml")])
    return asked


def sides() -> list[Side]:
    return [Side("on", Settings(), ()), Side("off", Settings(), ())]


def test_both_are_asked_in_turns_and_the_difference_of_the_medians_is_the_cost(turns: list[tuple[str, int]], tmp_path: Path) -> None:
    result = safety.run(sides(), "echo", 14, tmp_path, lambda line: None)
    assert turns == [("on", 6), ("off", 6), ("off", 6), ("on", 6), ("on", 2), ("off", 2)]
    assert result["cost_ms"] == {"thaw": 1.0, "restore": 1.0}
    assert (result["on"]["thaw"]["n"], result["off"]["restore"]["n"]) == (14, 14)
    assert result["on"]["other"] == {"thaw": {"cold": 3}}, "what was no thaw is told and does not count"
    assert sorted(REMOVED) == ["off", "on"]


def test_what_cannot_be_measured_is_an_error_and_leaves_nothing(turns: list[tuple[str, int]], tmp_path: Path) -> None:
    broken = dataclasses.replace(Settings(), agent=dataclasses.replace(Settings().agent, node_name="broken"))
    with pytest.raises(LoadImpossible, match="off: it hangs"):
        safety.run([sides()[0], Side("off", broken, ())], "echo", 3, tmp_path, lambda line: None)
    assert sorted(REMOVED) == ["off", "on"]
