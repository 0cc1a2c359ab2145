"""From a bench to the costs that ``thaw simulate --costs FILE`` reads.

In: the result and the start records of ``thaw bench restore``. Out: one JSON object (:mod:`scaler.simulate.measured` reads it).
Pure; called by ``thaw bench costs``.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadgen.bench.figures import Measured, counted
from loadgen.errors import LoadImpossible

_MODES = ("thaw", "restore", "remote", "cold")
#: Quantiles in steps of 5 %.
_QUANTILES = 21


def costs(result: dict[str, Any], measured: Sequence[Measured], function: str) -> dict[str, Any]:
    """What starts and rungs of ``function`` were measured to cost.

    Raises:
        LoadImpossible: the bench has not measured all of it.
    """
    found = result["functions"].get(function)
    if found is None:
        raise LoadImpossible(f"the bench has no function {function}; it has {', '.join(result['functions'])}")
    mine = [item for item in measured if item.part == "modes" and item.record.function == function]
    records = {mode: counted(mine, mode) for mode in _MODES}
    missing = [mode for mode, items in records.items() if not items]
    missing += [name for name in ("standby_pss_mb", "cold_pss_mb", "running_pss_mb") if not found.get(name)]
    if missing:
        raise LoadImpossible(f"the bench has no {', no '.join(missing)} of {function}")
    return {
        "date": f"{datetime.datetime.fromtimestamp(min(item.record.started_ns for item in mine) / 1e9, datetime.UTC):%Y-%m-%d}",
        "command": result["command"],
        "function": function,
        "machine": result["machine"],
        "starts": {mode: len(items) for mode, items in records.items()},
        "starts_ms": {mode: _quantiles([item.total_ns / 1e6 for item in items]) for mode, items in records.items()},
        "standby_mb": found["standby_pss_mb"],
        "running_share": round(found["running_pss_mb"] / found["cold_pss_mb"], 4),
    }


def _quantiles(milliseconds: list[float]) -> list[float]:
    return [round(float(value), 3) for value in np.quantile(milliseconds, np.linspace(0, 1, _QUANTILES))]
