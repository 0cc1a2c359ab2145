"""Who can answer now: the instances that agents report, and the requests that wait for one.

In: endpoint reports from :mod:`loadgen.watch`. Out: free slots for :mod:`loadgen.driver`, in the order in which
requests asked, on the least loaded instance. An instance takes no more requests at once than its function's
``limits.concurrency``.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from agent.api.messages import Endpoint

#: An instance that failed a request is left alone this long, s; doubles with each failure up to the second value.
SUSPECT_S = (0.05, 2.0)
#: Requests on an instance that is gone may still be answered for this long, s; then they go elsewhere. On one that its agent takes
#: down in order it begins when the agent waits no longer for them.
DOWN_GRACE_S = 1.0


@dataclass(eq=False)
class Instance:
    """One instance as the load generator sees it.

    Attributes:
        endpoint: what its agent reported.
        known_ns: when it was first heard of.
        busy: requests on it now.
        failures: failed requests in a row.
        suspect_until: event loop time before which it gets no request.
        attempts: time limits of the requests on it now.
    """

    endpoint: Endpoint
    known_ns: int
    busy: int = 0
    failures: int = 0
    suspect_until: float = 0.0
    attempts: set[asyncio.Timeout] = field(default_factory=set)


class EndpointPool:
    """Instances by function, and who waits for them."""

    def __init__(self, concurrency: Mapping[str, int], now_ns: Callable[[], int], *, suspect_s: tuple[float, float] = SUSPECT_S) -> None:
        self._concurrency = concurrency
        self._suspect_s = suspect_s
        self._now_ns = now_ns
        self._instances: dict[str, dict[str, Instance]] = collections.defaultdict(dict)
        #: By agent: taken down, and may still answer.
        self._draining: dict[str, dict[tuple[str, str], Instance]] = collections.defaultdict(dict)
        self._by_agent: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
        self._waiting: dict[str, collections.deque[asyncio.Future[Instance]]] = collections.defaultdict(collections.deque)

    # What agents report

    def replace(self, agent: str, endpoints: Iterable[Endpoint]) -> None:
        """Take the full list of one agent: what it does not name any more is gone."""
        now = {(endpoint.function, endpoint.instance): endpoint for endpoint in endpoints}
        for function, instance in self._by_agent[agent] - now.keys():
            self.down(agent, function, instance)
        for endpoint in now.values():
            self.up(agent, endpoint)

    def up(self, agent: str, endpoint: Endpoint) -> None:
        """An instance answers."""
        self._by_agent[agent].add((endpoint.function, endpoint.instance))
        known = self._instances[endpoint.function].get(endpoint.instance)
        if known is None or known.endpoint.address != endpoint.address:
            self._instances[endpoint.function][endpoint.instance] = Instance(endpoint, self._now_ns())
        self._hand_out(endpoint.function)

    def down(self, agent: str, function: str, instance: str, drain_s: float = 0.0) -> None:
        """An instance must get no new requests.

        Args:
            agent: whose it is.
            function, instance: which.
            drain_s: its agent waits so long for the requests that run there; 0: it is gone.
        """
        key = function, instance
        self._by_agent[agent].discard(key)
        going = self._instances[function].pop(instance, None) or self._draining[agent].pop(key, None)
        if going is None:
            return
        if drain_s > 0:
            self._draining[agent][key] = going
        _limit(going, drain_s + DOWN_GRACE_S)

    def lost(self, agent: str) -> None:
        """Nothing is heard of an agent: nobody would tell when an instance that it takes down is gone."""
        for going in self._draining.pop(agent, {}).values():
            _limit(going, DOWN_GRACE_S)

    # What the driver asks

    def instances(self, function: str) -> int:
        """How many instances of a function are known."""
        return len(self._instances[function])

    async def acquire(self, function: str) -> Instance:
        """Wait for a free slot of the function; give it back with :meth:`release` or :meth:`fail`."""
        turn: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        self._waiting[function].append(turn)
        self._hand_out(function)  # at once, when it is this request's turn and a slot is free
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            raise

    def release(self, instance: Instance) -> None:
        """The request was answered."""
        instance.failures = 0
        self._give_back(instance)

    def fail(self, instance: Instance) -> None:
        """The request failed: others are preferred for a while, this one is tried again later."""
        first, most = self._suspect_s
        pause = min(most, first * 2**instance.failures)
        instance.failures = min(instance.failures + 1, 16)
        loop = asyncio.get_running_loop()
        instance.suspect_until = loop.time() + pause
        loop.call_later(pause, self._hand_out, instance.endpoint.function)
        self._give_back(instance)

    def _give_back(self, instance: Instance) -> None:
        instance.busy -= 1
        self._hand_out(instance.endpoint.function)

    def _free(self, function: str) -> Instance | None:
        time = asyncio.get_running_loop().time()
        limit = self._concurrency[function]
        free = [instance for instance in self._instances[function].values() if instance.busy < limit and instance.suspect_until <= time]
        return min(free, key=lambda instance: instance.busy, default=None)

    def _hand_out(self, function: str) -> None:
        waiting = self._waiting[function]
        while waiting:
            if waiting[0].done():  # its request gave up
                waiting.popleft()
                continue
            instance = self._free(function)
            if instance is None:
                return
            instance.busy += 1
            waiting.popleft().set_result(instance)


def _limit(instance: Instance, left_s: float) -> None:
    """Give up the requests on an instance after a time: a sandbox can vanish without a word to those connected to it."""
    limit = asyncio.get_running_loop().time() + left_s
    for attempt in instance.attempts:
        if (when := attempt.when()) is None or when > limit:
            attempt.reschedule(limit)
