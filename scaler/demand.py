"""The demand event: schema, topics and codec.

In: measurements of whoever sees requests (gateways, producers, :mod:`loadgen.driver`). Out: records of ``thaw.demand``;
read by :mod:`scaler.edges.kafka`, which hands :class:`DemandEvent` to the planner. Levels, not deltas: the newest event
of a source replaces its older ones, so lost and repeated events never skew the level.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from scaler.errors import DemandInvalid

DEMAND_TOPIC = "thaw.demand"
REJECTED_TOPIC = "thaw.demand.rejected"
FUNCTIONS_TOPIC = "thaw.functions"
STATE_TOPIC = "thaw.state"
FORECASTS_TOPIC = "thaw.forecasts"
RESTORES_TOPIC = "thaw.restores"
#: Name of the record header that carries the W3C trace context.
TRACEPARENT_HEADER = "traceparent"
EVENT_BYTES_MAX = 64 << 10

Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
#: Wall clock, ns; years can be added and it is still a number of 64 bits.
Time = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]


class DemandEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What one source sees of one function.

    Attributes:
        function: its name; also the record's key.
        source: who measured.
        epoch: the source's start time, ns since the epoch; a restarted source has a newer one.
        seq: grows by one with each event of a source and epoch.
        at: event time, ns since the epoch.
        in_flight: requests that run or wait at this source now.
        arrivals: requests since this source's previous event of this function.
        ttl: seconds of silence after which this source counts as zero; 0: the scaler's default.
    """

    function: Name
    source: Name
    epoch: Time
    seq: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    at: Time
    in_flight: Count
    arrivals: Count = 0
    ttl: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0


_DECODER = msgspec.msgpack.Decoder(DemandEvent)


def encode(event: DemandEvent) -> bytes:
    """One event as a msgpack map."""
    return msgspec.msgpack.encode(event)


def decode(payload: bytes | None) -> DemandEvent:
    """One event from a record's value.

    Raises:
        DemandInvalid: empty, too large, not msgpack, a missing or wrong field; the message says which.
    """
    if not payload:
        raise DemandInvalid("the record is empty")
    if len(payload) > EVENT_BYTES_MAX:
        raise DemandInvalid(f"the record has {len(payload)} bytes; {EVENT_BYTES_MAX} is the most")
    try:
        return _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DemandInvalid(f"the record is not a demand event: {error}") from error
