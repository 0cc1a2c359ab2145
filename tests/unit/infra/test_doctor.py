from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from infra import doctor, probe
from infra import settings as settings_module

MOUNTINFO = """\
30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / {memory} rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(("release", "version"), [("6.18.44-x", (6, 18)), ("5.11", (5, 11)), ("5.4.0", (5, 4)), ("x", (0, 0))])
def test_kernel_versions(release: str, version: tuple[int, int]) -> None:
    assert probe.kernel_version(release) == version


def test_capabilities_by_the_kernels_numbers() -> None:
    assert probe.capabilities("CapInh:\t0\nCapEff:\t0000000000200001\n") == {"CHOWN", "SYS_ADMIN"}
    assert probe.capabilities("nothing") == set()


def test_cgroup_mounts() -> None:
    unified, legacy = probe.cgroup_mounts(MOUNTINFO.format(memory="/sys/fs/cgroup/memory"))
    assert unified == Path("/sys/fs/cgroup/unified")
    assert legacy == {name: Path(f"/sys/fs/cgroup/{folder}") for name, folder in CONTROLLERS}


CONTROLLERS = [("cpu", "cpu"), ("cpuacct", "cpu"), ("memory", "memory")]


def test_a_writable_memory_controller_is_found_by_trying(tmp_path: Path) -> None:
    assert probe.memory_controller(MOUNTINFO.format(memory=tmp_path)) == ("hybrid", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert probe.memory_controller(MOUNTINFO.format(memory="/proc/none")) == ("hybrid", None)
    assert probe.memory_controller("") == ("none", None)


def test_unified_hierarchies_tell_their_controllers(tmp_path: Path) -> None:
    line = f"33 30 0:29 / {tmp_path} rw - cgroup2 cgroup2 rw"
    assert probe.memory_controller(line) == ("v2", None)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    assert probe.memory_controller(line) == ("v2", tmp_path)


def test_available_memory() -> None:
    assert probe.available_mb("MemTotal: 9 kB\nMemAvailable:    2048000 kB\n") == 2000
    assert probe.available_mb("") == 0


ROUTES = """\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
tun0\t000012C6\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
thaw0\t000012C6\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def test_routes_of_others_that_overlap() -> None:
    assert probe.overlapping_routes(ROUTES, "198.18.0.0/16", "thaw0") == ["198.18.0.0/255.255.0.0 on tun0"]
    assert probe.overlapping_routes(ROUTES, "10.0.0.0/8", "thaw0") == []


def test_failed_trials_return_the_last_line_of_the_error() -> None:
    assert probe.trial("true") == ""
    assert probe.trial("sh", "-c", "echo first >&2; echo last >&2; exit 1") == "last"
    assert probe.trial("false") == "exit code 1"
    assert "no-such-command" in probe.trial("no-such-command")


def test_every_lack_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "userfaultfd", lambda: "Operation not permitted")
    monkeypatch.setattr(probe, "overlay", lambda: "unknown filesystem type")
    monkeypatch.setattr(probe, "available_mb", lambda _text: 100)
    monkeypatch.setattr(probe, "free_disk_mb", lambda _path: 100)
    monkeypatch.setattr(probe, "capabilities", lambda _text: {"CHOWN"})
    monkeypatch.setattr(probe, "overlapping_routes", lambda *_arguments: ["198.18.0.0/15 on tun0"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr("platform.release", lambda: "5.4.0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        flags = {"paths.state_dir": tmp_path, "paths.cache_dir": tmp_path / "cache", "agent.listen_port": port}
        found = {check.name: check for check in doctor.run(settings_module.load(environment={}, flags=flags))}
    lacking = {name for name, check in found.items() if not check.ok and check.needed}
    assert lacking >= {
        *("userfaultfd", "overlayfs", "free memory", "free disk: state", "capabilities", "instance addresses", "root"),
        *("architecture", "kernel", "CRIU", "port: agent.listen_port"),
    }
    assert all(found[name].remedy and found[name].detail for name in lacking)
    assert "SYS_ADMIN" in found["capabilities"].detail
    assert f"{port} is taken by process {os.getpid()}" in found["port: agent.listen_port"].detail
    assert not found["CAP_SYS_RESOURCE"].needed
