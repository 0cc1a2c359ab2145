from __future__ import annotations

import dataclasses
import os

import pytest

from agent.sandbox import confinement
from agent.sandbox.confinement import Confinement

STATUS = """Name:\tthaw-init
Uid:\t1000\t1000\t1000\t1000
Gid:\t1000\t1000\t1000\t1000
Groups:\t1000 2000
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
"""
POD = confinement.parse(STATUS, "3:memory:/kubepods/pod1/c1\n", {"pid": "pid:[1]", "net": "net:[2]"})


def test_the_same_is_no_more() -> None:
    assert confinement.excess(POD, POD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"users": (1000, 0, 1000, 1000)}, "Uid"),
        ({"groups": (0, 0, 0, 0)}, "Gid"),
        ({"more_groups": frozenset({1000, 3000})}, "Groups"),
        ({"capabilities": {**POD.capabilities, "CapEff": 1 << 21}}, "CapEff 200000"),
        ({"capabilities": {**POD.capabilities, "CapBnd": 1}}, "CapBnd 1"),
        ({"no_new_privileges": False}, "NoNewPrivs"),
        ({"seccomp": 0}, "Seccomp 0 instead of 2"),
        ({"cgroups": "3:memory:/\n"}, "cgroups"),
        ({"namespaces": {"pid": "pid:[1]", "net": "net:[9]"}}, "net:[9]"),
    ],
)
def test_more_is_named(change: dict[str, object], said: str) -> None:
    assert said in " ".join(confinement.excess(POD, dataclasses.replace(POD, **change)))  # type: ignore[arg-type]


def test_a_pod_that_may_change_users_may_hold_any() -> None:
    bits = 1 << 6 | 1 << 7
    root = dataclasses.replace(
        POD, users=(0,) * 4, groups=(0,) * 4, capabilities=dict.fromkeys(POD.capabilities, bits), no_new_privileges=False
    )
    worker = dataclasses.replace(
        root, users=(33,) * 4, groups=(33,) * 4, capabilities={**dict.fromkeys(POD.capabilities, 0), "CapBnd": bits}
    )
    assert confinement.excess(root, worker) == []


def test_a_real_process_is_read() -> None:
    found = confinement.read(os.getpid())
    assert isinstance(found, Confinement)
    assert found.users[0] == os.getuid() and found.namespaces["pid"].startswith("pid:[")


RESTORED = b"""Name:\tpython3
Umask:\t0022
NSpid:\t4711\t1000
Uid:\t65534\t65534\t65534\t65534
Gid:\t65534\t65534\t65534\t65534
Groups:\t\x20
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t0000000000000000
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t1
"""


def test_a_function_has_no_privileges() -> None:
    assert confinement.unexpected(RESTORED, 65534) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Uid:\t65534\t65534", b"Uid:\t65534\t0"),
        (b"Gid:\t65534", b"Gid:\t0"),
        (b"Groups:\t ", b"Groups:\t27 "),
        (b"CapPrm:\t0000000000000000", b"CapPrm:\t0000000000000001"),
        (b"CapBnd:\t0000000000000000", b"CapBnd:\t000001ffffffffff"),
        (b"NoNewPrivs:\t1", b"NoNewPrivs:\t0"),
        (b"Seccomp:\t2", b"Seccomp:\t0"),
    ],
)
def test_a_restored_thread_with_more_is_found(old: bytes, new: bytes) -> None:
    assert len(confinement.unexpected(RESTORED.replace(old, new), 65534)) == 1
