"""The kernel's tables of internet sockets, and which sockets a checkpoint would break."""

import pytest

from agent.criu.sockets import parse, problem

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = (
    HEAD + "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 65534        0 100 1 0000 100 0 0 10 0\n"
    "   1: 020013C6:C350 010013C6:1538 01 00000000:00000000 00:00000000 00000000 65534        0 101 1 0000 20 4 30 10 -1\n"
    "   2: 020013C6:1F90 010013C6:C351 01 00000000:00000000 00:00000000 00000000 65534        0 102 1 0000 20 4 30 10 -1\n"
    "   3: 020013C6:C352 010013C6:1538 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0000\n"
)
REST = "00000000:00000000 00:00000000 00000000 0 0"
TCP6 = (
    HEAD + f"   0: 0000000000000000FFFF0000020013C6:C350 0000000000000000FFFF0000010013C6:1538 01 {REST} 103 1\n"
    f"   1: 00000000000000000000000001000000:C350 00000000000000000000000001000000:1538 02 {REST} 104 1\n"
)


def test_addresses_ports_states_and_inodes_are_read():
    listener, outgoing, accepted, gone = parse("tcp", TCP)
    assert (str(listener.local), listener.listens, listener.inode) == ("0.0.0.0:8080", True, 100)
    assert (str(outgoing.local), str(outgoing.peer), outgoing.listens, outgoing.inode) == (
        "198.19.0.2:50000",
        "198.19.0.1:5432",
        False,
        101,
    )
    assert (str(accepted.local), accepted.inode, gone.inode) == ("198.19.0.2:8080", 102, 0)
    mapped, own = parse("tcp", TCP6)
    assert (str(mapped.peer), str(own.peer)) == ("198.19.0.1:5432", "[::1]:5432")


def test_only_live_connections_that_were_not_accepted_are_a_problem():
    problems = [problem(item, {8080}) for item in parse("tcp", TCP)]
    assert [bool(found) for found in problems] == [False, True, False, False]
    assert "198.19.0.1:5432" in problems[1]
    assert all(problem(item, {8080}) for item in parse("tcp", TCP6))


@pytest.mark.parametrize(
    ("state", "live"), [(1, True), (2, True), (4, True), (5, True), (6, False), (7, False), (8, False), (9, False), (11, False)]
)
def test_a_connection_that_its_peer_has_closed_is_no_problem(state, live):
    (item,) = parse("tcp", HEAD + f"0: 020013C6:C350 010013C6:1538 {state:02X} 0:0 00:0 0 0 0 101 1\n")
    assert bool(problem(item, set())) == live


@pytest.mark.parametrize(
    ("protocol", "line", "words"),
    [
        ("tcp", "020013C6:1538 00000000:0000 0A", "a TCP socket bound to 198.19.0.2:5432"),
        ("udp", "020013C6:1538 00000000:0000 07", "a UDP socket bound to 198.19.0.2:5432"),
        ("udp", "020013C6:C350 010013C6:0035 01", "a UDP socket connected to 198.19.0.1:53"),
        ("tcp", "0100007F:1538 00000000:0000 0A", ""),
        ("udp", "00000000:1538 00000000:0000 07", ""),
        ("udp", "0100007F:C350 0100007F:0035 01", ""),
        ("udp", "FB0000E0:14E9 00000000:0000 07", ""),
    ],
)
def test_an_address_that_no_other_sandbox_has_is_a_problem(protocol, line, words):
    (item,) = parse(protocol, HEAD + f"0: {line} 0:0 00:0 0 0 0 101 1\n")
    found = problem(item, {5432})
    assert words in found and bool(words) == bool(found)
