"""Which node gets a start.

In: what the planner knows of its nodes (from their inventories and reports). Out: the name of one, or none. Used by
:mod:`scaler.instances` and :mod:`scaler.checkpoints`.

The score is an estimate of the start's delay in ms, from the prototype's figures (FACTS, "where a restore's time goes"
and "fan-out"): 10 ms from the node's cache, about 60 ms more when the image has to come over the network, 10 ms for
each start ahead of it on that node. A node that failed lately or whose memory looks full is chosen only when the others
are worse. The agent has the last word: it refuses what it has no room for.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

START_AHEAD_MS = 10
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
    #: Ids of starts sent and not answered.
    starts: dict[str, None] = field(default_factory=dict)
    #: Its instances: id → function name.
    instances: dict[str, str] = field(default_factory=dict)
    #: A start failed there; other nodes are preferred until then.
    failed_until_ns: int = 0


def choose(nodes: Iterable[Node], *, memory_mb: int, cached: Container[str], avoid: Container[str], now_ns: int) -> Node | None:
    """The node on which a start is expected to answer first.

    Args:
        nodes: all known nodes, in a fixed order.
        memory_mb: the function's limit.
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
        delay_ms = START_AHEAD_MS * len(node.starts)
        if node.name not in cached:
            delay_ms += IMAGE_AWAY_MS
        if node.failed_until_ns > now_ns:
            delay_ms += FAILED_LATELY_MS
        if node.memory_free_mb < memory_mb:
            delay_ms += MEMORY_FULL_MS
        score = (delay_ms, -node.memory_free_mb, node.name)
        if best_score is None or score < best_score:
            best, best_score = node, score
    return best
