"""What a run of the bench has found so far: one place for the records, the wrong answers and what could not be measured.

In: starts and answers from the parts of :mod:`loadgen.bench`. Out: lists that :mod:`loadgen.bench.run` turns into the result and
:mod:`loadgen.bench.report` writes beside the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agent.api.records import StartRecord
from loadgen.bench.asking import Answers
from loadgen.bench.figures import Measured, kind_of


@dataclass
class Book:
    """The books of one run.

    Attributes:
        say: gets one line of progress at a time.
        measured: every start, whatever it was.
        wrong: answers that were not right or did not come, and instances that ended by themselves.
    """

    say: Callable[[str], None]
    measured: list[Measured] = field(default_factory=list)
    wrong: int = 0

    def start(self, part: str, asked: str, record: StartRecord, image_bytes: int = 0) -> Measured:
        """Enter one start."""
        item = Measured(part=part, asked=asked, kind=kind_of(asked, record, image_bytes), record=record)
        self.measured.append(item)
        if item.kind != asked:
            reason = f" ({record.fallback_reason})" if record.fallback_reason else ""
            self.say(f"{record.function}: a start that was to be {asked} was {item.kind}{reason}")
        return item

    def answers(self, function: str, answers: Answers) -> None:
        """Enter the answers of one instance."""
        self.wrong += answers.wrong + answers.failed
        for problem in answers.problems:
            self.say(f"{function}: WRONG: {problem}")

    def crashed(self, crashes: list[str]) -> None:
        """Enter instances that ended by themselves."""
        self.wrong += len(crashes)
        for crash in crashes:
            self.say(f"CRASH: {crash}")

    def of(self, part: str, function: str) -> list[Measured]:
        """The starts of one part and function."""
        return [item for item in self.measured if item.part == part and item.record.function == function]
