"""Which node gets a start, and which one a standby.

In: what the planner knows of its nodes (from their inventories and reports). Out: the name of one, or none. Used by
:mod:`scaler.instances`, :mod:`scaler.standbys` and :mod:`scaler.checkpoints`.

A start goes where it is expected to answer first: the function's measured start delay from what the node holds of it
(:mod:`scaler.costs`; a standby, its image, or nothing), times how slow this node has been, and the starts ahead of it
there. A node that failed lately or whose memory looks full is chosen only when the others are worse. The agent has the
last word: it refuses what it has no room for, or cannot restore with its kernel or processor.

Standbys are spread: a lost node takes as few of a function's standbys with it as possible, and a burst is thawed by as
many processors as there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from scaler.ladder import Rung, RungCosts

FAILED_LATELY_S = 1.0
MEMORY_FULL_S = 2.0
#: Share of a new measurement in a node's slowness, and its bounds: one start may wait for what has nothing to do with the node.
_NEW, _FASTEST, _SLOWEST = 0.1, 0.25, 8.0


@dataclass(slots=True)
class Node:
    """One node as the planner sees it."""

    name: str
    #: Its stream is open and its inventory known.
    up: bool = False
    #: Changes each time that it connects.
    connection: int = 0
    memory_mb: int = 0
    #: From the last inventory, less what was started since.
    memory_free_mb: int = 0
    #: Of that: command or instance → MB, given back as it was taken.
    booked: dict[str, int] = field(default_factory=dict)
    #: Starts sent and not answered: id → s that it is expected to take; and their sum.
    starts: dict[str, float] = field(default_factory=dict)
    ahead_s: float = 0.0
    #: How many times as long its starts take as those of the same functions elsewhere.
    slowness: float = 1.0
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

    def begin(self, command_id: str, expected_s: float) -> None:
        """A start was sent to it."""
        self.starts[command_id] = expected_s
        self.ahead_s += expected_s

    def end(self, command_id: str) -> None:
        """A start was answered, or is not waited for any more."""
        self.ahead_s -= self.starts.pop(command_id, 0.0)
        if not self.starts:
            self.ahead_s = 0.0

    def took(self, measured_s: float, expected_s: float) -> None:
        """A start there was measured, which takes ``expected_s`` on the average node."""
        if expected_s > 0:
            ratio = min(max(measured_s / expected_s, _FASTEST), _SLOWEST)
            self.slowness += _NEW * (ratio - self.slowness)


def choose(
    nodes: Iterable[Node],
    *,
    memory_mb: int,
    costs: RungCosts,
    standby: Container[str],
    cached: Container[str],
    avoid: Container[str],
    possible: Container[str] | None = None,
    now_ns: int,
) -> Node | None:
    """The node on which a start is expected to answer first.

    Args:
        nodes: all known nodes, in a fixed order.
        memory_mb: the function's limit.
        costs: of starting it.
        standby: names of nodes that hold a standby of it that no other start counts on.
        cached: names of nodes that hold its image.
        avoid: names of nodes that have just refused it.
        possible: names of nodes that have a sandbox for it, beside those that hold a standby; None: all.
        now_ns: the time.

    Returns:
        None when no node is up that has a sandbox and has not just refused.
    """
    best: Node | None = None
    best_score: tuple[float, int, str] | None = None
    for node in nodes:
        if not node.up or node.name in avoid:
            continue
        if possible is not None and node.name not in possible and node.name not in standby:
            continue
        rung = Rung.STANDBY if node.name in standby else Rung.CACHED if node.name in cached else Rung.STORED
        delay_s = (node.ahead_s + costs.delay_s[rung]) * node.slowness
        if node.failed_until_ns > now_ns:
            delay_s += FAILED_LATELY_S
        if node.memory_free_mb < memory_mb:
            delay_s += MEMORY_FULL_S
        score = (round(delay_s, 6), -node.memory_free_mb, node.name)
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
