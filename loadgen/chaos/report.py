"""What a run of chaos came to: one JSON object, a table in Markdown, the raw data.

In: :class:`~loadgen.chaos.run.Outcome`. Out: ``result.json``, ``faults.jsonl``, ``requests.jsonl`` and ``chaos.md`` in a folder. Used by
``thaw bench chaos``.
"""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any

import msgspec

from loadgen.chaos import recovery
from loadgen.chaos.recovery import KindRecovery
from loadgen.chaos.run import Outcome
from loadgen.chaos.schedule import KINDS

RESULT_FILE, FAULTS_FILE, REQUESTS_FILE, TABLE_FILE = "result.json", "faults.jsonl", "requests.jsonl", "chaos.md"


def write(folder: Path, outcome: Outcome, *, minutes: float, seed: int) -> dict[str, Any]:
    """Write everything; returns the result."""
    folder.mkdir(parents=True, exist_ok=True)
    found = recovery.recoveries(outcome.faults, outcome.load.records, outcome.limits_ms)
    kinds = recovery.by_kind(outcome.faults, found)
    result = summary(outcome, kinds, minutes=minutes, seed=seed)
    by_number = {item.number: item for item in found}
    lines = [
        msgspec.json.encode({"fault": fault, "recovery": _finite(msgspec.to_builtins(by_number[fault.number]))}) for fault in outcome.faults
    ]
    (folder / FAULTS_FILE).write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / REQUESTS_FILE).write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in outcome.load.records))
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
    (folder / TABLE_FILE).write_text("\n".join(table(kinds)) + "\n")
    return result


def summary(outcome: Outcome, kinds: dict[str, KindRecovery], *, minutes: float, seed: int) -> dict[str, Any]:
    """The result as one JSON object."""
    load = outcome.load
    modes = collections.Counter(start.start_mode for start in outcome.started if start.outcome == "ready")
    return {
        "minutes": minutes,
        "seed": seed,
        "faults": len(outcome.faults),
        "kills": sum(fault.kills > 0 for fault in outcome.faults),
        "skipped": outcome.skipped,
        "accepted": load.requests,
        "answered": load.answered,
        "lost": load.failed,
        "wrong": load.wrong,
        "leaked": len(outcome.leaked),
        "retries": load.retries,
        "starts": dict(sorted(modes.items())),
        "restarts": outcome.restarts,
        "limits_ms": {name: round(value) for name, value in sorted(outcome.limits_ms.items())},
        "recovery": {name: _finite(msgspec.to_builtins(value)) for name, value in kinds.items()},
        "recovery_p99_max_s": _rounded(max((value.p99_s for value in kinds.values()), default=0.0)),
        "problems": [*load.problems, *outcome.leaked],
    }


def table(kinds: dict[str, KindRecovery]) -> list[str]:
    """Rows of Markdown, one for each kind of fault, in the order of the schedule."""
    rows = [
        "| fault | n | noticed | recovery p50 s | p99 s | max s | p99 after its end s | restart p50 s | max s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        if (value := kinds.get(kind.name)) is not None:
            figures = [value.p50_s, value.p99_s, value.max_s, value.after_end_p99_s]
            restart = [value.back_p50_s, value.back_max_s] if kind.action in ("kill", "full") and kind.target != "instance" else []
            cells = [f"{figure:.1f}" if value.noticed else "-" for figure in figures] + [f"{figure:.1f}" for figure in restart]
            cells += ["-"] * (6 - len(cells))
            rows.append(f"| {kind.says} | {value.faults} | {value.noticed} | {' | '.join(cells)} |")
    return rows


def _rounded(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}
