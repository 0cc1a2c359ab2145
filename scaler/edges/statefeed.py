"""Publishes what the planner knows of each function to the compacted topic ``thaw.state``.

In: snapshots of :class:`scaler.planner.Planner`. Out: records, name to snapshot, when something changed; a function of which nothing is
left is deleted from the table. Read by ``thaw get functions``. At most :data:`PER_FUNCTION_HZ` records per second and function, and one
record per step, so that a thousand changing functions do not delay a decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgpack
import msgspec

from scaler.demand import STATE_TOPIC
from scaler.edges.publisher import Outgoing, Publisher
from scaler.levels import NS
from scaler.planner import Planner
from scaler.snapshots import FunctionSnapshot

PER_FUNCTION_HZ = 5


def decode(value: bytes) -> FunctionSnapshot:
    """A snapshot from a record's value.

    Raises:
        ValueError: it is not one.
    """
    try:
        return msgspec.msgpack.decode(value, type=FunctionSnapshot)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a function's state: {error}") from error


class StateFeed:
    """Remembers what it published last."""

    def __init__(self, planner: Planner, publisher: Publisher) -> None:
        self._planner = planner
        self._publisher = publisher
        self._waiting: dict[str, None] = {}
        #: function → (when, what)
        self._last: dict[str, tuple[int, bytes]] = {}

    def touched(self, names: Iterable[str]) -> None:
        """The planner says something new of these functions."""
        for name in names:
            self._waiting[name] = None

    def publish(self, now_ns: int) -> Iterator[None]:
        """Publish what has changed and may be published again, one function at a time."""
        for name in list(self._waiting):
            at_ns, last = self._last.get(name, (0, b""))
            if now_ns - at_ns < NS // PER_FUNCTION_HZ:
                continue
            del self._waiting[name]
            snapshot = self._planner.explain(name)
            if snapshot is None:
                self._last.pop(name, None)
                self._publisher.publish(Outgoing(topic=STATE_TOPIC, key=name.encode(), value=None, newest=True))
            else:
                value = msgpack.packb(msgspec.to_builtins(snapshot))
                if value == last:
                    continue
                self._last[name] = (now_ns, value)
                self._publisher.publish(Outgoing(topic=STATE_TOPIC, key=name.encode(), value=value, newest=True))
            yield
