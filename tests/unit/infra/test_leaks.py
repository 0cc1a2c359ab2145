from __future__ import annotations

import os
import subprocess
from pathlib import Path

from infra import leaks
from infra.leaks import Census


def test_equal_counts_leak_nothing() -> None:
    one = Census(processes={"1@2": "init"}, descriptors={1: 3})
    assert leaks.difference(one, one) == []


def test_what_is_gone_is_no_leak() -> None:
    assert leaks.difference(Census(processes={"1@2": "x"}, files={"/tmp/a": ""}), Census()) == []


def test_each_kind_is_named() -> None:
    after = Census(
        processes={"7@8": "sleep 9"},
        mounts={"30 /mnt": "tmpfs"},
        namespaces={"net:[5]": "of process 7"},
        links={"veth0": "veth"},
        cgroups={"/sys/fs/cgroup/memory/thaw": ""},
        files={"/tmp/a": ""},
    )
    assert leaks.difference(Census(), after) == [
        "process 7@8 sleep 9",
        "mount 30 /mnt tmpfs",
        "network namespace net:[5] of process 7",
        "network link veth0 veth",
        "cgroup /sys/fs/cgroup/memory/thaw",
        "file /tmp/a",
    ]


def test_a_recycled_pid_is_another_process() -> None:
    before, after = Census(processes={"7@8": "sleep"}), Census(processes={"7@9": "sleep"})
    assert leaks.difference(before, after) == ["process 7@9 sleep"]


def test_descriptors_count_only_for_processes_that_were_there() -> None:
    before, after = Census(descriptors={1: 10, 2: 10}), Census(descriptors={1: 13, 2: 10, 3: 99})
    assert leaks.difference(before, after) == ["descriptors of process 1: 10 -> 13"]
    assert leaks.difference(before, after, spare_descriptors=3) == []


def test_known_strangers_are_ignored() -> None:
    after = Census(processes={"7@8": "top -b", "8@8": "sleep"})
    assert leaks.difference(Census(), after, ignore=["top "]) == ["process 8@8 sleep"]


def test_mounts_are_read_with_optional_fields() -> None:
    text = "36 35 98:0 / /mnt1 rw,noatime shared:1 master:2 - ext3 /dev/root rw\nbroken\n37 35 0:1 / / rw - tmpfs t rw"
    assert leaks.parse_mounts(text) == {"36 /mnt1": "ext3", "37 /": "tmpfs"}


def test_a_new_process_file_and_descriptor_are_seen(tmp_path: Path) -> None:
    before = leaks.census([tmp_path], [os.getpid()])
    with (tmp_path / "left").open("w"), subprocess.Popen(["sleep", "60"]) as child:
        after = leaks.census([tmp_path], [os.getpid()])
        child.kill()
    found = leaks.difference(before, after)
    assert any(line.startswith(f"process {child.pid}@") and line.endswith("sleep 60") for line in found)
    assert f"file {tmp_path / 'left'}" in found
    assert any(line.startswith("descriptors of process") for line in found)
