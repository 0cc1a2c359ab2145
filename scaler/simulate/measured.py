"""Costs of starts and rungs as a bench measured them, for ``thaw simulate --costs``.

In: a file made by ``thaw bench costs``, or the newest of those in ``scaler/simulate/costs``, one per date. Out: a
:class:`~scaler.simulate.model.World` whose starts are drawn from what was measured; policies know the means.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from scaler.errors import CostsUnreadable
from scaler.simulate.model import World

_FOLDER = Path(__file__).parent / "costs"
_MODES = ("thaw", "restore", "remote", "cold")


def shipped() -> Path:
    """The newest costs that come with the project."""
    return max(_FOLDER.glob("*.json"))


def world(path: Path, seed: int) -> World:
    """The costs in ``path``.

    Raises:
        CostsUnreadable: it is not what ``thaw bench costs`` writes.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        spread_s = tuple(tuple(float(ms) / 1000 for ms in value["starts_ms"][mode]) for mode in _MODES)
        standby_mb, running_share = float(value["standby_mb"]), float(value["running_share"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CostsUnreadable(f"{path} can't be read as costs: {error!r}; `thaw bench costs FOLDER` makes such a file") from error
    if any(len(quantiles) < 2 or list(quantiles) != sorted(quantiles) or quantiles[0] <= 0 for quantiles in spread_s):
        raise CostsUnreadable(f"{path} can't be read as costs: quantiles are two or more, above 0 and ascending")
    if standby_mb <= 0 or not 0 < running_share <= 1:
        raise CostsUnreadable(f"{path} can't be read as costs: standby_mb and running_share are above 0, and a share is at most 1")
    thaw_s, restore_s, remote_s, cold_s = (float(np.convolve(quantiles, (0.5, 0.5), "valid").mean()) for quantiles in spread_s)
    return World(
        thaw_s=thaw_s,
        restore_s=restore_s,
        remote_s=remote_s,
        cold_s=cold_s,
        standby_mb=standby_mb,
        running_share=running_share,
        spread_s=spread_s,
        seed=seed,
    )
