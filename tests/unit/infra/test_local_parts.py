from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra import settings as settings_module
from infra.errors import KafkaUnavailable, StackError
from infra.local import broker, debian, golang, health, parts, ports
from infra.settings import KafkaSettings, Settings


def settings_in(folder: Path, **flags: object) -> Settings:
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return settings_module.load(environment={}, flags={"paths.state_dir": folder, **named})


def ignore(_line: str) -> None:
    pass


def test_private_files_are_private_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "stack.json"
    parts.write_private(path, {"a": 1})
    (tmp_path / "deep" / "stack.json.new").write_text("half of an interru")
    parts.write_private(path, {"a": 2})
    assert path.stat().st_mode & 0o777 == 0o600
    assert parts.read_json(path) == {"a": 2}
    assert [item.name for item in path.parent.iterdir()] == ["stack.json"]


def test_unreadable_json_is_empty(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "half").write_text('{"a":')
    assert [parts.read_json(tmp_path / name) for name in ("list", "half", "absent")] == [{}, {}, {}]


def test_ports_are_chosen_once_and_differ(tmp_path: Path) -> None:
    for part in parts.parts(settings_in(tmp_path)):
        part.choose_ports(ignore)
    known = parts.read_json(tmp_path / "stack" / "ports.json")
    assert sorted(known) == ["controller", "kafka", "kafka_host", "s3", "s3_host"]
    assert len({value for value in known.values() if isinstance(value, int)}) == 3
    for part in parts.parts(settings_in(tmp_path)):
        part.choose_ports(ignore)
    assert parts.read_json(tmp_path / "stack" / "ports.json") == known


def test_a_remembered_port_that_is_taken_is_given_up(tmp_path: Path) -> None:
    store = parts.ObjectStore(settings_in(tmp_path))
    store.choose_ports(ignore)
    before = store.port("s3")
    said: list[str] = []
    with socket.create_server(("127.0.0.1", before)):
        store.choose_ports(said.append)
    assert store.port("s3") != before
    assert f"port {before} is now taken by process" in said[0]


def test_a_port_of_the_settings_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        store = parts.ObjectStore(settings_in(tmp_path, stack__s3_port=port))
        with pytest.raises(StackError, match=rf"port {port} \(stack.s3_port\) is taken by process \d+ \(.*python"):
            store.choose_ports(ignore)
    store.choose_ports(ignore)
    assert store.address == f"http://127.0.0.1:{port}"


def test_the_address_to_listen_on_is_kept_and_never_one_of_other_machines(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "localhost", ""):
        with pytest.raises(StackError, match=r"stack\.listen_host: .* must not be reached from other machines"):
            parts.ObjectStore(settings_in(tmp_path, stack__listen_host=host)).choose_ports(ignore)
    with pytest.raises(StackError, match=r"198\.19\.255\.77 is no address of this machine now; start the cluster first"):
        parts.ObjectStore(settings_in(tmp_path, stack__listen_host="198.19.255.77")).choose_ports(ignore)
    for part in (parts.ObjectStore, parts.Broker):
        part(settings_in(tmp_path, stack__listen_host="127.0.0.9")).choose_ports(ignore)
        # Who asks how the stack is need not know the setting.
        assert "127.0.0.9:" in part(settings_in(tmp_path)).address
    with socket.create_server(("127.0.0.9", parts.Broker(settings_in(tmp_path)).port("kafka"))):
        assert not parts.Broker(settings_in(tmp_path)).port_free("kafka")
        assert parts.Broker(settings_in(tmp_path)).port_free("controller")


def test_credentials_are_random_and_kept(tmp_path: Path) -> None:
    one, other = (parts.ObjectStore(settings_in(tmp_path / name)) for name in "ab")
    assert one.credentials() == parts.ObjectStore(settings_in(tmp_path / "a")).credentials()
    assert one.credentials() != other.credentials()


def test_own_addresses_are_told_from_the_users(tmp_path: Path) -> None:
    parts.Broker(settings_in(tmp_path)).choose_ports(ignore)
    own = parts.Broker(settings_in(tmp_path)).address
    assert not parts.Broker(settings_in(tmp_path)).external
    assert not parts.Broker(settings_in(tmp_path, kafka__bootstrap_servers=own)).external
    assert parts.Broker(settings_in(tmp_path, kafka__bootstrap_servers="broker:9092")).external


def test_the_kernels_table_of_sockets() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 123 1 0 100 0\n"
        "   1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 456 1 0 100 0\n"
    )
    assert ports.listeners(table) == [(8080, "123")]


def test_addresses_of_brokers() -> None:
    assert health.addresses("a:1, [::1]:2") == [("a", 1), ("::1", 2)]
    with pytest.raises(KafkaUnavailable, match=r"'a' in kafka.bootstrap_servers is not host:port"):
        health.addresses("a")


def test_nobody_there_is_said_quickly() -> None:
    (port,) = ports.free(1)
    with pytest.raises(KafkaUnavailable, match=f"nothing answers at 127.0.0.1:{port}"):
        health.check_kafka(KafkaSettings(bootstrap_servers=f"127.0.0.1:{port}"), write=False)


def test_package_lists() -> None:
    text = "# a: comment\na: x y?tool\nb: z\na: p|q"
    assert debian.packages("a", text) == ["x", "y?tool", "p|q"]
    assert debian.packages("c", text) == []
    for group in ("python", "compile", "criu", "broker", "host"):
        assert debian.packages(group)


def test_packages_are_not_missing_when_their_command_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "packages", lambda _group: ["thaw-none?sh", "thaw-none-2?thaw-no-command", "thaw-none-3"])
    assert debian.missing("any") == ["thaw-none-2", "thaw-none-3"]


@pytest.mark.parametrize(
    ("text", "version"),
    [("go version go1.26.8 linux/amd64", (1, 26)), ("go version go1.9 linux/amd64", (1, 9)), ("", (0, 0))],
)
def test_go_versions(text: str, version: tuple[int, int]) -> None:
    assert golang.version(text) == version


def test_no_pinned_file_names_a_host_of_ours() -> None:
    here = Path(broker.__file__).parent
    for path in [*here.glob("*.lock"), *here.glob("*/*.lock"), *here.parent.parent.glob("*.lock")]:
        text = path.read_text()
        assert "://" not in text
        assert "--find-links" not in text
        assert "--index-url" not in text
