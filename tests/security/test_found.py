"""What fuzzing and reading have found, one input each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.api import messages
from agent.api.function import from_builtins, read_yaml
from agent.errors import FunctionInvalid, ImageInvalid, PagerError, ProtocolError
from agent.furnish import last_output
from agent.pager import worker
from agent.ready import HEAD_BYTES_MAX, Response
from agent.store import chunks, manifest
from scaler import demand, dormant
from scaler.errors import DemandInvalid, ForecastInvalid
from tests.security import decoders

POD = decoders._YAML_POD


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param('kind: !!int ""', "not valid YAML", id="an index error in the library"),
        pytest.param("kind: !!timestamp x", "not valid YAML", id="an attribute error"),
        pytest.param("kind: !!bool maybe", "not valid YAML", id="a key error"),
        pytest.param(POD.replace("[&v {name: a, emptyDir: {}}, *v]", "&r [*r]"), "aliases stand for", id="a list in itself"),
        pytest.param(decoders._yaml_bombs()[0].decode(), "aliases stand for", id="aliases of aliases"),
        pytest.param(decoders._yaml_bombs()[1].decode(), "aliases stand for", id="merges of merges"),
        pytest.param(decoders._YAML.replace("python3", '"\\ud800"'), "not valid YAML|is not text", id="half a character"),
        pytest.param(POD.replace("emptyDir: {}", "emptyDir: " + "[" * 80 + "]" * 80), "levels", id="deep"),
        pytest.param("a" * (1 << 20) + "b", "is the most", id="long"),
    ],
)
def test_documents(text: str, said: str) -> None:
    with pytest.raises(FunctionInvalid, match=said):
        read_yaml(text, "f.yaml", Path("/"))


def test_a_function_in_a_command_is_checked_as_a_document_is() -> None:
    """A scaler's word is not enough: the name is part of paths and of keys in the store."""
    good = messages.encode(messages.Start(id="c", deadline_ns=1, function=decoders._function()))
    for old, new in ((b"\xa5index", b"\xa5../ab"), (b"/srv/server.py", b"/../etc/passwd")):
        assert old in good and len(old) == len(new)
        with pytest.raises(ProtocolError):
            messages.decode(good.replace(old, new))
    assert messages.decode(good)


def test_times_of_demand_can_be_calculated_with() -> None:
    good = demand.DemandEvent(function="f", source="s", epoch=1, seq=1, at=1 << 62, in_flight=1)
    assert demand.decode(demand.encode(good)) == good
    with pytest.raises(DemandInvalid):
        demand.decode(demand.encode(msgspec.structs.replace(good, at=(1 << 64) - 1)))


@pytest.mark.parametrize("key", ["²", "1" * 5000, "01", "-1"])
def test_pages_are_named_by_numbers(key: str) -> None:
    sample = decoders._manifest_sample()
    bad = manifest.encode(decoders._manifest_sample(pages={key: sample.pages["1"]}))
    with pytest.raises(ImageInvalid):
        manifest.decode(bad, manifest.name(bad))


def test_a_working_set_cannot_be_larger_than_its_bytes_allow() -> None:
    with pytest.raises(ImageInvalid, match="cannot hold"):
        chunks.unpack_pages(b"\0" * 100, 1 << 44, "it")


@pytest.mark.parametrize("answer", [b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 2\xc2\xb200 x\r\n\r\n", b"", b"HTTP/1.x 200 OK\r\n\r\n"])
def test_an_answer_without_a_status(answer: bytes) -> None:
    response = Response()
    response.take(answer)
    with pytest.raises(ValueError, match=r"HTTP|empty"):
        _ = response.status


def test_a_header_without_end_byte_by_byte_takes_no_time() -> None:
    response = Response()
    with pytest.raises(ValueError, match="header of more than"):
        for _ in range(HEAD_BYTES_MAX + 2):
            response.take(b"x")


@pytest.mark.parametrize("order", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x80", b"\x81\xa2op\x01"])
def test_the_pager_survives_what_is_no_order(order: bytes) -> None:
    with pytest.raises(PagerError):
        worker.decode_order(order)


@pytest.mark.parametrize(
    "change", [{2: 5}, {2: [[1, b"\xff", b"\0\0\0\0"], []]}, {2: [[1, b"\x01", b"\0\x7e\0\x7e"], []]}, {3: {1: -1.0}}, {1: [1]}]
)
def test_a_forecast_that_no_scaler_wrote(change: dict[int, Any]) -> None:
    _, samples = decoders._learned()
    value = msgspec.msgpack.decode(samples[0])
    for at, other in change.items():
        value[at] = other
    with pytest.raises(ForecastInvalid):
        dormant.unpack_learned(msgspec.msgpack.encode(value), (decoders._CONFIG, decoders._COSTS))


def test_the_end_of_an_endless_output_is_read_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(1 << 42)
        file.seek(0, 2)
        file.write(b"the end\n")
    assert last_output(log, 10).endswith("the end")


def test_a_document_of_a_pod_is_counted() -> None:
    template = {"spec": {"containers": [{"name": "a", "image": "b"}], "x": [[0] * 400] * 400}}
    with pytest.raises(FunctionInvalid, match="values"):
        from_builtins({"metadata": {"name": "f"}, "spec": {"command": ["x"], "port": 1, "template": template}})
