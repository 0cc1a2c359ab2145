"""Messages and frames."""

import asyncio
import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.connection import FRAME_BYTES_MAX, Connection, connect
from agent.api.function import from_builtins
from agent.api.messages import Fetch, Hello, Inventory, Start, decode, encode
from agent.api.records import Phase, StartRecord
from agent.errors import ProtocolError

FUNCTION = from_builtins({"metadata": {"name": "f"}, "spec": {"command": ["x"], "port": 1}, "kind": "Function"})


def test_round_trip() -> None:
    for message in (
        Hello(identity="a", role="scaler"),
        Start(id="1", deadline_ns=5, function=FUNCTION, epoch=3),
        Fetch(id="2", deadline_ns=5, function=FUNCTION),
        Inventory(node="n", memory_mb=1, memory_free_mb=1),
    ):
        assert decode(encode(message)) == message


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda kids: st.dictionaries(st.text(max_size=8), kids, max_size=4)))
def test_any_map_is_decoded_or_refused(value: object) -> None:
    with contextlib.suppress(ProtocolError, OverflowError):
        decode(msgpack.packb(value))


async def test_a_frame_that_is_too_large_or_cut_is_refused() -> None:
    for data in ((FRAME_BYTES_MAX + 1).to_bytes(4, "big"), b"\0\0\0\x10abc"):
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        with pytest.raises(ProtocolError):
            await _connection(reader).receive()


async def test_a_peer_that_is_silent_or_of_another_version_is_refused() -> None:
    async def other_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        Connection(reader, writer).send(Hello(identity="b", role="agent", version=99))
        await asyncio.sleep(1)
        writer.close()

    async with await asyncio.start_server(other_version, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ProtocolError, match="version 99"):
            await connect("127.0.0.1", port, "me", "scaler", None)


def test_time_that_no_phase_covers_is_unaccounted() -> None:
    phases = [Phase("a", 100, 200), Phase("b", 150, 260), Phase("c", 300, 500)]
    record = StartRecord(command_id="1", function="f", started_ns=100, ended_ns=400, phases=phases)
    assert record.total_ns == 300
    assert record.unaccounted_ns == 40


def _connection(reader: asyncio.StreamReader) -> Connection:
    class Writer:
        def get_extra_info(self, _name: str) -> None:
            return None

    return Connection(reader, Writer())  # type: ignore[arg-type]
