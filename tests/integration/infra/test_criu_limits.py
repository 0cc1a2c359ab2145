"""The built CRIU freezes and restores an unprivileged process, also where the host gives no CAP_SYS_RESOURCE."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from infra.local import criu, native
from infra.settings import Settings

pytestmark = [pytest.mark.root, pytest.mark.stack]

PROGRAM = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
# In a pid namespace of its own the number of the process is surely free again at the restore.
SCRIPT = """
set -e
criu=$1 program=$2 images=$3
echo 500 >/proc/sys/kernel/ns_last_pid
ulimit -n 512 -c 0
ulimit -S -s 4096
setsid setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs --bounding-set=-all "$program" </dev/null >/dev/null 2>&1 &
pid=$!
while [ "$(cat /proc/$pid/comm)" != waiter ]; do sleep 0.01; done
cat /proc/$pid/limits >"$images/before"
options="--tcp-close --network-lock skip --manage-cgroups=ignore"
"$criu" dump -t $pid -D "$images" -v4 -o dump.log $options
! kill -0 $pid 2>/dev/null || wait $pid || true
"$criu" restore -D "$images" -v4 -o restore.log -d $options
cat /proc/$pid/limits >"$images/after"
grep -E '^(Uid|Gid|CapEff|CapBnd|NoNewPrivs):' /proc/$pid/status
kill -9 $pid
"""


def test_a_process_of_another_user_keeps_its_limits(stack_settings: Settings, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if os.geteuid() != 0:
        pytest.skip("CRIU needs root")
    source = tmp_path / "waiter.c"
    source.write_text(PROGRAM)
    # The other user must reach the program, and pytest's own folders are closed to it.
    open_folder = Path(tempfile.mkdtemp(prefix="thaw-test-"))
    request.addfinalizer(lambda: shutil.rmtree(open_folder))
    open_folder.chmod(0o711)
    program = native.build(source, open_folder)
    images = tmp_path / "images"
    images.mkdir()
    space = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*space, "bash", "-c", SCRIPT, "_", criu.criu_path(stack_settings), program, images],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    logs = [(images / name).read_text()[-2000:] for name in ("dump.log", "restore.log") if (images / name).exists()]
    assert done.returncode == 0, [done.stderr, *logs]
    found = {key: value.split() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}
    assert found["Uid"] == found["Gid"] == ["65534"] * 4
    assert found["CapEff"] == found["CapBnd"] == ["0" * 16]
    assert found["NoNewPrivs"] == ["1"]
    before = (images / "before").read_text()
    assert (images / "after").read_text() == before
    assert "Max open files            512" in before
