from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.sandbox import podfiles

OVERLAY = "upperdir=/var/lib/containerd/snapshots/7/fs,workdir=/var/lib/containerd/snapshots/7/work"
MOUNTINFO = f"""700 600 0:90 / / {{root}},relatime - overlay overlay rw,lowerdir=/l,{OVERLAY}
701 700 0:91 / /proc rw,nosuid - proc proc rw
702 700 0:92 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k
703 702 0:93 / /dev/shm rw,nosuid - tmpfs shm rw,size=65536k
704 700 0:94 / /sys/fs/cgroup ro - tmpfs tmpfs rw
705 700 254:0 /kubelet/pods/u/volumes/kubernetes.io~empty-dir/data /data\\040dir rw - ext4 /dev/vda rw
706 700 254:0 /kubelet/pods/u/etc-hosts /etc/hosts rw - ext4 /dev/vda rw
707 700 254:0 /srv/shared /shared rw - ext4 /dev/vda rw
708 700 0:95 / /var/run/secrets/kubernetes.io/serviceaccount ro - tmpfs tmpfs rw
709 700 0:96 / /tmp rw - tmpfs tmpfs rw
710 700 0:97 / /run/thaw rw - tmpfs tmpfs rw
711 700 0:98 / /thaw ro - tmpfs tmpfs rw
"""


def test_places_are_layer_empty_dirs_and_memory() -> None:
    upper, writable, closed = podfiles.parse(MOUNTINFO.format(root="rw"))
    assert upper == "/var/lib/containerd/snapshots/7/fs"
    assert writable == ["/dev/shm", "/data dir", "/tmp"]
    assert {"proc", "dev/shm", "data dir", "shared", "etc/hosts"} <= closed and "" not in closed


def test_a_read_only_root_is_no_place() -> None:
    assert podfiles.parse(MOUNTINFO.format(root="ro"))[0] == ""


@pytest.mark.parametrize("path", ["/tmp", "/dev/shm", "/a%2Fb/c d"])
def test_parts_are_named_without_slashes(path: str) -> None:
    part = podfiles.part_of(path)
    assert "/" not in part and podfiles.path_of(part) == path


def test_no_link_leads_out_of_a_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.close(podfiles.open_place(os.getpid(), podfiles.part_of(str(tmp_path / "real"))))
    with pytest.raises(OSError):
        podfiles.open_place(os.getpid(), podfiles.part_of(str(tmp_path / "link")))


def test_files_of_volumes_and_of_the_kubelet_are_foreign() -> None:
    _, writable, closed = podfiles.parse(MOUNTINFO.format(root="rw"))
    places = podfiles.Places({"upper": Path("/u"), **{podfiles.part_of(path): Path(path) for path in writable}}, closed)
    foreign = ["/etc/hosts", "/shared/a", "/var/run/secrets/kubernetes.io/serviceaccount/..2026_01_02/token"]
    own = ["/etc/passwd", "/tmp/a", "/data dir/b", "/dev/shm/c", "/dev/null", "/proc/1/stat"]
    assert [path for path in [*foreign, *own] if places.foreign(path)] == foreign
