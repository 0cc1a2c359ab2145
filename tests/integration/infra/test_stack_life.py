"""The embedded stack through the faults that a user's machine has: kills, interruptions, twice, taken ports."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from infra import leaks
from infra import settings as settings_module
from infra.errors import KafkaUnavailable, StackError, StoreUnavailable
from infra.local import health, parts, processes, stack
from infra.settings import Settings

pytestmark = pytest.mark.stack


class Said:
    """Collects what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def one(self, words: str) -> bool:
        return any(words in line for line in self.lines)


def settings_in(folder: Path, **flags: object) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return settings_module.load(environment={}, flags={"paths.state_dir": folder, **named})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a stack of this test's own, not started yet, and surely gone afterwards."""
    settings = settings_in(tmp_path / "state")
    yield settings
    stack.down(settings, print, purge=True)


def identities(settings: Settings) -> dict[str, processes.Identity]:
    return {part.name: part.identity for part in parts.parts(settings) if part.identity is not None}


def kill(identity: processes.Identity) -> None:
    os.kill(identity.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while identity.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not identity.alive()


def states(settings: Settings) -> dict[str, str]:
    return {part.name: part.state for part in stack.status(settings)}


def store_client(settings: Settings):
    return boto3.client(
        "s3",
        endpoint_url=settings.s3.endpoint_url,
        region_name=settings.s3.region,
        aws_access_key_id=settings.s3.access_key,
        aws_secret_access_key=settings.s3.secret_key,
    )


async def send(settings: Settings, value: bytes) -> int:
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers, acks="all") as producer:
        return (await producer.send_and_wait(health.HEALTH_TOPIC, value, partition=0)).offset


async def receive(settings: Settings, offset: int) -> bytes:
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka.bootstrap_servers, enable_auto_commit=False)
    async with consumer:
        place = TopicPartition(health.HEALTH_TOPIC, 0)
        consumer.assign([place])
        consumer.seek(place, offset)
        async with asyncio.timeout(20):
            return (await consumer.getone()).value


def test_up_twice_changes_nothing_and_down_leaves_nothing(own: Settings, tmp_path: Path) -> None:
    before = leaks.census([tmp_path])
    running = stack.up(own, print)
    first = identities(own)
    assert states(running) == {"kafka": "running", "s3": "running"}
    assert own.stack_file.stat().st_mode & 0o777 == 0o600
    assert settings_in(tmp_path / "state") == running

    said = Said()
    assert stack.up(own, said) == running
    assert stack.up(running, said) == running
    assert identities(own) == first
    assert said.one("kafka: already running at") and said.one("s3: already running at")
    assert not said.one("starting")

    stack.down(running, said)
    assert not own.stack_file.exists()
    assert states(own) == {"kafka": "stopped", "s3": "stopped"}
    stack.down(own, said, purge=True)
    assert said.one("nothing was running")
    assert not (tmp_path / "state" / "stack").exists()
    new = leaks.difference(before, leaks.census([tmp_path]))
    assert [line for line in new if str(tmp_path) in line] == [
        f"file {tmp_path / 'state'}",
        f"file {tmp_path / 'state' / '.stack.lock'}",
    ]


def test_ports_are_kept_and_only_loopback_listens(own: Settings) -> None:
    running = stack.up(own, print)
    pids = {identity.pid for identity in identities(own).values()}
    stack.down(own, print)
    again = stack.up(own, print)
    assert again == running
    pids = {identity.pid for identity in identities(own).values()}
    inodes = {link.name: str(link.readlink()) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes.values()]
    assert listening
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_parts_that_were_killed_are_named_and_come_back_with_their_data(own: Settings) -> None:
    running = stack.up(own, print)
    client = store_client(running)
    client.put_object(Bucket=running.s3.bucket, Key="kept", Body=b"object")
    offset = asyncio.run(send(running, b"record"))

    for identity in identities(own).values():
        kill(identity)
    found = {part.name: part for part in stack.status(own)}
    assert {part.state for part in found.values()} == {"dead"}
    assert all("`thaw stack up` starts it again" in part.detail for part in found.values())

    said = Said()
    again = stack.up(running, said)
    assert said.one("kafka: was dead, starting again") and said.one("s3: was dead, starting again")
    assert again == running
    assert client.get_object(Bucket=running.s3.bucket, Key="kept")["Body"].read() == b"object"
    assert asyncio.run(receive(again, offset)) == b"record"


def test_one_killed_part_does_not_touch_the_other(own: Settings) -> None:
    stack.up(own, print)
    before = identities(own)
    kill(before["s3"])
    assert states(own) == {"kafka": "running", "s3": "dead"}
    stack.up(own, print)
    after = identities(own)
    assert after["kafka"] == before["kafka"]
    assert after["s3"] != before["s3"]
    assert states(own) == {"kafka": "running", "s3": "running"}


def test_a_part_that_hangs_is_noticed_and_replaced(own: Settings) -> None:
    stack.up(own, print)
    hung = identities(own)["s3"]
    os.kill(hung.pid, signal.SIGSTOP)
    assert states(own) == {"kafka": "running", "s3": "unhealthy"}
    said = Said()
    stack.up(dataclasses.replace(own, stack=dataclasses.replace(own.stack, start_timeout_s=3.0)), said)
    assert said.one("s3: runs but does not work")
    assert not hung.alive()
    assert states(own) == {"kafka": "running", "s3": "running"}


def start_in_a_child(settings: Settings) -> subprocess.Popen[str]:
    code = (
        "from infra import settings as s\nfrom infra.local import stack\n"
        f"stack.up(s.load(environment={{}}, flags={{'paths.state_dir': {str(settings.paths.state_dir)!r}}}),"
        " lambda line: print(line, flush=True))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(child: subprocess.Popen[str], words: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


@pytest.mark.parametrize("moment", ["kafka: starting", "s3: starting"])
def test_ctrl_c_takes_back_what_was_begun(own: Settings, moment: str) -> None:
    with start_in_a_child(own) as child:
        wait_for(child, moment)
        os.killpg(child.pid, signal.SIGINT)
        child.communicate(timeout=60)
    assert child.returncode != 0
    assert not own.stack_file.exists()
    assert identities(own) == {}
    stack.up(own, print)
    assert states(own) == {"kafka": "running", "s3": "running"}


@pytest.mark.parametrize("moment", ["kafka: starting", "s3: starting"])
def test_a_killed_up_is_taken_over_by_the_next(own: Settings, moment: str) -> None:
    with start_in_a_child(own) as child:
        wait_for(child, moment)
        child.kill()
        child.communicate(timeout=60)
    left = identities(own)
    stack.up(own, print)
    assert states(own) == {"kafka": "running", "s3": "running"}
    after = identities(own)
    # What the killed run had started serves on, or is gone: nothing runs twice.
    for name, identity in left.items():
        assert identity == after[name] or not identity.alive()
    stack.down(own, print)
    assert not any(identity.alive() for identity in [*left.values(), *after.values()])


def test_a_killed_up_is_also_cleaned_by_down(own: Settings) -> None:
    with start_in_a_child(own) as child:
        wait_for(child, "s3: starting")
        child.kill()
        child.communicate(timeout=60)
    left = identities(own)
    stack.down(own, print)
    assert not any(identity.alive() for identity in left.values())
    assert states(own) == {"kafka": "stopped", "s3": "stopped"}


def test_two_ups_at_once_start_one_stack(own: Settings) -> None:
    with start_in_a_child(own) as child:
        results: list[Settings] = []
        other = threading.Thread(target=lambda: results.append(stack.up(own, print)))
        other.start()
        output, _ = child.communicate(timeout=120)
        other.join(120)
    assert child.returncode == 0, output
    assert len(results) == 1
    assert states(own) == {"kafka": "running", "s3": "running"}


def test_a_server_of_the_users_is_used_and_left_alone(stack_settings: Settings, tmp_path: Path) -> None:
    mine = settings_in(
        tmp_path / "other",
        kafka__bootstrap_servers=stack_settings.kafka.bootstrap_servers,
        s3__endpoint_url=stack_settings.s3.endpoint_url,
        s3__access_key=stack_settings.s3.access_key,
        s3__secret_key=stack_settings.s3.secret_key,
        s3__bucket="thaw-of-the-user",
    )
    said = Said()
    assert stack.up(mine, said) == mine
    assert said.one("kafka: using yours at") and said.one("s3: using yours at")
    assert states(mine) == {"kafka": "external", "s3": "external"}
    assert not mine.stack_file.exists()
    stack.down(mine, said)
    assert states(stack_settings) == {"kafka": "running", "s3": "running"}


def test_wrong_addresses_and_credentials_are_said_at_once(stack_settings: Settings, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there, and nobody else can
        nowhere = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(KafkaUnavailable, match=f"nothing answers at {nowhere}"):
            stack.up(settings_in(tmp_path / "a", kafka__bootstrap_servers=nowhere), print)
        wrong = settings_in(
            tmp_path / "b",
            kafka__bootstrap_servers=stack_settings.kafka.bootstrap_servers,
            s3__endpoint_url=f"http://{nowhere}",
            s3__access_key="a",
            s3__secret_key="b",
        )
        with pytest.raises(StoreUnavailable, match=f"the object store at http://{nowhere}"):
            stack.up(wrong, print)
        assert states(wrong)["s3"] == "unhealthy"
    denied = dataclasses.replace(wrong, s3=dataclasses.replace(stack_settings.s3, secret_key="wrong"))
    with pytest.raises(StoreUnavailable, match=r"403|SignatureDoesNotMatch|Forbidden"):
        stack.up(denied, print)


def test_a_taken_port_of_the_settings_fails_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = settings_in(tmp_path, stack__s3_port=port)
        with pytest.raises(StackError, match=rf"port {port} \(stack\.s3_port\) is taken by process {os.getpid()}"):
            stack.up(settings, print)
    # The broker had been started by then.
    assert identities(settings) == {}
    assert not settings.stack_file.exists()


def test_a_start_that_fails_shows_the_servers_own_words(own: Settings) -> None:
    stack.up(own, print)
    stack.down(own, print)
    meta = own.paths.state_dir / "stack" / "kafka" / "data" / "meta.properties"
    meta.write_text("version=1\ncluster.id=of-another\nnode.id=99\n")
    with pytest.raises(StackError, match=r"kafka did not start: its process ended\. Its log ends: .*node"):
        stack.up(own, print)
    assert identities(own) == {}


def test_a_full_disk_is_said_and_nothing_stays(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        settings = settings_in(tmp_path)
        (tmp_path / "fill").write_bytes(bytes(900_000))
        with pytest.raises(StackError, match="kafka: no space, 0 MB are left for"):
            stack.up(settings, print)
        assert not any(identity.alive() for identity in identities(settings).values())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
