"""Which node gets a start, and which one a standby.

In: what the planner knows of its nodes (from their inventories and reports). Out: the name of one, or none. Used by
:mod:`scaler.instances`, :mod:`scaler.standbys` and :mod:`scaler.checkpoints`.

A start goes where it is expected to answer first. The score is an estimate of its delay in ms, from the prototype's
figures (DESIGN, "the ladder"; FACTS, "fan-out"): 2 ms from a standby, 10 ms from the node's cache, about 60 ms more when
the image has to come over the network, and the starts ahead of it on that node. A node that failed lately or whose
memory looks full is chosen only when the others are worse. The agent has the last word: it refuses what it has no room
for.

Standbys are spread: a lost node takes as few of a function's standbys with it as possible, and a burst is thawed by as
many processors as there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

THAW_MS = 2
RESTORE_MS = 10
IMAGE_AWAY_MS = 60
FAILED_LATELY_MS = 1_000
MEMORY_FULL_MS = 2_000


@dataclass(slots=True)
class Node:
    """One node as the planner sees it."""

    name: str
    #: Its stream is open and its inventory known.
    up: bool = False
    memory_mb: int = 0
    #: From the last inventory, less what was started since.
    memory_free_mb: int = 0
    #: Of that: command or instance → MB, given back as it was taken.
    booked: dict[str, int] = field(default_factory=dict)
    #: Starts sent and not answered: id → ms that it is expected to take; and their sum.
    starts: dict[str, int] = field(default_factory=dict)
    ahead_ms: int = 0
    #: Its instances: id → function name.
    instances: dict[str, str] = field(default_factory=dict)
    #: Its standbys: name → function name.
    standbys: dict[str, str] = field(default_factory=dict)
    #: A start failed there; other nodes are preferred until then.
    failed_until_ns: int = 0

    def book(self, name: str, memory_mb: int) -> None:
        """A start was sent, or an instance is there that no start was known of."""
        self.booked[name] = memory_mb
        self.memory_free_mb -= memory_mb

    def unbook(self, name: str) -> None:
        """It came to nothing, or has ended."""
        self.memory_free_mb = min(self.memory_mb, self.memory_free_mb + self.booked.pop(name, 0))

    def begin(self, command_id: str, expected_ms: int) -> None:
        """A start was sent to it."""
        self.starts[command_id] = expected_ms
        self.ahead_ms += expected_ms

    def end(self, command_id: str) -> None:
        """A start was answered, or is not waited for any more."""
        self.ahead_ms -= self.starts.pop(command_id, 0)


def choose(
    nodes: Iterable[Node], *, memory_mb: int, standby: Container[str], cached: Container[str], avoid: Container[str], now_ns: int
) -> Node | None:
    """The node on which a start is expected to answer first.

    Args:
        nodes: all known nodes, in a fixed order.
        memory_mb: the function's limit.
        standby: names of nodes that hold a standby of it that no other start counts on.
        cached: names of nodes that hold its image.
        avoid: names of nodes that have just refused it.
        now_ns: the time.

    Returns:
        None when no node is up that has not just refused.
    """
    best: Node | None = None
    best_score: tuple[int, int, str] | None = None
    for node in nodes:
        if not node.up or node.name in avoid:
            continue
        delay_ms = node.ahead_ms
        if node.name in standby:
            delay_ms += THAW_MS
        elif node.name in cached:
            delay_ms += RESTORE_MS
        else:
            delay_ms += RESTORE_MS + IMAGE_AWAY_MS
        if node.failed_until_ns > now_ns:
            delay_ms += FAILED_LATELY_MS
        if node.memory_free_mb < memory_mb:
            delay_ms += MEMORY_FULL_MS
        score = (delay_ms, -node.memory_free_mb, node.name)
        if best_score is None or score < best_score:
            best, best_score = node, score
    return best


def spread(nodes: Iterable[Node], *, memory_mb: int, held: Mapping[str, int], avoid: Container[str]) -> Node | None:
    """The node for one more standby: the one with the fewest of the function, then the one with the most free memory.

    Args:
        nodes: those that may make one, in a fixed order.
        memory_mb: the function's limit. A standby takes far less, but where it could not run it is of no use.
        held: standbys of the function by node, including those on their way.
        avoid: names of nodes that have just refused one.

    Returns:
        None when no node is up that has room and has not just refused.
    """
    fit = [node for node in nodes if node.up and node.name not in avoid and node.memory_free_mb >= memory_mb]
    return min(fit, key=lambda node: (held.get(node.name, 0), -node.memory_free_mb, node.name), default=None)
