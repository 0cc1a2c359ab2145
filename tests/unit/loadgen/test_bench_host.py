"""What the host spends: read from files that look like the kernel's."""

import json

import pytest

from infra import probe
from loadgen.bench.host import busy_of, pss_bytes


@pytest.fixture
def node(tmp_path):
    """Two sandboxes of node ``n`` in the v2 hierarchy beside v1, each with two processes."""
    for sandbox, pids in {"s1": (10, 11), "s2": (20, 21)}.items():
        folder = tmp_path / "cgroup" / "unified" / "thaw-n" / sandbox
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        for pid in pids:
            process = tmp_path / "proc" / str(pid)
            (process / "root" / "run" / "thaw").mkdir(parents=True)
            (process / "smaps_rollup").write_text(f"Rss: 9999 kB\nPss:  {pid} kB\nPss_Dirty: 7 kB\n")
            (process / "root" / "run" / "thaw" / "instance.json").write_text(json.dumps({"instance": f"i-{sandbox}"}))
    return tmp_path


def pss(node, instance):
    return pss_bytes("n", instance, cgroups=node / "cgroup", proc=node / "proc")


def test_all_processes_of_the_instance_and_no_others_are_counted(node):
    assert pss(node, "i-s1") == 21 * 1024
    assert pss(node, "i-s2") == 41 * 1024
    assert pss(node, "i-s3") == 0


def test_a_process_that_ended_meanwhile_counts_nothing(node):
    (node / "proc" / "10" / "smaps_rollup").unlink()
    (node / "proc" / "10" / "root" / "run" / "thaw" / "instance.json").write_text("{")
    assert pss(node, "i-s1") == 11 * 1024


def test_another_nodes_sandboxes_are_not_looked_at(node):
    assert pss_bytes("other", "i-s1", cgroups=node / "cgroup", proc=node / "proc") == 0


def test_fields_of_proc():
    assert probe.pss_bytes("Rss: 1 kB\n") == 0
    assert busy_of("cpu  1 2 4 1000 1000 8 16 1000 1000 0\ncpu0 9 9 9 9 9 9 9 9\n", 100) == 310.0
