"""What is stored of a resting function, field by field.

In and out: :mod:`scaler.dormant`, which fills it. Apart from it because msgspec needs the fields' types at run time, and a compiled module
(:mod:`scaler.compiled`) does not keep them.
"""

from __future__ import annotations

from typing import Annotated, Any

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
    "generation": "v",
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
    generation: int = 0


# What a record of ``thaw.forecasts`` must look like: any scaler, of any version, may have written it.

_Number = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 52)]
_Rung = Annotated[int, msgspec.Meta(ge=0, le=3)]
_Class = Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)]
#: Instances that a function may have at the most.
_SLOTS_MAX = 10_000
_IdleTimes = tuple[_Count, Annotated[bytes, msgspec.Meta(max_length=256)], Annotated[bytes, msgspec.Meta(max_length=1024)]]
_Bytes = Annotated[bytes, msgspec.Meta(max_length=256)]
_Periods = tuple[_Amount, Annotated[int, msgspec.Meta(ge=-1, le=255)], _Bytes, _Bytes, _Bytes]
_Slot = tuple[_Number, _Class, _IdleTimes, dict[_Class, _IdleTimes], _Periods]


class _HeldSlot(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    freed_s: _Number
    arrived_s: _Number
    idle_s: _Number
    rise_s: _Number
    begin_s: _Number = 0.0
    #: The last one's time may be infinite.
    plan: Annotated[list[tuple[Annotated[float, msgspec.Meta(ge=-1e15)], _Rung]], msgspec.Meta(max_length=64)] = []


class _Held(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    now_s: _Number = 0.0
    idle_s: tuple[_Amount, _Amount, _Amount, _Amount] = (0.0, 0.0, 0.0, 0.0)
    moves_up: _Count = 0
    slots: Annotated[list[_HeldSlot], msgspec.Meta(max_length=_SLOTS_MAX)] = []


class _Forecast(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    rises: _IdleTimes = (0, b"", b"")
    slots: Annotated[list[_Slot], msgspec.Meta(max_length=_SLOTS_MAX)] = []


#: Format, what the slots hold (or an empty list), the forecast (or an empty list), what was measured, why it was given up, of which digest.
LearnedRecord = tuple[int, _Held, _Forecast, dict[int | str, _Amount], str, str]
