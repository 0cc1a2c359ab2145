"""The client of redis: whole replies, and what is no reply."""

import asyncio

import pytest

from loadgen import resp
from loadgen.errors import AttemptFailed


class Server:
    """Answers each connection with the same bytes and closes it."""

    def __init__(self, reply):
        self.reply = reply
        self.asked = b""

    async def _serve(self, reader, writer):
        self.asked = await reader.read(4096)
        writer.write(self.reply)
        writer.close()

    async def get(self, key="entry:1"):
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            return await resp.get(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", key)


@pytest.mark.parametrize("reply", [b"*2\r\n$3\r\na\r\n\r\n$-1\r\n", b"*0\r\n", b"+OK\r\n", b":7\r\n", b"*1\r\n*2\r\n+a\r\n:1\r\n"])
async def test_a_reply_is_returned_as_it_came(reply):
    server = Server(reply)
    assert await server.get("entry:1") == (200, reply)
    assert server.asked == b"*3\r\n$4\r\nMGET\r\n$5\r\ntoken\r\n$7\r\nentry:1\r\n"


async def test_an_error_is_a_failed_answer():
    assert await Server(b"-LOADING Redis is loading\r\n").get() == (500, b"-LOADING Redis is loading\r\n")


@pytest.mark.parametrize("reply", [b"", b"*2\r\n$3\r\nabc\r\n", b"$5\r\nab", b"HTTP/1.1 200 OK\r\n\r\n", b"$99999999999\r\n", b"x" * 70000])
async def test_what_is_no_whole_reply_fails(reply):
    with pytest.raises(AttemptFailed, match="did not answer in RESP"):
        await Server(reply).get()


async def test_no_connection_fails():
    with pytest.raises(AttemptFailed, match="no connection"):
        await resp.get("127.0.0.1:9", "entry:1")
