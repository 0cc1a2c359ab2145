"""Functions with nothing going on are packed: the planner remembers them for a tenth of the memory.

In: states of functions (:mod:`scaler.state`). Out: :class:`Functions`, by name, as :mod:`scaler.world` holds them. Pure.

A function sleeps when it has no live source of demand, no instance, no start and no command under way, and holds just the
standbys that its forecast wants. One without standbys sleeps at once; one with some when it has been left alone for a while,
because it may well be asked again soon. It wakes when it is looked at; a change that its forecast has planned stays in the
planner's timers and wakes it by name, and what happens to its standbys is known by name too. What is packed is msgpack of plain
values, those that are as ever left out. The document, which never changes while the function sleeps, is deflated once, with a
typical one of that name as dictionary.

While a function sleeps it is not told of nodes that come and go, and only if it holds standbys of a shard that changes hands. So
it packs what these were: on waking, what it knew of a node that has connected anew since is dropped and asked again, and so is
its forecast when its shard was with another scaler meanwhile, which saw the demand that this one did not.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from agent.api.function import Function, FunctionSpec, Metadata, RootFile
from scaler.costs import Means
from scaler.errors import ForecastInvalid
from scaler.forecast.function import FunctionForecast
from scaler.forecast.slot import ForecastConfig
from scaler.holding import Holding
from scaler.ladder import RungCosts
from scaler.levels import NS
from scaler.packed import LearnedRecord, Packed
from scaler.placement import Node
from scaler.state import FunctionState, Standby

#: Given a state with its document, what its forecast is priced with: :func:`scaler.forecasts.terms`.
Terms = Callable[[FunctionState], tuple[ForecastConfig, RungCosts]]
#: Of what :meth:`Functions.learned` gives; another one is not read.
FORMAT = 2
#: A function with standbys sleeps when it was not looked at for this long: most that are asked often are asked before.
PAUSE_NS = 60 * NS


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
        #: Those that will sleep soon: since when they were not looked at, oldest first.
        self._drowsy: OrderedDict[str, int] = OrderedDict()
        #: Shards of those that sleep and hold standbys.
        self._holders: dict[str, int] = {}
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
            self._holders.pop(name, None)
            self._woken[name] = None
        self._seen[name] = None
        return state

    def peek(self, name: str) -> FunctionState | None:
        """The function of that name to look at, not to change: one that sleeps sleeps on."""
        state = self._awake.get(name)
        if state is None and (packed := self._asleep.get(name)) is not None:
            state = self._wake(name, packed)
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

    def of_shard(self, shard: int) -> list[FunctionState]:
        """Those of a shard that are awake or hold standbys; the others will notice on waking that it changed hands."""
        for name in [name for name, of in self._holders.items() if of == shard]:
            self.get(name)
        found = [state for state in self._awake.values() if state.shard == shard]
        self._seen.update(dict.fromkeys(state.name for state in found))
        return found

    @property
    def asleep(self) -> int:
        """How many sleep."""
        return len(self._asleep)

    @property
    def packed_bytes(self) -> int:
        """What is stored of those that sleep; their names and the entries of dictionaries come to it."""
        return sum(map(len, self._asleep.values()))

    def __len__(self) -> int:
        return len(self._awake) + len(self._asleep)

    def __iter__(self) -> Iterator[str]:
        yield from self._awake
        yield from self._asleep

    def drain_woken(self) -> list[FunctionState]:
        """Those that have been woken since the last call."""
        if not self._woken:
            return []
        woken, self._woken = self._woken, {}
        return [state for name in woken if (state := self._awake.get(name)) is not None]

    def learned(self, name: str) -> bytes | None:
        """What was learned of a function, for :func:`unpack_learned`; None: nothing.

        Its forecast, and what its slots hold unless it is busy; what it was measured to cost; and that it can't be frozen, if so.
        """
        if (packed := self._asleep.get(name)) is not None:
            was = _STATES.decode(packed)
            if not (was.forecast or was.measured or was.given_up):
                return None
            digest = _DOCUMENTS.decode(_inflate(was.document, name)).digest if was.given_up else ""
            return msgspec.msgpack.encode([FORMAT, was.holding, was.forecast, was.measured, was.given_up, digest])
        state = self._awake.get(name)
        if state is None:
            return None
        predicted = state.forecast is not None and state.holding is not None
        if not (predicted or state.measured.of or state.checkpoint.given_up):
            return None
        holding = state.holding.pack() if state.holding is not None and not state.holding.need else []
        forecast = state.forecast.pack() if predicted and state.forecast is not None else []
        given_up = state.checkpoint.given_up
        measured = _placed(state.measured)
        return msgspec.msgpack.encode([FORMAT, holding, forecast, measured, given_up, state.digest if given_up else ""])

    def rest(self, now_ns: int) -> None:
        """Let those sleep that have nothing going on, of those that were looked at and of those that were left alone since."""
        seen, self._seen = self._seen, {}
        for name in seen:
            state = self._awake.get(name)
            if state is None or not state.resting:
                continue
            if state.standbys.held:
                self._drowsy[name] = now_ns
                self._drowsy.move_to_end(name)
            else:
                self._sleep(state)
        while self._drowsy:
            name, since_ns = next(iter(self._drowsy.items()))
            if now_ns < since_ns + PAUSE_NS:
                break
            del self._drowsy[name]
            state = self._awake.get(name)
            if state is not None and state.resting:
                self._sleep(state)

    def _sleep(self, state: FunctionState) -> None:
        if not (epoch := self._epoch_of(state.shard)):
            return
        self._asleep[state.name] = pack(state, epoch, self._connections(state))
        if state.standbys.held:
            self._holders[state.name] = state.shard
        self._drowsy.pop(state.name, None)
        del self._awake[state.name]

    def _connections(self, state: FunctionState) -> list[int]:
        """Of the nodes that hold its image or were asked for it, as they are connected now; negative: asked only."""
        checkpoint, result = state.checkpoint, []
        for name in {**checkpoint.cached, **checkpoint.asked}:
            if (node := self._nodes.get(name)) is not None:
                result.append(node.connection if name in checkpoint.cached else -node.connection)
        return result

    def _wake(self, name: str, packed: bytes) -> FunctionState:
        assert self.terms is not None
        state, epoch, connections = unpack(name, packed, self.terms)
        nodes = {node.connection: node.name for node in self._nodes.values()} if connections else {}
        for connection in connections:
            if (node := nodes.get(abs(connection))) is not None:
                state.checkpoint.asked[node] = None
                if connection > 0:
                    state.checkpoint.cached[node] = None
        if epoch != self._epoch_of(state.shard):
            state.holding = state.forecast = None
        return state


#: What is measured, by place (:mod:`scaler.costs`).
_MEASURED = ("thaw", "restore", "remote", "cold", "standby", "running")
_PLACES: dict[str, int | str] = {what: place for place, what in enumerate(_MEASURED)}


def pack(state: FunctionState, epoch: int, connections: list[int]) -> bytes:
    """A resting function, the epoch of its shard and the connections of nodes that it knows of, as bytes."""
    assert state.function is not None
    if not state.packed_document:
        state.packed_document = _deflate(msgspec.msgpack.encode(state.function), state.name)
    checkpoint, standbys = state.checkpoint, state.standbys
    number = _number(checkpoint.id)
    attempts = [state.failures, state.retry_ns, standbys.failures, standbys.retry_ns]
    attempts += [checkpoint.failures, checkpoint.retry_ns, checkpoint.fetch_failures, checkpoint.fetch_retry_ns]
    predicted = state.holding is not None and state.forecast is not None
    return msgspec.msgpack.encode(
        Packed(
            shard=state.shard,
            epoch=epoch,
            document=state.packed_document,
            connections=connections,
            checkpoint="" if number else checkpoint.id,
            checkpoint_number=number,
            checked=checkpoint.checked,
            image_mb=checkpoint.image_mb,
            cold_on=checkpoint.cold_on,
            given_up=checkpoint.given_up,
            attempts=attempts if any(attempts) else [],
            measured=_placed(state.measured),
            start_ms=state.last_start_ms or None,
            start_mode=state.last_start_mode,
            error=state.last_error,
            standbys=[
                (item.id, item.node, item.pss_mb, item.made_ns, item.attempt) for held in standbys.held.values() for item in held.values()
            ],
            placeholders=state.placeholders,
            holding=state.holding.pack() if predicted and state.holding is not None else [],
            forecast=state.forecast.pack() if predicted and state.forecast is not None else [],
            generation=state.generation,
        )
    )


def unpack(name: str, packed: bytes, terms: Terms) -> tuple[FunctionState, int, list[int]]:
    """What :func:`pack` packed, of the function of that name."""
    was = _STATES.decode(packed)
    state = FunctionState(name, was.shard)
    function = _DOCUMENTS.decode(_inflate(was.document, name))
    state.take(function, function.digest)
    state.packed_document = was.document
    checkpoint, standbys = state.checkpoint, state.standbys
    checkpoint.id = was.checkpoint or was.checkpoint_number.hex()
    checkpoint.checked, checkpoint.image_mb = was.checked, was.image_mb
    checkpoint.cold_on, checkpoint.given_up = was.cold_on, was.given_up
    if was.attempts:
        state.failures, state.retry_ns, standbys.failures, standbys.retry_ns = was.attempts[:4]
        checkpoint.failures, checkpoint.retry_ns, checkpoint.fetch_failures, checkpoint.fetch_retry_ns = was.attempts[4:]
    state.measured = _means(was.measured)
    state.last_start_ms, state.last_start_mode, state.last_error = was.start_ms or 0.0, was.start_mode, was.error
    for standby, node, pss_mb, made_ns, attempt in was.standbys:
        standbys.add(Standby(standby, node, state.digest, checkpoint.id, pss_mb, made_ns, attempt))
    state.placeholders, state.generation = was.placeholders, was.generation
    if was.forecast:
        state.forecast = FunctionForecast.unpack(was.forecast, *terms(state))
        state.holding = Holding.unpack(was.holding, state.forecast)
    return state, was.epoch, was.connections


class Learned(NamedTuple):
    """What was known of a function by whoever decided for it before.

    Attributes:
        forecast, holding: of its requests; None: it had none.
        measured: what it was measured to cost.
        given_up: why no checkpoint of it can be made, and of which digest that was; empty: nobody has found that.
    """

    forecast: FunctionForecast | None
    holding: Holding | None
    measured: Means
    given_up: str
    digest: str


def unpack_learned(learned: bytes, terms: tuple[ForecastConfig, RungCosts]) -> Learned:
    """What :meth:`Functions.learned` gave.

    Raises:
        ForecastInvalid: it is not that, or of another format.
    """
    try:
        value = msgspec.msgpack.decode(learned)
        if isinstance(value, list) and value and value[0] != FORMAT:
            raise ForecastInvalid(f"it is of format {value[0]!r}, not {FORMAT}")
        msgspec.convert(value, LearnedRecord)
        _, holding, packed, measured, given_up, digest = value
        means = _means(measured)
        if not packed:
            return Learned(None, None, means, given_up, digest)
        forecast = FunctionForecast.unpack(packed, *terms)
        if not forecast.sound:
            raise ForecastInvalid("its weights are no weights")
        held = Holding.unpack(holding, forecast) if holding else Holding(forecast)
        return Learned(forecast, held, means, given_up, digest)
    except (
        msgspec.MsgspecError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        struct.error,
    ) as error:
        raise ForecastInvalid(f"it is not a forecast: {error}") from error


def _placed(means: Means) -> dict[int | str, float]:
    return {_PLACES.get(what, what): value for what, value in means.of.items()}


def _means(placed: Mapping[int | str, float]) -> Means:
    return Means({_MEASURED[what] if isinstance(what, int) else what: value for what, value in placed.items()})


def _number(name: str) -> bytes:
    """A hexadecimal name as the number that it is; empty when it is not one."""
    try:
        number = bytes.fromhex(name)
    except ValueError:
        return b""
    return number if number.hex() == name else b""


_STATES = msgspec.msgpack.Decoder(Packed)
_DOCUMENTS = msgspec.msgpack.Decoder(Function)
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


#: Of documents of a few KB; a greater window would only have to be cleared.
_WINDOW, _EFFORT = -13, 6


def _deflate(data: bytes, name: str) -> bytes:
    compress = zlib.compressobj(9, wbits=_WINDOW, memLevel=_EFFORT, zdict=_typical(name))
    return compress.compress(data) + compress.flush()


def _inflate(data: bytes, name: str) -> bytes:
    return zlib.decompressobj(wbits=_WINDOW, zdict=_typical(name)).decompress(data)


def _typical(name: str) -> bytes:
    """What most of a document is; not a document itself, as lengths do not agree."""
    return _TYPICAL.replace(b"typical", name.encode())
