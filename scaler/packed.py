"""What is stored of a resting function, field by field.

In and out: :mod:`scaler.dormant`, which fills it. Apart from it because msgspec needs the fields' types at run time, and a compiled module
(:mod:`scaler.compiled`) does not keep them.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: Names of fields are stored with every function.
_SHORT = {
    "shard": "s",
    "epoch": "e",
    "document": "d",
    "connections": "n",
    "checkpoint": "c",
    "checkpoint_number": "x",
    "checked": "k",
    "image_mb": "i",
    "cold_on": "o",
    "given_up": "g",
    "attempts": "a",
    "measured": "m",
    "start_ms": "t",
    "start_mode": "w",
    "error": "r",
    "standbys": "b",
    "holding": "h",
    "forecast": "f",
}


class Packed(msgspec.Struct, omit_defaults=True, rename=_SHORT):
    """A resting function. What is as it usually is takes no room."""

    shard: int
    epoch: int
    document: bytes
    connections: list[int] = []
    #: Checkpoint's name; hexadecimal ones as the number that they are.
    checkpoint: str = ""
    checkpoint_number: bytes = b""
    checked: bool = False
    image_mb: int = 0
    cold_on: str = ""
    given_up: str = ""
    #: Failures and pauses: of starts, prepares, checkpoints and fetches.
    attempts: list[int] = []
    #: By place in :data:`scaler.dormant._MEASURED`, or name.
    measured: dict[int | str, float] = {}
    #: Of the last start, ms; 0 is left out.
    start_ms: float | None = None
    start_mode: str = ""
    error: str = ""
    #: Name, node, MB, when made, attempt.
    standbys: list[tuple[str, str, float, int, int]] = []
    #: Pods by node; None: it has none.
    placeholders: dict[str, int] | None = None
    holding: list[Any] = []
    forecast: list[Any] = []
