"""What can be left out, to see that the simulation would notice: one replacement each, made here and nowhere in shipped code.

In: a name. Out: what is replaced by what, for :mod:`thaw.faults.world`.
"""

from __future__ import annotations

from typing import Any


def removal(name: str) -> list[tuple[Any, str, Any]]:
    """The replacements that leave a safeguard out."""
    return []
