"""Functions with nothing going on are packed: the planner remembers them for a tenth of the memory.

In: states of functions (:mod:`scaler.state`). Out: :class:`Functions`, by name, as :mod:`scaler.world` holds them. Pure.

A function sleeps when it has no live source of demand, no instance, no standby, no start and no command under way, and its
forecast holds it no higher than in the cache. It wakes when it is looked at; a pre-thaw that its forecast has planned stays in
the planner's timers and wakes it by name. What is packed is msgpack of plain values; the document, which never changes while
the function sleeps, is deflated with a typical one as dictionary, once.

While a function sleeps it is not told of nodes that come and go or of a shard that changes hands. So it packs what these
were: on waking, what it knew of a node that has connected anew since is dropped and asked again, and so is its forecast when
its shard was with another scaler meanwhile, which saw the demand that this one did not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from agent.api.function import Function, FunctionSpec, Metadata, RootFile
from scaler.costs import Means
from scaler.forecast.function import FunctionForecast
from scaler.forecast.slot import ForecastConfig
from scaler.holding import Holding
from scaler.ladder import RungCosts
from scaler.placement import Node
from scaler.state import FunctionState

#: Given a state with its document, what its forecast is priced with: :func:`scaler.forecasts.terms`.
Terms = Callable[[FunctionState], tuple[ForecastConfig, RungCosts]]


class Functions:
    """The functions by name, awake or asleep.

    Args:
        nodes: the planner's nodes.
        epoch_of: the epoch in which a shard is owned; 0: it is not.
    """

    def __init__(self, nodes: dict[str, Node], epoch_of: Callable[[int], int]) -> None:
        self._nodes = nodes
        self._epoch_of = epoch_of
        self._awake: dict[str, FunctionState] = {}
        self._asleep: dict[str, bytes] = {}
        #: Looked at since :meth:`rest`; and of these the ones that slept.
        self._seen: dict[str, None] = {}
        self._woken: dict[str, None] = {}
        #: Set by the planner: the costs are not known here.
        self.terms: Terms | None = None

    def get(self, name: str) -> FunctionState | None:
        """The function of that name, awake."""
        state = self._awake.get(name)
        if state is None:
            packed = self._asleep.pop(name, None)
            if packed is None:
                return None
            state = self._awake[name] = self._wake(name, packed)
            self._woken[name] = None
        self._seen[name] = None
        return state

    def __getitem__(self, name: str) -> FunctionState:
        state = self.get(name)
        if state is None:
            raise KeyError(name)
        return state

    def add(self, state: FunctionState) -> None:
        """Take in a new one."""
        self._awake[state.name] = state
        self._seen[state.name] = None

    def remove(self, name: str) -> None:
        """Forget one that is awake."""
        del self._awake[name]

    def if_awake(self, name: str) -> FunctionState | None:
        """The function of that name, unless it sleeps."""
        state = self._awake.get(name)
        if state is not None:
            self._seen[name] = None
        return state

    def awake(self) -> list[FunctionState]:
        """Those that are awake: all with anything going on."""
        return list(self._awake.values())

    @property
    def asleep(self) -> int:
        """How many sleep."""
        return len(self._asleep)

    @property
    def packed_bytes(self) -> int:
        """What is stored of those that sleep; their names and the entries of dictionaries come to it."""
        return sum(map(len, self._asleep.values()))

    def __iter__(self) -> Iterator[str]:
        yield from self._awake
        yield from self._asleep

    def drain_woken(self) -> list[FunctionState]:
        """Those that have been woken since the last call."""
        if not self._woken:
            return []
        woken, self._woken = self._woken, {}
        return [state for name in woken if (state := self._awake.get(name)) is not None]

    def rest(self) -> None:
        """Let those sleep that were looked at and have nothing going on."""
        seen, self._seen = self._seen, {}
        for name in seen:
            state = self._awake.get(name)
            if state is not None and state.resting and (epoch := self._epoch_of(state.shard)):
                self._asleep[name] = pack(state, epoch, self._connections(state))
                del self._awake[name]

    def _connections(self, state: FunctionState) -> dict[str, int]:
        """The nodes that hold its image or were asked for it, as they are connected now; negative: asked only."""
        checkpoint, result = state.checkpoint, {}
        for name in (*checkpoint.cached, *checkpoint.asked):
            if (node := self._nodes.get(name)) is not None:
                result[name] = node.connection if name in checkpoint.cached else -node.connection
        return result

    def _wake(self, name: str, packed: bytes) -> FunctionState:
        assert self.terms is not None
        state, epoch, connections = unpack(name, packed, self.terms)
        for node_name, connection in connections.items():
            node = self._nodes.get(node_name)
            if node is not None and node.connection == abs(connection):
                state.checkpoint.asked[node_name] = None
                if connection > 0:
                    state.checkpoint.cached[node_name] = None
        if epoch != self._epoch_of(state.shard):
            state.holding = state.forecast = None
        return state


def pack(state: FunctionState, epoch: int, connections: dict[str, int]) -> bytes:
    """A resting function, the epoch of its shard and the connections of nodes that it knows of, as bytes."""
    assert state.function is not None
    if not state.packed_document:
        state.packed_document = _deflate(msgspec.msgpack.encode(state.function))
    checkpoint = state.checkpoint
    values = [
        epoch,
        connections,
        state.shard,
        state.packed_document,
        bytes.fromhex(state.digest),
        [state.failures, state.retry_ns, state.standbys.failures, state.standbys.retry_ns],
        [checkpoint.id, checkpoint.checked, checkpoint.image_mb, checkpoint.cold_on, checkpoint.given_up],
        [checkpoint.failures, checkpoint.retry_ns, checkpoint.fetch_failures, checkpoint.fetch_retry_ns],
        list(state.measured.of.items()),
        [state.last_start_ms, state.last_start_mode, state.last_error],
        state.placeholders,
    ]
    if state.holding is not None and state.forecast is not None:
        values += [state.holding.pack(), state.forecast.pack()]
    return msgspec.msgpack.encode(values)


def unpack(name: str, packed: bytes, terms: Terms) -> tuple[FunctionState, int, dict[str, int]]:
    """What :func:`pack` packed, of the function of that name."""
    values: list[Any] = msgspec.msgpack.decode(packed)
    epoch, connections, shard, document, digest, attempts, image, image_attempts, measured, last, placeholders, *forecast = values
    state = FunctionState(name, shard)
    state.take(_DECODER.decode(_inflate(document)), digest.hex())
    state.packed_document = document
    state.failures, state.retry_ns, state.standbys.failures, state.standbys.retry_ns = attempts
    checkpoint = state.checkpoint
    checkpoint.id, checkpoint.checked, checkpoint.image_mb, checkpoint.cold_on, checkpoint.given_up = image
    checkpoint.failures, checkpoint.retry_ns, checkpoint.fetch_failures, checkpoint.fetch_retry_ns = image_attempts
    state.measured = Means(dict(measured))
    state.last_start_ms, state.last_start_mode, state.last_error = last
    state.placeholders = placeholders
    if forecast:
        state.forecast = FunctionForecast.unpack(forecast[1], *terms(state))
        state.holding = Holding.unpack(forecast[0], state.forecast)
    return state, epoch, connections


_DECODER = msgspec.msgpack.Decoder(Function)
_TYPICAL = msgspec.msgpack.encode(
    Function(
        metadata=Metadata(name="typical", labels={"team": "typical"}),
        spec=FunctionSpec(
            command=["/usr/bin/python3", "/opt/typical/server.py"],
            port=8080,
            working_directory="/opt/typical",
            environment={"PYTHONUNBUFFERED": "1"},
            files=[RootFile(source="/opt/typical/server.py", target="/opt/typical/server.py")],
        ),
    )
)


def _deflate(data: bytes) -> bytes:
    compress = zlib.compressobj(9, wbits=-zlib.MAX_WBITS, zdict=_TYPICAL)
    return compress.compress(data) + compress.flush()


def _inflate(data: bytes) -> bytes:
    return zlib.decompressobj(wbits=-zlib.MAX_WBITS, zdict=_TYPICAL).decompress(data)
