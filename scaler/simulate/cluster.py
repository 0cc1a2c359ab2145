"""A whole installation: the shipped planner decides for all functions at once, on nodes whose memory is limited.

In: a :class:`~scaler.simulate.model.Trace`, costs and the nodes. Out: :class:`~scaler.simulate.run.PolicyResult` s, for ``thaw
simulate --nodes``. :class:`scaler.planner.Planner` is driven through its events under a virtual clock, with ticks as often as
the live service makes them; nodes are those of :mod:`scaler.simulate.nodes`. Pure and deterministic.

One source per function reports a level with each begin and end of a request. A request takes the free instance that has
served longest at once, or waits; those that wait are served in order of arrival by whichever instance is free first. All
functions are applied when the trace begins, and the nodes fetch the images then, so that a start from the store is rare.
At one instant nodes and requests come first, then ticks, then arrivals.

Policies are documents: ``thaw`` gives no ``idleSeconds``, so that the forecast decides; a keep-alive gives them, in the
classic world without checkpoints or with them.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from agent.api.function import Function, FunctionSpec, Instances, Limits, Metadata, Policy
from scaler.commands import NodeCommand
from scaler.demand import DemandEvent
from scaler.errors import InstallationTooSmall, SimulationBroken, UnknownPolicy
from scaler.events import DemandSeen, Event, FunctionApplied, NodeReport, PlannerReport, ShardGained, ShardReady, Tick
from scaler.ladder import Rung
from scaler.levels import NS
from scaler.planner import Planner
from scaler.simulate.model import FunctionTrace, Outcome, StartMode, Trace, World
from scaler.simulate.nodes import Deployed, SimulatedInstance, SimulatedNode
from scaler.simulate.run import PolicyResult, summarise

#: ``scaler.tick_s`` of the live service.
TICK_NS = NS // 10
#: A source is silent for as long as its level does not change.
_TTL_S = 86_400.0
_INSTANCES_MAX = 10_000
#: Longest wait for a request to be served after the trace's end.
_PATIENCE_NS = 24 * 3600 * NS
#: After the last request the installation is looked at when all that idles by the document is gone, and this much later.
_REST_S = 10.0
#: One demand event in so many is timed.
_TIMED = 8


@dataclass(frozen=True)
class Documents:
    """What a policy writes into each function's document.

    Attributes:
        idle_s: ``policy.idleSeconds``; None: the forecast decides.
        rungs: checkpoints are used.
    """

    idle_s: float | None
    rungs: bool


POLICIES: dict[str, Documents] = {
    "thaw": Documents(None, True),
    **{f"keep-alive-{minutes}m": Documents(60.0 * minutes, False) for minutes in (1, 10, 60)},
    **{f"keep-alive-{minutes}m+rungs": Documents(60.0 * minutes, True) for minutes in (1, 10, 60)},
    "cached": Documents(0.0, True),
}


@dataclass(frozen=True)
class Nodes:
    """The installation.

    Attributes:
        count: nodes.
        memory_mb: for instances and standbys, on each.
    """

    count: int
    memory_mb: int


def run(
    trace: Trace,
    names: list[str],
    nodes: Nodes,
    *,
    delay_weight: float = 1.0,
    world: World | None = None,
    clock: Callable[[], int] | None = None,
) -> Iterator[PolicyResult]:
    """The results of the policies, one by one. See :func:`scaler.simulate.run.run`.

    Args:
        trace: the requests.
        names: of :data:`POLICIES`; ``all`` is all of them.
        nodes: the installation.
        delay_weight: price of a second of delay, also in the documents.
        world: costs of starts and rungs.
        clock: ns; for the time that the planner takes per event.

    Raises:
        UnknownPolicy: a name is not known.
        InstallationTooSmall: a function fits on no node.
        SimulationBroken: the installation did what none may.
    """
    chosen = list(POLICIES) if "all" in names else names
    for name in chosen:
        if name not in POLICIES:
            raise UnknownPolicy(f"there is no policy {name} with --nodes; there are all, {', '.join(POLICIES)}")
    largest = max(trace.functions, key=lambda function: function.memory_mb, default=None)
    if largest is not None and _limit_mb(largest) > nodes.memory_mb:
        raise InstallationTooSmall(f"an instance of {largest.name} has {_limit_mb(largest)} MB, a node {nodes.memory_mb} MB")
    for name in chosen:
        documents = POLICIES[name]
        here = replace(world or World(), rungs=documents.rungs)
        yield _Installation(trace, documents, nodes, here, delay_weight, clock).play(name)


def _limit_mb(function: FunctionTrace) -> int:
    return max(4, math.ceil(function.memory_mb))


class _Function:
    """One function: its document, its requests, and what came of them."""

    def __init__(self, trace: FunctionTrace, documents: Documents, world: World, delay_weight: float, span_s: float) -> None:
        policy = Policy(idle_seconds=documents.idle_s, delay_weight=delay_weight, checkpoint="auto" if documents.rungs else "off")
        self.document = Function(
            metadata=Metadata(name=trace.name),
            spec=FunctionSpec(
                command=["simulated"],
                port=1,
                limits=Limits(memory_mb=_limit_mb(trace)),
                instances=Instances(max=_INSTANCES_MAX),
                policy=policy,
            ),
        )
        self.digest = self.document.digest
        self.costs = world.costs(trace.memory_mb)
        self.duration_ns: list[int] = np.rint(trace.duration_s * NS).astype(np.int64).tolist()
        self._drawn = world.drawn(trace)
        self._world = world
        self._span_s = span_s
        self.newest = -1
        self.level = self.seq = 0
        self.waiting: deque[tuple[int, int]] = deque()
        #: Those that wait for a request, and some that did: by number.
        self.idle: list[tuple[int, SimulatedInstance]] = []
        self.outcome = Outcome(np.zeros(len(trace.at_s)))
        self.served = 0

    def takes_ns(self, mode: StartMode) -> int:
        """See :class:`scaler.simulate.nodes.Deployed`. The luck is that of the newest request."""
        if self.newest < 0:
            world = self._world
            return int((0.0, world.thaw_s, world.restore_s, world.remote_s, world.cold_s)[mode] * NS)
        return int(self._drawn[mode][self.newest] * NS)

    def met(self, number: int, mode: StartMode, delay_ns: int) -> None:
        """A request has its instance."""
        self.outcome.starts[mode] += 1
        self.outcome.delays_s[number] = delay_ns / NS
        self.served += 1

    def wasted(self, rung: Rung, since_ns: int, until_ns: int) -> None:
        """Memory was held for nothing."""
        until_s, half_s = min(until_ns / NS, self._span_s), self._span_s / 2
        memory_mb = self.costs.memory_mb[rung]
        self.outcome.wasted_mb_s[rung] += max(0.0, until_s - since_ns / NS) * memory_mb
        self.outcome.wasted_second_half_mb_s += max(0.0, until_s - max(half_s, since_ns / NS)) * memory_mb


class _Installation:
    """One run of one policy."""

    def __init__(
        self, trace: Trace, documents: Documents, nodes: Nodes, world: World, delay_weight: float, clock: Callable[[], int] | None
    ) -> None:
        self._trace = trace
        self._documents = documents
        self._delay_weight = delay_weight
        self._clock = clock
        self._planner = Planner("simulated", lambda name: 0)
        self._functions = {item.name: _Function(item, documents, world, delay_weight, trace.span_s) for item in trace.functions}
        self._nodes = {name: SimulatedNode(name, nodes.memory_mb, self) for name in (f"node-{index + 1}" for index in range(nodes.count))}
        self._events: list[tuple[int, int, Callable[[int], None]]] = []
        self._pushed = 0
        self._number = 0
        self._demands = 0

    def play(self, name: str) -> PolicyResult:
        """Plays the whole trace, and looks at what is left."""
        self._open()
        arrivals = self._arrivals()
        self._arrive(arrivals)
        requests = len(arrivals)
        give_up_ns = int(self._trace.span_s * NS) + _PATIENCE_NS
        while sum(function.served for function in self._functions.values()) < requests:
            self._pass(self._next_ns(give_up_ns, "requests are not served"))
        while any(function.level for function in self._functions.values()):
            self._pass(self._next_ns(give_up_ns, "requests do not end"))
        rest_ns = int(((self._documents.idle_s or 0.0) + _REST_S) * NS)
        now_ns = max(int(self._trace.span_s * NS), self._now_ns) + rest_ns
        self._pass(now_ns)
        self._check()
        for node in self._nodes.values():
            node.close(now_ns)
        return self._result(name)

    # What the nodes see.

    def at(self, due_ns: int, what: Callable[[int], None]) -> None:
        """See :class:`scaler.simulate.nodes.Surroundings`."""
        self._pushed += 1
        heapq.heappush(self._events, (due_ns, self._pushed, what))

    def report(self, node: str, report: PlannerReport, now_ns: int) -> None:
        """See :class:`scaler.simulate.nodes.Surroundings`."""
        self.at(now_ns, lambda due_ns: self._tell(NodeReport(node=node, report=report), due_ns))

    def serves(self, instance: SimulatedInstance, now_ns: int) -> None:
        """See :class:`scaler.simulate.nodes.Surroundings`."""
        self._number += 1
        instance.number = self._number
        function = self._functions[instance.function.document.name]
        if not function.waiting:
            function.outcome.moves_up += 1
        self._next_request(function, instance, now_ns)

    def retired(self, instance: SimulatedInstance, now_ns: int) -> None:
        """See :class:`scaler.simulate.nodes.Surroundings`."""
        self.held(instance.function, Rung.RUNNING, instance.idle_ns, now_ns)
        instance.idle_ns = -1

    def held(self, function: Deployed, rung: Rung, since_ns: int, now_ns: int) -> None:
        """See :class:`scaler.simulate.nodes.Surroundings`."""
        self._functions[function.document.name].wasted(rung, since_ns, now_ns)

    def deployed(self, name: str) -> Deployed:
        """See :class:`scaler.simulate.nodes.Surroundings`."""
        return self._functions[name]

    # Time.

    def _open(self) -> None:
        """Nodes connect and functions are applied."""
        self._now_ns = 0
        self._tell(ShardGained(shard=0, epoch=1), 0)
        self._tell(ShardReady(shard=0), 0)
        for node in self._nodes.values():
            self._tell(NodeReport(node=node.name, report=node.inventory(), connected=True), 0)
        for function in self._functions.values():
            self._tell(FunctionApplied(function=function.document), 0)

    def _arrivals(self) -> list[tuple[int, int, _Function]]:
        """Time, number and function of every request, in order."""
        arrivals: list[tuple[int, int, int]] = []
        functions = list(self._functions.values())
        for index, item in enumerate(self._trace.functions):
            arrivals += ((at_ns, index, number) for number, at_ns in enumerate(np.rint(item.at_s * NS).astype(np.int64).tolist()))
        arrivals.sort()
        return [(at_ns, number, functions[index]) for at_ns, index, number in arrivals]

    def _arrive(self, arrivals: list[tuple[int, int, _Function]]) -> None:
        for at_ns, number, function in arrivals:
            self._pass(at_ns)
            function.newest = number
            function.level += 1
            instance = self._free(function)
            if instance is None:
                function.waiting.append((number, at_ns))
            else:
                function.wasted(Rung.RUNNING, instance.idle_ns, at_ns)
                self._take(function, instance, number, StartMode.WARM, at_ns, at_ns)
            self._demand(function, at_ns)

    def _pass(self, until_ns: int) -> None:
        """All that happens up to ``until_ns``."""
        events, planner = self._events, self._planner
        while True:
            due_ns = planner.next_due_ns
            tick_ns = -(-due_ns // TICK_NS) * TICK_NS if due_ns is not None else until_ns + 1
            if events and events[0][0] <= until_ns and events[0][0] <= tick_ns:
                self._now_ns, _, what = heapq.heappop(events)
                what(self._now_ns)
            elif tick_ns <= until_ns:
                # Never back: something may have become due while the tick before it was handled.
                self._now_ns = max(self._now_ns, tick_ns)
                self._tell(Tick(), self._now_ns)
            else:
                self._now_ns = until_ns
                return

    def _next_ns(self, give_up_ns: int, problem: str) -> int:
        """A time up to which something happens."""
        if self._now_ns > give_up_ns or (not self._events and self._planner.next_due_ns is None):
            raise SimulationBroken(f"{self._now_ns / NS:.0f} s after the begin {problem} and nothing is on its way to that")
        return self._now_ns + NS

    # Requests.

    def _free(self, function: _Function) -> SimulatedInstance | None:
        while function.idle:
            _, instance = heapq.heappop(function.idle)
            if instance.idle_ns >= 0:
                return instance
        return None

    def _take(self, function: _Function, instance: SimulatedInstance, number: int, mode: StartMode, arrived_ns: int, now_ns: int) -> None:
        instance.busy, instance.idle_ns = True, -1
        function.met(number, mode, now_ns - arrived_ns)
        self.at(now_ns + function.duration_ns[number], lambda due_ns: self._served(function, instance, due_ns))

    def _served(self, function: _Function, instance: SimulatedInstance, now_ns: int) -> None:
        function.level -= 1
        instance.busy = False
        if instance.release:
            instance.node.ended(instance, now_ns)
        else:
            self._next_request(function, instance, now_ns)
        self._demand(function, now_ns)

    def _next_request(self, function: _Function, instance: SimulatedInstance, now_ns: int) -> None:
        if function.waiting:
            number, arrived_ns = function.waiting.popleft()
            self._take(function, instance, number, instance.mode, arrived_ns, now_ns)
        else:
            instance.idle_ns = now_ns
            heapq.heappush(function.idle, (instance.number, instance))

    # The planner.

    def _demand(self, function: _Function, now_ns: int) -> None:
        function.seq += 1
        event = DemandEvent(
            function=function.document.metadata.name,
            source="trace",
            epoch=1,
            seq=function.seq,
            at=now_ns,
            in_flight=function.level,
            ttl=_TTL_S,
        )
        seen = DemandSeen(event=event, shard=0, seen_ns=now_ns)
        self._demands += 1
        if self._clock is None or self._demands % _TIMED:
            self._tell(seen, now_ns)
            return
        begin_ns = self._clock()
        commands = self._planner.handle(seen, now_ns)
        function.outcome.handle_ns.append(self._clock() - begin_ns)
        self._carry_out(commands, now_ns)

    def _tell(self, event: Event, now_ns: int) -> None:
        self._carry_out(self._planner.handle(event, now_ns), now_ns)

    def _carry_out(self, commands: list[NodeCommand], now_ns: int) -> None:
        for command in commands:
            self._nodes[command.node].carry_out(command.message, now_ns)

    # The end.

    def _check(self) -> None:
        """Nothing runs that the planner does not want.

        Raises:
            SimulationBroken: something does.
        """
        for name, function in self._functions.items():
            known = self._planner.explain(name)
            assert known is not None
            running = [item.id for node in self._nodes.values() for item in node.instances.values() if item.function is function]
            standbys = sum(len(node.standbys.get(name, ())) for node in self._nodes.values())
            if sorted(running) != sorted(item.instance for item in known.instances):
                raise SimulationBroken(f"{name} runs as {running}, and the planner knows {known.instances}")
            if len(running) > known.wanted or standbys > known.standbys_wanted:
                wanted = f"the planner wants {known.wanted} and {known.standbys_wanted}"
                raise SimulationBroken(f"{name} has {len(running)} instances and {standbys} standbys at the end; {wanted}")

    def _result(self, name: str) -> PolicyResult:
        outcomes = [self._functions[item.name].outcome for item in self._trace.functions]
        result = summarise(name, self._documents.rungs, self._trace, outcomes, self._delay_weight)
        nodes = self._nodes.values()
        result.summary["refusals"] = sum(node.refusals for node in nodes)
        result.summary["starts_by_node"] = {node.name: node.starts for node in nodes}
        result.summary["prepares"] = sum(node.prepares for node in nodes)
        result.summary["peak_memory_mb"] = {node.name: round(node.peak_mb, 1) for node in nodes}
        result.summary["released_while_serving"] = sum(node.cut for node in nodes)
        return result
