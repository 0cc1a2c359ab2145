"""When a connection counts as in use: by what the kernel may say, and against the real one."""

from __future__ import annotations

import dataclasses
import os
import socket
import time

import pytest

from agent import drain
from infra import sockdiag
from infra.sockdiag import TcpConnection

#: One request, answered 300 ms after it came, a second ago.
IDLE = TcpConnection(7, sockdiag.ESTABLISHED, 0, 0, 1000, 1300, 1000, 1, 1)


def never() -> set[int]:
    raise AssertionError("not to be looked up for this")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, False),
        ({"unread_bytes": 1}, True),  # a request that nobody has read
        ({"data_received_ms": 600}, True),  # one that is worked on
        ({"data_sent_ms": 100}, True),  # an answer that goes on, or has just ended
        ({"unconfirmed_bytes": 9}, True),  # an answer that is not over yet
        ({"segments_sent": 0, "segments_received": 0, "data_received_ms": 1000}, False),  # never used
        ({"segments_sent": 0, "data_received_ms": 1000}, True),  # its first request came in the tick in which it was made
        ({"state": sockdiag.CLOSE_WAIT, "unread_bytes": 1}, False),  # the peer has closed it: nothing else is unread
        ({"state": sockdiag.CLOSE_WAIT, "unread_bytes": 2}, True),
        ({"state": sockdiag.CLOSE_WAIT, "data_received_ms": 600}, True),  # asked, and said that nothing follows
        ({"state": sockdiag.FIN_WAIT1, "unconfirmed_bytes": 1}, False),  # only the end is not confirmed
        ({"state": sockdiag.LAST_ACK, "unconfirmed_bytes": 2}, True),  # nor is the end of the answer
        ({"state": sockdiag.FIN_WAIT1, "data_sent_ms": 100}, False),  # answered and closed
        ({"data_received_ms": 1000, "confirmed_ms": 960}, False),  # the answer came in the tick of the request
    ],
)
def test_what_the_kernel_says(facts: dict[str, int], expected: bool) -> None:
    assert drain.in_use(dataclasses.replace(IDLE, **facts), never) == expected


def test_one_tick_for_both_is_told_by_who_answers_promptly() -> None:
    tied = dataclasses.replace(IDLE, data_received_ms=1000)
    assert not drain.in_use(tied, lambda: {7})
    assert drain.in_use(tied, lambda: {8})


@pytest.mark.skipif(os.geteuid() != 0, reason="enters a network namespace")
def test_the_real_kernel_tells_a_request_that_follows_an_answer_at_once_from_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listener.accept()[0] as server:
            for _ in range(5):
                for request in (b"first", b"second"):
                    client.sendall(request)
                    server.recv(100)
                    server.sendall(b"head")
                    server.sendall(b"body")
                    while client.recv(100)[-4:] != b"body":
                        pass
                time.sleep(0.3)
                assert not drain.is_busy(os.getpid(), port), "all is answered"
                client.sendall(b"third")
                server.recv(100)
                server.sendall(b"answer")
                client.recv(100)
                client.sendall(b"fourth, within the same tick")
                server.recv(100)
                time.sleep(0.3)
                assert drain.is_busy(os.getpid(), port), "one is being worked on"
                server.sendall(b"answer")
                client.recv(100)
