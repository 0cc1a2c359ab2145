"""How a process is, as told by HTTP and by metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import http.server
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import health
from infra.guard import Condition
from infra.metrics import Metrics, prometheus_name
from infra.settings import PathSettings, Settings, TelemetrySettings
from infra.vitals import Kept, Vitals, by, one


def some_vitals() -> Vitals:
    vitals = Vitals("scaler", "scaler-1")
    vitals.counter("thaw.demand.events", "{event}", "Demand events.", one(lambda: 7))
    vitals.gauge("thaw.cache.usage", "By", "Cache.", one(lambda: 1.5))
    vitals.gauge("thaw.queue.depth", "{record}", "Waiting.", by("queue", lambda: {"a": 1, 'b"\\': 2}))
    vitals.distribution("thaw.start.duration", "s", "Starts.", (0.01, 0.1, 1.0))
    return vitals


def settings(tmp_path: Path, **telemetry: Any) -> Settings:
    return Settings(paths=PathSettings(state_dir=tmp_path), telemetry=TelemetrySettings(**telemetry))


async def get(where: tuple[str, int], path: str, method: str = "GET") -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        request = urllib.request.Request(f"http://{where[0]}:{where[1]}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


def test_metrics_as_text() -> None:
    vitals = some_vitals()
    vitals.distributions["thaw.start.duration"].record(0.05, {"mode": "thaw"})
    metrics = Metrics(vitals)
    vitals.distributions["thaw.start.duration"].record(5.0, {"mode": "thaw"})
    lines = metrics.text().splitlines()
    assert "# TYPE thaw_demand_events_total counter" in lines and "thaw_demand_events_total 7" in lines
    assert "thaw_cache_usage_bytes 1.5" in lines
    assert 'thaw_queue_depth{queue="a"} 1' in lines and 'thaw_queue_depth{queue="b\\"\\\\"} 2' in lines
    found = [line for line in lines if line.startswith("thaw_start_duration_seconds")]
    assert found == [
        'thaw_start_duration_seconds_bucket{mode="thaw",le="0.01"} 0',
        'thaw_start_duration_seconds_bucket{mode="thaw",le="0.1"} 1',
        'thaw_start_duration_seconds_bucket{mode="thaw",le="1"} 1',
        'thaw_start_duration_seconds_bucket{mode="thaw",le="+Inf"} 2',
        'thaw_start_duration_seconds_sum{mode="thaw"} 5.05',
        'thaw_start_duration_seconds_count{mode="thaw"} 2',
    ]
    assert [line for line in metrics.text().splitlines() if line in found] == found, "cumulative"
    metrics.close()


def test_names_for_prometheus() -> None:
    assert prometheus_name("thaw.starts", "{start}", counter=True) == "thaw_starts_total"
    assert prometheus_name("thaw.cache.usage", "By", counter=False) == "thaw_cache_usage_bytes"
    assert prometheus_name("a.total", "1", counter=True) == "a_total_ratio_total"


def test_a_condition_counts_from_its_turn() -> None:
    kept = Kept("not yet")
    assert not kept().ok
    kept.set("worse")
    first = kept()
    assert (first.ok, first.reason) == (False, "worse")
    kept.set("")
    well = kept()
    kept.set("")
    assert kept() == well and well.ok and well.since_s >= first.since_s


async def test_a_process_says_how_it_is(tmp_path: Path) -> None:
    vitals, broker = some_vitals(), Kept("nothing answers there")
    vitals.depends_on("broker", broker, essential=True)
    vitals.depends_on("store", lambda: Condition(False, 5.0, "slow"))
    vitals.fact("shards", lambda: [1, 2])
    mine = settings(tmp_path)
    folder = health.folder(mine)
    folder.mkdir()
    (folder / "agent-1.json").write_text(json.dumps({"host": "127.0.0.1", "port": 1, "pid": 2**22 + 1, "began": 5}))
    async with health.serving(vitals, mine):
        [where] = health.forget_the_dead(folder)
        assert await get(where, "/healthz") == (200, "ok\n")
        status, text = await get(where, "/readyz")
        found = json.loads(text)
        assert status == 503 and found["degraded"] == ["broker", "store"] and not found["ready"]
        assert found["dependencies"]["broker"]["reason"] == "nothing answers there"
        broker.set("")
        status, text = await get(where, "/readyz?verbose")
        assert status == 200 and json.loads(text)["degraded"] == ["store"], "it is not essential"
        status, text = await get(where, "/status")
        assert json.loads(text)["facts"] == {"shards": [1, 2]} and json.loads(text)["identity"] == "scaler-1"
        assert "thaw_demand_events_total 7" in (await get(where, "/metrics"))[1]
        assert (await get(where, "/other"))[0] == 404
        assert (await get(where, "/healthz", "POST"))[0] == 405
        for noise in (b"\xff" * 20_000, b"GET\r\n\r\n", b"\r\n\r\n", b""):
            reader, writer = await asyncio.open_connection(*where)
            writer.write(noise)
            writer.write_eof()
            async with asyncio.timeout(2):
                answer = await reader.read()
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400"), answer
            writer.close()
        silent = [await asyncio.open_connection(*where) for _ in range(40)]
        async with asyncio.timeout(2):
            assert await silent[-1][0].read() == b"", "the number of connections is bounded"
        for _, writer in silent:
            writer.close()
    assert list(folder.iterdir()) == []


async def test_a_port_that_is_taken_stops_nobody(tmp_path: Path) -> None:
    async with health.serving(some_vitals(), settings(tmp_path)):
        [(_, port)] = health.forget_the_dead(health.folder(settings(tmp_path)))
        async with health.serving(some_vitals(), settings(tmp_path / "other", health_port=port)):
            pass
    async with health.serving(some_vitals(), settings(tmp_path, health_port=-1)):
        assert health.forget_the_dead(health.folder(settings(tmp_path))) == []


@pytest.fixture
def collector() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(f"{self.path} {b'thaw.demand.events' in body}")
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


async def test_metrics_are_pushed_to_a_collector(tmp_path: Path, collector: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = collector
    monkeypatch.setattr(health, "_PUSH_AFTER_S", 0.0)
    mine = dataclasses.replace(settings(tmp_path), telemetry=TelemetrySettings(otlp_endpoint=url, health_port=-1))
    async with health.serving(some_vitals(), mine):
        await asyncio.sleep(1.0)
    assert asked and asked[-1] == "/v1/metrics True"
