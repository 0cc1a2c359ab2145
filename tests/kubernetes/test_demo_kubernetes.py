"""``thaw demo-kubernetes`` in small: while pods of scaler, agent and functions are deleted, and when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import settings as settings_module
from infra.kubernetes.cluster import life
from infra.settings import Settings
from loadgen.kubernetes.demo import FUNCTIONS
from loadgen.kubernetes.deploy import NAMESPACE, Kubectl
from tests.kubernetes.cluster_world import Machine

pytestmark = [pytest.mark.cluster, pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def no_other_cluster(cluster_settings: Settings) -> None:
    """There is one cluster on a machine."""
    life.down(cluster_settings, print)


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


def test_every_request_is_answered_while_pods_are_deleted(tmp_path: Path) -> None:
    before = Machine.now()
    done: list[str] = []

    def delete(namespace: str, labels: str) -> None:
        settings = settings_module.load(environment={}, flags={"paths.state_dir": tmp_path / "state" / "demo-kubernetes"})
        said = Kubectl.of(settings)("delete", "pod", "--wait=false", "--namespace", namespace, "-l", labels)
        done.append(said)

    def during(line: str, process: subprocess.Popen[str]) -> None:
        if "load with checkpoints:" in line:
            for delay_s, namespace, labels in (
                (3.0, NAMESPACE, "app.kubernetes.io/component=scaler"),
                (8.0, NAMESPACE, "app.kubernetes.io/component=agent"),
                (15.0, FUNCTIONS, "thaw.dev/function=echo"),
            ):
                threading.Timer(delay_s, delete, [namespace, labels]).start()

    output, said, code = run_demo(tmp_path, "--to", "800", "--seconds", "25", during=during)
    assert len(done) == 3 and all("deleted" in text for text in done), said
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
        if "kubectl get fn" in line:
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
