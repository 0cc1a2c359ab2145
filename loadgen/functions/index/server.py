"""A lookup service: 524,288 records of 1 KiB in memory, built at start-up, answered over HTTP.

In: ``GET /lookup?row=N``. Out: JSON with a digest of record N. Each record carries its own number and the token drawn
at start-up, so that :mod:`loadgen.checks` can tell a right record from a zeroed, misplaced or foreign one.
"""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

RECORD_BYTES = 1024
BLOCK_BYTES = 1 << 20
BLOCKS = 512
RECORDS_PER_BLOCK = BLOCK_BYTES // RECORD_BYTES
ROWS = BLOCKS * RECORDS_PER_BLOCK

TOKEN = os.urandom(16)


def build() -> list[bytearray]:
    """Fill the index: every block is the same noise, every record stamped with its number and the token."""
    noise = hashlib.shake_256(b"thaw sample index").digest(BLOCK_BYTES)
    blocks = []
    for number in range(BLOCKS):
        block = bytearray(noise)
        first = number * RECORDS_PER_BLOCK
        for index in range(RECORDS_PER_BLOCK):
            start = index * RECORD_BYTES
            block[start : start + 24] = (first + index).to_bytes(8, "little") + TOKEN
        blocks.append(block)
    return blocks


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the host's name, which takes seconds where no DNS answers.
        self.socket.setsockopt(1, 2, 1)  # SOL_SOCKET, SO_REUSEADDR
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "index", self.server_address[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    count = 0
    lock = threading.Lock()
    blocks: list[bytearray]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/ready":
            self.answer(200, {"ready": True})
            return
        try:
            row = int(parse_qs(url.query).get("row", ["0"])[0])
        except ValueError:
            row = -1
        if url.path != "/lookup" or row < 0:
            self.answer(404, {"error": "GET /lookup?row=N, N = 0, 1, 2, …"})
            return
        block, index = divmod(row % ROWS, RECORDS_PER_BLOCK)
        record = memoryview(self.blocks[block])[index * RECORD_BYTES : (index + 1) * RECORD_BYTES]
        value = hashlib.blake2b(record, digest_size=16).hexdigest()
        with self.lock:
            Handler.count = count = Handler.count + 1
        self.answer(200, {"function": "index", "token": TOKEN.hex(), "row": row, "value": value, "count": count})

    def answer(self, status: int, body: dict) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        # One connection per request: a connection frozen with the process would be dead after the restore.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Requests are counted by whoever sends them."""


if __name__ == "__main__":
    Handler.blocks = build()
    server = Server(("0.0.0.0", int(sys.argv[1])), Handler)
    print(f"index of {ROWS} records is ready", flush=True)
    server.serve_forever()
