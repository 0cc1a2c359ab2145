"""``thaw demo-kubernetes`` in small: while pods are deleted and agents upgraded, and when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import settings as settings_module
from infra.kubernetes.cluster import life
from infra.settings import Settings
from loadgen.kubernetes.demo import FUNCTIONS
from loadgen.kubernetes.deploy import NAMESPACE, Kubectl
from tests.kubernetes.cluster_world import SUBNET, Machine

pytestmark = [pytest.mark.cluster, pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def no_other_cluster(cluster_settings: Settings) -> None:
    """There is one cluster on a machine."""
    life.down(cluster_settings, print)


def settings_of(folder: Path) -> Settings:
    """Those of the demo's own cluster."""
    return settings_module.load(environment={}, flags={"paths.state_dir": folder / "state" / "demo-kubernetes", "cluster.subnet": SUBNET})


def run_demo(folder: Path, *options: str, during: Callable[[str, subprocess.Popen[str]], None], path: str = "") -> tuple[str, str, int]:
    """Run it; what it printed, what it said meanwhile, and its exit code."""
    words = [sys.executable, "-m", "thaw", "--state-dir", str(folder / "state"), "demo-kubernetes", "--out", str(folder / "out"), *options]
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        said: list[str] = []

        def follow() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                during(line, process)

        reader = threading.Thread(target=follow)
        reader.start()
        assert process.stdout is not None
        output = process.stdout.read()
        reader.join()
    return output, "".join(said), process.returncode


class Steady(threading.Thread):
    """Keeps an instance of a function, and asks it through its Service, each request once, while agents are replaced."""

    def __init__(self, kubectl: Kubectl, name: str) -> None:
        super().__init__()
        self.kubectl, self.name = kubectl, name
        self.over = threading.Event()
        self.answered, self.failed = 0, list[str]()
        self.began = time.monotonic()

    def idle(self, seconds: float) -> None:
        patch = json.dumps({"spec": {"policy": {"idleSeconds": seconds}}})
        self.kubectl("patch", "function", self.name, "--namespace", FUNCTIONS, "--type=merge", "-p", patch)

    def scene(self, address: str) -> str:
        """What to look at when a request has failed: who is there, and where the Service's address leads."""
        wide = ("--all-namespaces", "-o", "wide")
        looked = [
            self.kubectl("get", "pods,endpointslices", *wide),
            self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp")[-3000:],
        ]
        for words in (("ip", "route", "get", address), ("ip", "neigh"), ("cat", "/proc/sys/net/netfilter/nf_conntrack_count")):
            done = subprocess.run(words, capture_output=True, text=True)
            looked.append(done.stdout + done.stderr)
        return "\n".join(looked)

    def run(self) -> None:
        self.idle(600)
        address = self.kubectl.get("service", self.name, "--namespace", FUNCTIONS)["spec"]["clusterIP"]
        while not self.over.wait(0.02):
            asked = time.monotonic()
            try:
                with urllib.request.urlopen(f"http://{address}/lookup?row={self.answered * 997 % 400_000}", timeout=5) as answer:
                    self.answered += answer.status == 200
            except OSError as error:
                if self.answered:  # the first instance is still to come
                    self.failed.append(f"asked after {asked - self.began:.1f} s, {self.answered} answers: {error}\n{self.scene(address)}")
        self.idle(2)


def test_every_request_is_answered_while_pods_are_deleted_and_agents_upgraded(tmp_path: Path) -> None:
    before = Machine.now()
    done: list[str] = []
    steady: list[Steady] = []

    def act(*words: str) -> None:
        done.append(Kubectl.of(settings_of(tmp_path))(*words))

    def upgrade() -> None:
        """What a new image does: another template, pods replaced node by node."""
        kubectl = Kubectl.of(settings_of(tmp_path))
        answered = steady[0].answered
        kubectl("rollout", "restart", "daemonset/thaw-agent", "--namespace", NAMESPACE)
        done.append(kubectl("rollout", "status", "daemonset/thaw-agent", "--namespace", NAMESPACE, "--timeout=60s"))
        done.append(f"{steady[0].answered - answered} answered during the upgrade")

    def during(line: str, process: subprocess.Popen[str]) -> None:
        if "load with checkpoints:" in line:
            steady.append(Steady(Kubectl.of(settings_of(tmp_path)), "index"))
            steady[0].start()
            delete = ("delete", "pod", "--wait=false", "--namespace")
            # Seconds after the load has begun.
            for delay_s, what, words in (
                (3.0, act, (*delete, NAMESPACE, "-l", "app.kubernetes.io/component=scaler")),
                (8.0, upgrade, ()),
                (15.0, act, (*delete, FUNCTIONS, "-l", "thaw.dev/function=echo")),
                (20.0, act, (*delete, NAMESPACE, "-l", "app.kubernetes.io/component=agent")),
                (24.0, steady[0].over.set, ()),
            ):
                threading.Timer(delay_s, what, words).start()

    output, said, code = run_demo(tmp_path, "--to", "800", "--seconds", "25", during=during)
    assert len(done) == 5 and sum("deleted" in text for text in done) == 3, f"{done}\n{said}"
    assert any("successfully rolled out" in text for text in done), done
    [count] = [int(text.split()[0]) for text in done if "answered during" in text]
    assert steady[0].failed == [] and count > 10, f"{steady[0].answered} answered\n{said}"
    assert code == 0, said
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert result["answered"] == result["requests"] > 20, said
    assert (result["wrong"], result["leaked"]) == (0, 0), said
    assert result["starts"]["restore"] > 0
    assert result["deployed"] in ("terraform apply", "kubectl apply")
    assert not (tmp_path / "state" / "demo-kubernetes").exists(), "the demo leaves nothing but its report"
    assert Machine.now().left_since(before) == []


def test_an_interrupted_demo_leaves_nothing_and_one_that_was_killed_is_cleared_by_the_next(tmp_path: Path) -> None:
    before = Machine.now()

    def kill(line: str, process: subprocess.Popen[str]) -> None:
        if "$ kubectl apply -f " in line:  # pods of Thaw are being made, or all are there and functions come
            process.kill()

    def interrupt(line: str, process: subprocess.Popen[str]) -> None:
        if "one cold start" in line:
            process.send_signal(signal.SIGINT)

    # A Terraform of another version, so that kubectl deploys, unless the right one was built here before.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "terraform").write_text('#!/bin/sh\necho \'{"terraform_version": "0.1.0"}\'\n')
    (tmp_path / "bin" / "terraform").chmod(0o755)
    _, said, code = run_demo(tmp_path, "--sample", "echo", during=kill, path=str(tmp_path / "bin"))
    assert code == -signal.SIGKILL, said
    assert "$ kubectl apply -f " in said
    _, said, code = run_demo(tmp_path, "--sample", "echo", during=interrupt, path=str(tmp_path / "bin"))
    assert "removing what an interrupted run has left" in said
    assert code != 0
    assert not (tmp_path / "state" / "demo-kubernetes" / "cluster").exists()
    assert Machine.now().left_since(before) == []
    assert not [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in _read(path) and os.getpid() != int(path.parent.name)
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
