"""Every decoder of bytes that come from outside of the process that reads them: a new one is one entry of :data:`DECODERS`.

In: nothing. Out: :class:`Decoder`: a function of bytes, valid samples, what it may raise, and inputs that ask for the most memory. Used by
:mod:`tests.security.fuzz` and the tests of this folder. A decoder here goes as far as the product does with the bytes before it trusts
them: what follows at once from a value (a digest, a time) is part of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import zstandard

from agent.api import messages
from agent.api.connection import FRAME_BYTES_MAX, Connection
from agent.api.function import Function, from_builtins, read_yaml, to_builtins
from agent.api.records import Phase, StartRecord
from agent.criu import images, protobuf
from agent.errors import FunctionInvalid, ImageInvalid, PagerError, ProtocolError
from agent.pager import worker
from agent.pager.journal import Journal
from agent.pager.regions import Region, Regions
from agent.pager.userfault import Fault, Fork, Remap, Remove, parse
from agent.ready import Response
from agent.store import archive, chunks, manifest, pointer
from agent.store.archive import Member
from agent.store.manifest import Blob, Extent, Fresh, Manifest, MappedFile, Pages, Span
from agent.store.seal import Sealer
from infra import imagekeys, telemetry
from loadgen import starts
from scaler import demand, dormant
from scaler.edges import functions, statefeed
from scaler.edges.kubernetes import functions as kubernetes_functions
from scaler.errors import DemandInvalid, ForecastInvalid
from scaler.forecast.function import FunctionForecast
from scaler.forecast.slot import ForecastConfig
from scaler.holding import Holding
from scaler.ladder import RungCosts
from scaler.snapshots import snapshot
from scaler.state import FunctionState
from tests.security.mutations import Form

Decode = Callable[[bytes], object]
MB = 1 << 20


@dataclass(frozen=True)
class Decoder:
    """One decoder.

    Attributes:
        name: of it.
        sender: whose bytes they are.
        refusals: what it says no with; anything else is a bug.
        make: the function, and samples that it takes.
        form: of the samples, for mutations.
        bombs: inputs that ask for the most memory; see ``memory_mb``.
        memory_mb: what any input may take at the most, its own bytes not counted.
        slow: an input takes a millisecond rather than ten microseconds: fewer of them in the quick tests.
    """

    name: str
    sender: str
    refusals: tuple[type[Exception], ...]
    make: Callable[[], tuple[Decode, list[bytes]]]
    form: Form = "bytes"
    bombs: Callable[[], list[bytes]] = list
    memory_mb: int = 16
    slow: bool = False


def _function(**more: Any) -> Function:
    return from_builtins(
        {
            "metadata": {"name": "index", "labels": {"team": "search"}},
            "spec": {
                "command": ["/usr/bin/python3", "/srv/server.py"],
                "port": 8080,
                "environment": {"A": "b"},
                "files": [{"source": "/src/server.py", "target": "/srv/server.py"}],
                "warmUp": [{"path": "/q", "repeat": 3}],
                "limits": {"memoryMb": 512},
                "policy": {"delayWeight": 10.0},
                **more,
            },
        }
    )


def _pod_function() -> Function:
    container = {"name": "function", "image": "index:1", "env": [{"name": "A", "value": "b"}], "resources": {"limits": {"memory": "512Mi"}}}
    return _function(
        template={"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [container], "volumes": [{"name": "v", "emptyDir": {}}]}}
    )


def _many(value: bytes, size: int) -> bytes:
    """A msgpack list of as many of ``value`` as ``size`` bytes hold."""
    count = (size - 5) // len(value)
    return b"\xdd" + count.to_bytes(4, "big") + value * count


def _many_keys(size: int, value: bytes) -> bytes:
    """A msgpack map with as many names as ``size`` bytes hold."""
    count = (size - 5) // (5 + len(value))
    return b"\xdf" + count.to_bytes(4, "big") + b"".join(b"\xa4%04x" % (number & 0xFFFF) + value for number in range(count))


def _with(sample: bytes, old: bytes, new: bytes) -> bytes:
    assert sample.count(old) >= 1
    return sample.replace(old, new, 1)


# The agent's stream


def _messages() -> list[bytes]:
    record = StartRecord(
        command_id="c", function="index", phases=[Phase("sandbox", 1, 2)], bytes_by_tier={"disk": 1}, criu={"restore_us": 5}
    )
    instance = messages.InstanceInfo(
        instance="i-1",
        function="index",
        function_digest="ab" * 32,
        address="198.18.0.2:8080",
        start_mode="restore",
        started_ns=1,
        command_id="c",
    )
    checkpoint = messages.CheckpointInfo(
        function="index", function_digest="ab" * 32, checkpoint="cd" * 16, image_bytes=1 << 29, complete=True, generation=1 << 60
    )
    standby = messages.StandbyInfo(
        standby="s", function="index", function_digest="ab" * 32, checkpoint="cd" * 16, pss_bytes=1 << 22, made_ns=1, command_id="c"
    )
    return [
        messages.encode(item)
        for item in (
            messages.Hello(identity="scaler-1", role="scaler", capabilities=["thaw"]),
            messages.Start(id="c", deadline_ns=1 << 60, traceparent=_TRACEPARENT, shard=1, epoch=7, function=_function()),
            messages.Prepare(id="c", deadline_ns=1 << 60, generation=1 << 60, function=_pod_function()),
            messages.Release(id="c", deadline_ns=1, instance="i-1"),
            messages.Inventory(node="n", memory_mb=1, memory_free_mb=1, instances=[instance], standbys=[standby], checkpoints=[checkpoint]),
            messages.StartDone(command_id="c", instance=instance, record=record),
            messages.EndpointUp(endpoint=messages.Endpoint("index", "i-1", "198.18.0.2:8080", "thaw")),
        )
    ]


_TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


def _use_message(payload: bytes) -> object:
    message = messages.decode(payload)
    function = getattr(message, "function", None)
    return function.digest if isinstance(function, Function) else message


def _message_bombs() -> list[bytes]:
    size = FRAME_BYTES_MAX - 4096
    prepare = messages.encode(messages.Prepare(id="c", deadline_ns=1, function=_pod_function()))
    hello = messages.encode(messages.Hello(identity="x", role="scaler", capabilities=["thaw"]))
    instance = msgspec.msgpack.decode(_messages()[5])["instance"]
    record = StartRecord(command_id="c", function="f", criu={"a": 1})
    done = messages.encode(messages.StartDone(command_id="c", instance=instance, record=record))
    return [
        _many(b"\x80", FRAME_BYTES_MAX),
        _many(b"\x90", FRAME_BYTES_MAX),
        _with(hello, b"\x91\xa4thaw", _many(b"\xa0", size)),
        _with(prepare, b"\x91\x82\xa4name\xa1v\xa8emptyDir\x80", _many(b"\x80", size)),
        _with(done, b"\x81\xa1a\x01", _many_keys(size, b"\x01")),
    ]


class _Writer:
    def get_extra_info(self, _: str) -> None:
        return None


def _stream() -> tuple[Decode, list[bytes]]:
    loop = asyncio.new_event_loop()

    def decode(data: bytes) -> object:
        reader = asyncio.StreamReader(loop=loop)
        reader.feed_data(data)
        reader.feed_eof()
        connection, found = Connection(reader, _Writer()), []  # type: ignore[arg-type]
        while True:
            receiving = connection.receive()
            try:
                receiving.send(None)
            except StopIteration as done:
                if done.value is None:
                    return found
                found.append(done.value)
            else:
                raise AssertionError("it waits for bytes after the end")

    frames = [len(item).to_bytes(4, "big") + item for item in _messages()]
    return decode, [*frames, b"".join(frames[:3])]


# Kafka


def _demand() -> tuple[Decode, list[bytes]]:
    def decode(payload: bytes) -> object:
        event = demand.decode(payload)
        # What the scaler does with it at once: times in ns, which are sent and stored as numbers of 64 bits.
        return int(event.ttl * 1e9), struct.pack("<qQQ", event.at + (1 << 61), event.epoch, event.seq), event.function.encode()

    event = demand.DemandEvent(function="index", source="gateway-1", epoch=1 << 60, seq=9, at=1 << 60, in_flight=3, arrivals=2, ttl=5.0)
    return decode, [demand.encode(event), demand.encode(msgspec.structs.replace(event, in_flight=0, ttl=0.0))]


def _functions_topic() -> tuple[Decode, list[bytes]]:
    def decode(value: bytes) -> object:
        function = functions.decode(value)
        return function.digest, functions.encode(function), messages.encode(messages.Fetch(id="c", deadline_ns=1, function=function))

    return decode, [functions.encode(_function()), functions.encode(_pod_function())]


_CONFIG, _COSTS = ForecastConfig(delay_weight=10.0), RungCosts((0.04, 0.01, 0.0017, 0.0), (0.0, 0.0, 4.1, 30.0))


def _asked() -> FunctionState:
    state = FunctionState("index", 0)
    state.apply(_function())
    state.forecast = FunctionForecast(_CONFIG, _COSTS)
    state.holding = Holding(state.forecast)
    now_s = 1.7e9
    for number in range(40):
        state.holding.raised(now_s + number * 60)
        state.holding.lowered(now_s + number * 60 + 2)
    return state


def _learned() -> tuple[Decode, list[bytes]]:
    def decode(value: bytes) -> object:
        forecast, holding, measured, *_ = dormant.unpack_learned(value, (_CONFIG, _COSTS))
        assert all(seconds >= 0 for seconds in measured.of.values())
        if forecast is None or holding is None:
            return measured
        holding.advance(1.8e9)
        holding.raised(1.8e9 + 1)
        holding.lowered(1.8e9 + 2)
        return forecast.pack(), holding.next_change_s, forecast.rising()

    state = _asked()
    assert state.holding is not None and state.forecast is not None
    state.holding.advance(1.7e9 + 1e5)
    whole = [dormant.FORMAT, state.holding.pack(), state.forecast.pack(), {1: 0.01, "other": 2.0}, "no", "ab" * 32]
    return decode, [msgspec.msgpack.encode(item) for item in (whole, [whole[0], [], *whole[2:]], [whole[0], [], [], *whole[3:]])]


def _state_topic() -> tuple[Decode, list[bytes]]:
    return statefeed.decode, [msgspec.msgpack.encode(snapshot(_asked(), 1))]


def _restores_topic() -> tuple[Decode, list[bytes]]:
    record = StartRecord(
        command_id="c", function="index", phases=[Phase("sandbox", 1, 2)], bytes_by_tier={"disk": 1}, criu={"restore_us": 5}
    )
    return starts._decode, [msgspec.msgpack.encode(record)]


def _traceparent() -> tuple[Decode, list[bytes]]:
    def decode(header: bytes) -> object:
        text = header.decode(errors="replace")
        return telemetry.trace_id(text), telemetry._PROPAGATOR.extract({"traceparent": text})

    return decode, [_TRACEPARENT.encode()]


# Documents

_YAML = """\
apiVersion: thaw.dev/v1
kind: Function
metadata: {name: index, labels: {team: search}}
spec:
  command: [python3, server.py]
  port: 8080
  environment: &e {A: "b", C: '1'}
  files:
    - {source: server.py, target: /srv/server.py}
  limits: {memoryMb: 512}
"""
_YAML_POD = """\
kind: Function
metadata: {name: index}
spec:
  command: [python3]
  port: 80
  template:
    spec:
      containers: [{name: function, image: "x:1", env: [{name: A, value: "2"}]}]
      volumes: [&v {name: a, emptyDir: {}}, *v]
"""


def _yaml() -> tuple[Decode, list[bytes]]:
    def decode(text: bytes) -> object:
        found = read_yaml(text.decode(errors="replace"), "f.yaml", Path("/base"))
        return [(function.digest, functions.encode(function)) for function in found]

    return decode, [_YAML.encode(), _YAML_POD.encode(), f"---\n{_YAML}---\n{_YAML_POD}".encode()]


def _yaml_bombs() -> list[bytes]:
    lines = ["kind: Function", "metadata: {name: x}", "a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    merges = ["a0: &a0 {k: v}", *(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))]
    pod = _YAML_POD.replace("volumes: [&v {name: a, emptyDir: {}}, *v]", "volumes: &r [*r]")
    return ["\n".join(lines).encode(), "\n".join(merges).encode(), pod.encode(), b"[" * 50_000, b"a: " * 1000, b"- " * 20_000]


def _resource() -> tuple[Decode, list[bytes]]:
    def decode(body: bytes) -> object:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):  # the client's refusal: it is no answer of an API server
            raise FunctionInvalid("not JSON") from None
        if not isinstance(value, dict):
            raise FunctionInvalid("not an object")
        value["metadata"] = {"name": "index", "namespace": "default", "uid": "u"}  # the server's own
        resource = kubernetes_functions.read(value, "thaw-agent:1")
        return resource.function and messages.encode(messages.Fetch(id="c", deadline_ns=1, function=resource.function))

    resources = [{**to_builtins(item), "metadata": {}} for item in (_function(), _pod_function())]
    return decode, [json.dumps(item).encode() for item in resources]


# The bucket


def _manifest_sample(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "function": "index", "function_digest": "ab" * 32, "files_digest": "cd" * 32, "key": "k1", "created_ns": 1, "criu": "4.2.1",
        "kernel": "6.1", "machine": "x86_64", "cpu_flags": ["fpu", "sse"], "root_pid": 1000, "outputs": ["pipe:[1]"],
        "mapped_files": [MappedFile("/usr/lib/x.so", 10, bytes(32))],
        "archive": Blob(100, bytes(32), 200), "working_set": Blob(50, bytes(32), 8192),
        "extents": [Extent(1, 0, 4096), Extent(1, 8192, 4096)], "fresh": {"1000": [Fresh(4096, 8192)]},
        "pages": {"1": Pages(3 * MB + 4096, [bytes(32), None, bytes(32), None], [Span(MB, MB)], [Span(0, 8192)])},
        "image_bytes": 3 * MB + 4096,
    }  # fmt: skip
    return Manifest(**(values | changes))


def _decode_manifest(data: bytes) -> object:
    return manifest.decode(data, manifest.name(data))


def _manifest() -> tuple[Decode, list[bytes]]:
    return _decode_manifest, [manifest.encode(_manifest_sample())]


def _manifest_bombs() -> list[bytes]:
    size = manifest.MANIFEST_BYTES_MAX - 4096
    sample = manifest.encode(_manifest_sample())
    return [
        _many(b"\x80", size),
        _with(sample, msgspec.msgpack.encode(["fpu", "sse"]), _many(b"\xa0", size)),
        _with(sample, msgspec.msgpack.encode([Extent(1, 0, 4096), Extent(1, 8192, 4096)]), _many(b"\x93\x01\x00\x00", size)),
        _with(sample, msgspec.msgpack.encode({"1000": [Fresh(4096, 8192)]}), _many_keys(size, b"\x90")),
    ]


def _head() -> tuple[Decode, list[bytes]]:
    packed = chunks.compress(msgpack.packb({"images": {"core-1.img": b"core"}, "layer": b""}))
    blob = Blob(len(packed), hashlib.sha256(packed).digest(), 100)
    encoded = manifest.encode(_manifest_sample(archive=blob))

    def decode(data: bytes) -> object:
        size = int.from_bytes(data[8:12], "big")
        return manifest.unpack_head(data, manifest.name(data[12 : 12 + size]))

    return decode, [manifest.pack_head(encoded, packed)]


class _Scratch:
    """A folder in memory that goes with the process; files that inputs made are removed by the next one."""

    def __init__(self) -> None:
        self._owner = tempfile.TemporaryDirectory(prefix="thaw-fuzz-", dir="/dev/shm")
        self.path = Path(self._owner.name)

    def fresh(self, *names: str) -> None:
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()
        for name in names:
            (self.path / name).mkdir()


def _sealer() -> Sealer:
    scratch = _Scratch()
    imagekeys.make(scratch.path / "keys")
    sealer = Sealer(scratch.path / "keys")
    sealer.read()
    _kept.append(scratch)
    return sealer


_kept: list[_Scratch] = []


def _pointer() -> tuple[Decode, list[bytes]]:
    """Behind the seal: what who has the ring, and no signing key, may write."""
    sealer = _sealer()
    key = manifest.pointer_key("index")
    found = pointer.Pointer(function="index", checkpoint="ab" * 16, function_digest="cd" * 32, files_digest="ef" * 32, generation=7)
    signed = bytes(sealer.open(key, pointer.seal(sealer, found, sealer.newest())))

    def decode(data: bytes) -> object:
        return pointer.read(sealer, "index", sealer.seal(key, data, sealer.newest()))

    return decode, [signed]


def _sealed() -> tuple[Decode, list[bytes]]:
    sealer = _sealer()
    key = manifest.pointer_key("index")
    return lambda data: sealer.open(key, data), [sealer.seal(key, b"content" * 9, sealer.newest())]


def _archive() -> tuple[Decode, list[bytes]]:
    scratch = _Scratch()

    def decode(plain: bytes) -> object:
        scratch.fresh("img")
        archive.unpack(chunks.compress(plain), len(plain), scratch.path / "img", scratch.path / "layer")
        return sorted(path.name for path in scratch.path.iterdir())

    return decode, [msgpack.packb({"images": {"core-1.img": b"core", "fs-1.img": b"x" * 30, "pstree.img": b""}, "layer": b"layer"})]


def _archive_bombs() -> list[bytes]:
    size = 8 * MB
    start = b"\x82\xa6images"
    return [
        _many(b"\x80", size),
        start + _many_keys(size, b"\xc4\x00"),
        start + b"\xdf\xff\xff\xff\xff",
        start + b"\x81\xa1a" + _many(b"\x80", size),
        start + b"\x80\xa5layer" + _many(b"\x90", size),
        start + b"\x81\xa1a\xc6\xff\xff\xff\xff",
    ]


_PARTS = ("upper", "tmp", "shm", "run")


def _layer() -> tuple[Decode, list[bytes]]:
    scratch = _Scratch()
    outside = Path(tempfile.gettempdir()) / f"thaw-fuzz-outside-{os.getpid()}"

    def open_part(part: str) -> int:
        return os.open(scratch.path / part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def decode(data: bytes) -> object:
        scratch.fresh(*_PARTS)
        file = scratch.path / "layer"
        file.write_bytes(data)
        try:
            archive.unpack_layer(file, _PARTS, open_part, {"proc", "dev", "tmp", "run"})
        finally:
            names = {entry.name for entry in os.scandir(scratch.path)}
            if names != {*_PARTS, "layer"} or os.path.lexists(outside):
                raise AssertionError(f"something landed outside: {names}")
        return None

    def packed(*members: tuple[str, str, str, bytes]) -> bytes:
        data = archive.LAYER_MAGIC
        for name, kind, link, content in members:
            member = Member(name.encode(), kind, 0o644, 65534, 65534, 1_700_000_000_000_000_000, len(content), link.encode(), False)  # type: ignore[arg-type]
            encoded = msgspec.msgpack.encode(member)
            data += len(encoded).to_bytes(4, "big") + encoded + content
        return data

    return decode, [
        packed(
            ("tmp", "directory", "", b""),
            ("tmp/a", "file", "", b"x" * 40),
            ("tmp/b", "hard link", "tmp/a", b""),
            ("tmp/p", "pipe", "", b""),
        ),
        packed(("upper/d", "directory", "", b""), ("upper/d/l", "link", "../../..", b""), ("upper/d/l/x", "file", "", b"y")),
        packed(("upper/e", "link", str(outside.parent), b""), (f"upper/e/{outside.name}", "file", "", b""), ("shm/g", "gone", "", b"")),
        packed(("run/../x", "file", "", b""), ("tmp/h", "hard link", "tmp/../../layer", b"")),
    ]


def _layer_bombs() -> list[bytes]:
    member = msgspec.msgpack.encode(Member(b"tmp/x", "file", 0, 0, 0, 0, archive.LAYER_BYTES_MAX, b"", False))
    return [
        archive.LAYER_MAGIC + len(member).to_bytes(4, "big") + member,
        archive.LAYER_MAGIC + b"\xff\xff\xff\xff",
        archive.LAYER_MAGIC + (archive.MEMBER_BYTES_MAX).to_bytes(4, "big") + _many(b"\x80", archive.MEMBER_BYTES_MAX),
    ]


def _chunk() -> tuple[Decode, list[bytes]]:
    plain = bytes(range(256)) * 32
    return lambda data: chunks.decompress(data, len(plain), "a chunk"), [chunks.compress(plain), chunks.compress(os.urandom(len(plain)))]


def _chunk_bombs() -> list[bytes]:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(512 * MB))
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(64 * MB))
    return [bomb, unsized, bomb + bomb]


def _working_set() -> tuple[Decode, list[bytes]]:
    plain = bytes(range(256)) * 64
    long = bytes(MB) + plain
    sizes = {chunks.pack_pages(item): len(item) for item in (plain, long)}

    def decode(data: bytes) -> object:
        return chunks.unpack_pages(data, len(plain) if len(data) < 1200 else len(long), "a working set")

    return decode, list(sizes)


def _working_set_claims() -> tuple[Decode, list[bytes]]:
    """The size comes from a manifest too: here it is the first 8 bytes."""
    packed = chunks.pack_pages(bytes(range(256)) * 64)

    def decode(data: bytes) -> object:
        return chunks.unpack_pages(data[8:], int.from_bytes(data[:8], "big"), "a working set")

    return decode, [(16384).to_bytes(8, "big") + packed]


# CRIU's images


def _page_map_sample() -> bytes:
    entries: list[dict[int, int]] = [{1: 3}, {1: 0x1000, 2: 2, 4: 6}, {1: 0x8000, 5: 5, 4: 2}, {1: 1 << 40, 2: 300, 5: 300, 4: 6}]
    data = struct.pack("<II", 0x54564319, 0x56084025)
    for entry in entries:
        encoded = protobuf.encode(entry)
        data += struct.pack("<I", len(encoded)) + encoded
    return data


def _page_map() -> tuple[Decode, list[bytes]]:
    def decode(data: bytes) -> object:
        return images.parse_page_map(7, data).pages_bytes

    return decode, [_page_map_sample()]


def _page_map_bombs() -> list[bytes]:
    count = images.PAGE_MAP_BYTES_MAX // 6 - 8
    header = _page_map_sample()[:14]
    entry = b"\x02\0\0\0\x28\x01"  # one page at address 0
    return [
        header + entry * count,
        header + b"".join(len(item).to_bytes(4, "little") + item for item in (protobuf.encode({1: n << 13, 5: 1}) for n in range(250_000))),
        bytes(8) + b"\0\0\0\0" * count,
        bytes(images.PAGE_MAP_BYTES_MAX + 1),
    ]


def _files_image() -> tuple[Decode, list[bytes]]:
    regular = protobuf.encode({1: 5, 6: "/data/..2026_11/config", 8: 100, 12: 7})
    encoded = protobuf.encode({1: 1, 2: 5, 3: regular})
    sample = struct.pack("<II", 0x54564319, 0x56303138) + struct.pack("<I", len(encoded)) + encoded
    return lambda data: images.loosen_files(data, lambda path: True), [sample, sample + sample[8:]]


def _protobuf() -> tuple[Decode, list[bytes]]:
    return protobuf.decode, [protobuf.encode({1: 5, 2: "text", 3: [1, 2, 1 << 63], 20: b"\0" * 20})]


# The instance, and the pager


def _response() -> tuple[Decode, list[bytes]]:
    def decode(data: bytes) -> object:
        response = Response()
        for at in range(0, len(data), 7):
            response.take(data[at : at + 7])
            if response.complete:
                break
        return response.status

    return decode, [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nhello",
        b"HTTP/1.0 503 no\r\n\r\nabc",
        b"HTTP/1.1 204 x\r\ncontent-length: 0\r\n\r\n",
    ]


def _order() -> tuple[Decode, list[bytes]]:
    orders = [
        {"op": "serve", "n": 4, "restore": "r", "image": "i", "record": False, "prefetch": True},
        {"op": "stats", "n": 5, "restore": "r"},
    ]
    return worker.decode_order, [msgpack.packb(order) for order in orders]


def _journal() -> tuple[Decode, list[bytes]]:
    def decode(data: bytes) -> object:
        journal = Journal(bytearray(data))
        return list(journal.records())

    memory = bytearray(512)
    journal = Journal(memory)
    for number in range(1, 6):
        journal.append(number, bytes(number * 9))
    journal.reserve(12, 7, 64)
    return decode, [bytes(memory)]


def _events() -> tuple[Decode, list[bytes]]:
    def decode(data: bytes) -> object:
        regions = Regions([Region(0x1000 * n, 0x1000 * n + 0x800, 0x800 * n) for n in range(1, 20)])
        for event in parse(data):
            match event:
                case Fault(address):
                    regions.find(address)
                case Remap(source, target, size):
                    regions.move(source, target, size)
                case Remove(start, end):
                    regions.cut(start, end)
                case Fork():
                    regions = regions.copy()
        return len(regions)

    numbers = [(0x12, 0, 0x2000, 0), (0x13, 9, 0, 0), (0x14, 0x1000, 0x9000, 0x3000), (0x15, 0x2000, 0x4000, 0), (0x16, 0x5000, 0x6000, 0)]
    return decode, [b"".join(array("Q", item).tobytes() for item in numbers)]


DECODERS: dict[str, Decoder] = {
    decoder.name: decoder
    for decoder in (
        Decoder("message", "scaler or agent", (ProtocolError,), lambda: (_use_message, _messages()), "msgpack", _message_bombs, 400),
        Decoder("stream", "whoever connects", (ProtocolError,), _stream),
        Decoder("demand", "producer", (DemandInvalid,), _demand, "msgpack", lambda: [_many(b"\x80", 1 * MB), b"\xdf\xff\xff\xff\xff"]),
        Decoder("traceparent", "producer", (), _traceparent),
        Decoder(
            "functions-topic", "who may write it", (FunctionInvalid,), _functions_topic, "msgpack", lambda: [_many(b"\x80", 1 * MB)], 128
        ),
        Decoder("forecasts-topic", "a scaler", (ForecastInvalid,), _learned, "msgpack", lambda: [_many(b"\x80", 1 * MB)], 128),
        Decoder("state-topic", "a scaler", (ValueError,), _state_topic, "msgpack"),
        Decoder("restores-topic", "a scaler", (), _restores_topic, "msgpack"),
        Decoder("function-yaml", "who calls thaw apply", (FunctionInvalid,), _yaml, "text", _yaml_bombs, 128, slow=True),
        Decoder("function-resource", "who may kubectl apply", (FunctionInvalid,), _resource, "json", slow=True),
        Decoder("seal", "who may write the bucket", (ImageInvalid,), _sealed),
        Decoder("pointer", "who has the ring", (ImageInvalid,), _pointer, "msgpack"),
        Decoder("manifest", "who signs checkpoints", (ImageInvalid,), _manifest, "msgpack", _manifest_bombs, 256),
        Decoder("head", "who signs checkpoints", (ImageInvalid,), _head),
        Decoder("archive", "who signs checkpoints", (ImageInvalid,), _archive, "msgpack", _archive_bombs, 32, slow=True),
        Decoder("layer", "who signs checkpoints", (ImageInvalid,), _layer, bombs=_layer_bombs, slow=True),
        Decoder("chunk", "who signs checkpoints", (ImageInvalid,), _chunk, bombs=_chunk_bombs),
        Decoder("working-set", "who signs checkpoints", (ImageInvalid,), _working_set),
        Decoder(
            "working-set-size",
            "who may write the bucket",
            (ImageInvalid,),
            _working_set_claims,
            bombs=lambda: [b"\0\0\1\0" + bytes(4) + b"x" * 99],
        ),
        Decoder("page-map", "who signs checkpoints", (ImageInvalid,), _page_map, bombs=_page_map_bombs, memory_mb=400),
        Decoder("files-image", "CRIU", (ImageInvalid,), _files_image),
        Decoder("protobuf", "CRIU", (ValueError,), _protobuf),
        Decoder(
            "response", "the function", (ValueError,), _response, bombs=lambda: [b"HTTP/1.1 200 OK\r\n\r\n" + bytes(4 * MB), b"x" * 4 * MB]
        ),
        Decoder("pager-order", "the agent", (PagerError,), _order, "msgpack", lambda: [_many(b"\x80", worker.ORDER_BYTES_MAX)], 128),
        Decoder("pager-journal", "a pager that was killed", (), _journal),
        Decoder("pager-events", "the kernel", (), _events),
    )
}
