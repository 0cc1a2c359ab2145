"""Function documents that every reader must take, and such that every reader must refuse."""

from __future__ import annotations

from typing import Any


def document(name: str = "f", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name}
    return {"apiVersion": "thaw.dev/v1", "kind": "Function", "metadata": metadata, "spec": {"command": ["x"], "port": 80, **spec}}


def a_file(target: str) -> dict[str, Any]:
    return document(files=[{"source": "/a", "target": target}])


GOOD = [
    document(),
    document(name="a" * 63),
    document(workingDirectory="/srv", environment={"A": "1"}, root="/srv/root", resumeSignal="SIGUSR1"),
    document(readiness={"path": "", "timeoutSeconds": 0.5}, limits={"memoryMb": 4, "concurrency": 100000, "pids": 1}),
    document(warmUp=[{}, {"path": "/warm?x=1", "method": "POST", "body": "{}", "repeat": 10000}]),
    document(instances={"min": 3, "max": 3}, policy={"idleSeconds": None, "delayWeight": 0, "memory": "whole", "checkpoint": "off"}),
    document(policy={"idleSeconds": 0, "standby": 10000}),
    *[a_file(target) for target in ("/srv/a", "//srv", "/./srv", "/a/..b", "/devices", "/...", "/a/.", "/x/proc")],
]
BAD = [
    *[document(name=name) for name in ("", "F", "-f", "f-", "a" * 64, "a.b", "a\n")],
    *[document(port=port) for port in (0, 65536, "80", None, 1.5, True)],
    *[document(command=command) for command in ([], "x", [""], ["x", 1], ["x\0"], ["x"] * 257)],
    document(workingDirectory="srv"),
    document(environment={"A": 1}),
    document(environment={"A": "\0"}),
    document(unknown=1),
    document(limits={"memoryMB": 512}),
    *[document(limits={name: value}) for name, value in (("memoryMb", 3), ("memoryMb", 1048577), ("concurrency", 0), ("pids", 32769))],
    *[document(readiness=value) for value in ({"path": "x"}, {"timeoutSeconds": 0}, {"timeoutSeconds": 86401}, [])],
    *[
        document(warmUp=[value])
        for value in ({"path": "x"}, {"path": "/a b"}, {"path": "/a\n"}, {"method": "PUT"}, {"repeat": 0}, {"path": ""})
    ],
    document(resumeSignal="SIGKILL"),
    *[document(instances=value) for value in ({"min": 11}, {"min": 2, "max": 1}, {"max": 0}, {"min": -1}, {"max": 10001})],
    *[document(policy=value) for value in ({"memory": "none"}, {"checkpoint": "on"}, {"standby": -1}, {"idleSeconds": -1})],
    *[
        a_file(target)
        for target in ("", "srv", "/", "//", "/.", "/a/../b", "/..", "/proc", "/proc/x", "//sys", "/./dev", "/run/a\nb", "/tmp/")
    ],
    document(files=[{"source": "/a"}]),
    {"metadata": {"name": "f"}, "apiVersion": "thaw.dev/v1", "kind": "Function"},
]
