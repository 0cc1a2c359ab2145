"""Each sample function, prepared and run as a plain process: it starts, answers, and its answers pass its own check.

``web`` and ``cache``, which need the paths of a sandbox, are run in one by tests/integration/agent/test_programs.py.
"""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from agent.api.function import read_yaml
from infra.settings import load
from loadgen import functions_setup
from loadgen.checks import PROGRAMS, target_of, verify
from loadgen.errors import SampleUnavailable
from loadgen.functions_setup import prepare


@pytest.fixture(scope="module")
def documents():
    """The prepared samples by name, in the cache that everything else uses, so that a second run is quick."""
    lines = []
    return dict(zip(PROGRAMS, prepare(load().paths.cache_dir, lines.append, samples=PROGRAMS), strict=True))


def read_document(path):
    (function,) = read_yaml(path.read_text(), str(path), path.parent)
    return function


class Process:
    """A function started outside a sandbox: its files are used where they are, its port is a free one."""

    def __init__(self, function, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        spec = function.spec
        moves = {item.target: item.source for item in spec.files} | {"8080": str(self.port)}

        def moved(text):
            for target, source in moves.items():
                text = text.replace(target, source)
            return text

        environment = {name: moved(value) for name, value in spec.environment.items()}
        self.popen = subprocess.Popen(
            [moved(part) for part in spec.command],
            env={"PATH": os.environ["PATH"], **environment},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def wait_until_ready(self, path, timeout_s):
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.popen.poll() is None, "the function ended while it was starting"
            try:
                return self.get(path)
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, "the function did not become ready"
                time.sleep(0.02)

    def end(self):
        os.killpg(self.popen.pid, signal.SIGTERM)
        try:
            self.popen.wait(10)
        finally:
            if self.popen.poll() is None:
                os.killpg(self.popen.pid, signal.SIGKILL)


@pytest.mark.parametrize("sample", [name for name in PROGRAMS if name not in ("web", "cache")])
def test_a_sample_starts_answers_right_and_keeps_its_token(documents, sample, tmp_path):
    function = read_document(documents[sample])
    target = target_of(function)
    process = Process(function, tmp_path / "log")
    try:
        process.wait_until_ready(function.spec.readiness.path, function.spec.readiness.timeout_seconds)
        for request in function.spec.warm_up:
            process.get(request.path)
        rows = [0, 1, 7, 1023, 1024, 65536, 524287, 524288, 819200, 999_999]
        answers = [process.get(target.path(row)) for row in rows]
        assert [verify(sample, answer, row) for answer, row in zip(answers, rows, strict=True)] == [""] * len(rows)
        assert len({answer["token"] for answer in answers}) == 1
        assert max(answer["count"] for answer in answers) > 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            process.get(target.path(-1))
    finally:
        process.end()


def test_two_starts_of_a_sample_have_different_tokens(documents, tmp_path):
    function = read_document(documents["echo"])
    tokens = set()
    for number in range(2):
        process = Process(function, tmp_path / f"log-{number}")
        try:
            tokens.add(process.wait_until_ready("/?row=1", 20)["token"])
        finally:
            process.end()
    assert len(tokens) == 2


def test_everything_a_sample_names_is_there_and_open_to_any_user(documents):
    for document in documents.values():
        for item in read_document(document).spec.files:
            source = Path(item.source)
            paths = [source, *source.rglob("*")] if source.is_dir() else [source]
            assert len(paths) >= 1
            for path in paths:
                mode = path.stat().st_mode
                assert mode & stat.S_IROTH, path
                assert mode & stat.S_IXOTH or not path.is_dir(), path


def test_preparing_again_changes_nothing(documents):
    before = {path: path.stat().st_mtime_ns for path in documents.values()}
    lines = []
    assert prepare(load().paths.cache_dir, lines.append, samples=PROGRAMS) == list(documents.values())
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in documents.values()} == before


def test_a_changed_policy_keeps_the_functions_identity(documents, tmp_path, monkeypatch):
    cache, sources = tmp_path / "cache", tmp_path / "functions"
    shutil.copytree(functions_setup.FUNCTIONS_DIR, sources)
    monkeypatch.setattr(functions_setup, "FUNCTIONS_DIR", sources)
    (first,) = prepare(cache, samples=["index"])
    before = read_document(first)
    document = sources / "index" / "function.yaml"
    document.write_text(document.read_text().replace("idleSeconds: 5", "idleSeconds: 77"))
    (second,) = prepare(cache, samples=["index"])
    after = read_document(second)
    assert after.spec.policy.idle_seconds == 77
    assert after.digest == before.digest
    with (sources / "index" / "server.py").open("a") as program:
        program.write("# changed\n")
    (third,) = prepare(cache, samples=["index"])
    assert read_document(third).digest != before.digest


def test_a_machine_without_a_program_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(functions_setup, "_open_to_all", lambda _program: False)
    with pytest.raises(SampleUnavailable, match="apt-get install openjdk-17"):
        prepare(tmp_path, samples=["ledger"])
    with pytest.raises(SampleUnavailable, match="apt-get install python3"):
        prepare(tmp_path, samples=["index"])
    monkeypatch.setattr(functions_setup.debian, "missing", lambda *_: ["nginx", "redis-server"])
    with pytest.raises(SampleUnavailable, match=r"the web function needs /usr/sbin/nginx; .* apt-get install nginx redis-server"):
        prepare(tmp_path, samples=["web"])
    with pytest.raises(SampleUnavailable, match="the cache function needs /usr/bin/redis-server"):
        prepare(tmp_path, samples=["cache"])
