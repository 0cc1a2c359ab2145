"""Spans from measured times, and logs as JSON lines."""

import http.server
import io
import json
import logging
import threading
from pathlib import Path

import pytest

from infra import telemetry
from infra.settings import load


@pytest.fixture
def tracer(tmp_path: Path) -> telemetry.Tracer:
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    yield telemetry.configure("test", load(None, {"THAW_PATHS_STATE_DIR": str(tmp_path)}))
    root.handlers[:], root.level = kept


def test_spans_keep_their_times_and_parents(tracer: telemetry.Tracer, tmp_path: Path) -> None:
    opened = tracer.begin("start", "", 1_000, {"function": "f"})
    child = tracer.span("decide", opened.traceparent, 1_100, 1_200)
    opened.end(2_000, {"mode": "restore"}, error="no room")
    tracer.close()
    lines = [json.loads(line) for line in (tmp_path / "traces" / "test.jsonl").read_text().splitlines()]
    decide, start = lines
    assert (start["start_ns"], start["end_ns"], start["parent_id"]) == (1_000, 2_000, "")
    assert start["attributes"] == {"function": "f", "mode": "restore"}
    assert decide["parent_id"] == start["span_id"] and decide["trace_id"] == start["trace_id"]
    assert telemetry.trace_id(child) == start["trace_id"]


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_malformed_parent_begins_a_new_trace(tracer: telemetry.Tracer, parent: str) -> None:
    assert len(telemetry.trace_id(tracer.begin("x", parent, 1).traceparent)) == 32


def test_spans_go_to_a_collector_when_one_is_set(tmp_path: Path) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        environment = {
            "THAW_PATHS_STATE_DIR": str(tmp_path),
            "THAW_TELEMETRY_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }
        root = logging.getLogger()
        kept = root.handlers[:], root.level
        tracer = telemetry.configure("test", load(None, environment))
        tracer.span("criu.restore", "", 1_000, 2_000)
        tracer.close()
        root.handlers[:], root.level = kept
        server.shutdown()
        thread.join()
    assert received[0][0] == "/v1/traces"
    assert b"criu.restore" in received[0][1] or received[0][1][:2] == b"\x1f\x8b"


def test_a_log_line_carries_its_context() -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(telemetry.JsonFormatter("agent"))
    logger = logging.Logger("somewhere")
    logger.addHandler(handler)
    with telemetry.log_context(function="index"), telemetry.log_context(node="n1"):
        try:
            raise ValueError("what happened")
        except ValueError:
            logger.exception("it failed")
    logger.warning("after")
    first, second = [json.loads(line) for line in output.getvalue().splitlines()]
    assert (first["function"], first["node"], first["message"], first["component"]) == ("index", "n1", "it failed", "agent")
    assert "what happened" in first["exception"]
    assert "function" not in second
