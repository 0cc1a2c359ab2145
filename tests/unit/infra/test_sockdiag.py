"""What the kernel says of connections, read from bytes and asked of the real one."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from infra import netlink, sockdiag
from infra.sockdiag import TcpConnection


def an_entry(info: bytes) -> bytes:
    """An inet_diag_msg: port 8080, 5 bytes unread, 7 unconfirmed, inode 77."""
    identity = struct.pack("!HH44x", 8080, 4711)
    return struct.pack("=BBBB", 2, 1, 0, 0) + identity + struct.pack("=IIIII", 0, 5, 7, 65534, 77) + netlink.attribute(2, info)


def test_an_entry_is_read() -> None:
    info = bytearray(160)
    struct.pack_into("=IIII", info, 44, 11, 99, 12, 13)
    struct.pack_into("=II", info, 152, 3, 4)
    assert sockdiag.parse_connection(an_entry(bytes(info))) == TcpConnection(77, 1, 5, 7, 11, 12, 13, 3, 4)


def test_an_older_kernel_tells_less() -> None:
    assert sockdiag.parse_connection(an_entry(bytes(104))) == TcpConnection(77, 1, 5, 7, 0, 0, 0, 0, 0)


def test_who_answers_promptly_is_the_last_bit_of_a_column() -> None:
    table = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 50 1 000000002a 100 0 0 10 0
   1: 0100007F:1F90 0100007F:8B2E 01 00000000:00000000 00:00000000 00000000     0        0 51 1 000000002a 20 4 31 10 -1
   2: 0100007F:1F90 0100007F:8B30 01 00000000:00000000 00:00000000 00000000     0        0 52 1 000000002a 20 4 28 10 -1
   3: 0100007F:1F90 0100007F:8B32 06 00000000:00000000 03:000003A0 00000000     0        0 0 3 000000002a
"""
    assert sockdiag.prompt_answerers(table) == {51}


def test_the_real_kernel_is_asked_by_port_and_both_families() -> None:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as listener:
            listener.bind((address, 0))
            listener.listen()
            port = listener.getsockname()[1]
            with socket.create_connection((address, port)) as client, listener.accept()[0] as server, sockdiag.open_here() as kernel:
                assert [found.inode for found in sockdiag.tcp_connections(kernel, port)] == [os.fstat(server.fileno()).st_ino]
                client.sendall(b"12345")
                (waiting,) = sockdiag.tcp_connections(kernel, port)
                assert (waiting.unread_bytes, waiting.segments_received, waiting.segments_sent) == (5, 1, 0)
                server.recv(5)
                time.sleep(0.05)
                server.sendall(b"1")
                client.recv(1)
                (answered,) = sockdiag.tcp_connections(kernel, port)
                assert answered.unread_bytes == answered.unconfirmed_bytes == 0 and answered.data_sent_ms < answered.data_received_ms
                assert sockdiag.tcp_connections(kernel, client.getsockname()[1])[0].segments_sent == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="enters a network namespace")
def test_another_namespace_is_asked_and_left_again() -> None:
    seen: list[str] = []

    def enter() -> None:
        namespace = os.open(f"/proc/{inside.pid}/ns/net", os.O_RDONLY)
        before = set(os.listdir("/proc/self/fd"))
        with sockdiag.open_in(namespace) as kernel:
            assert sockdiag.tcp_connections(kernel, port) == []
        seen.append(str(Path("/proc/thread-self/ns/net").readlink()))
        assert set(os.listdir("/proc/self/fd")) - before == set()
        os.close(namespace)

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE) as inside,
    ):
        assert inside.stdout is not None
        inside.stdout.readline()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), sockdiag.open_here() as here:
            assert len(sockdiag.tcp_connections(here, port)) == 1
            thread = threading.Thread(target=enter)  # of its own, as it is meant to be
            thread.start()
            thread.join()
        inside.kill()
    assert seen == [str(Path("/proc/self/ns/net").readlink())]
