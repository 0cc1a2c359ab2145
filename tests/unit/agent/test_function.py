"""Function documents: what is wrong is told with line and field."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.api.function import from_builtins, read_yaml, to_builtins
from agent.errors import FunctionInvalid

GOOD = """\
apiVersion: thaw.dev/v1
kind: Function
metadata:
  name: index
spec:
  command: [python3, server.py]
  port: 8080
  files:
    - {source: server.py, target: /srv/server.py}
  limits:
    memoryMb: 512
"""


def read(text: str) -> None:
    read_yaml(text, "f.yaml", Path("/base"))


def test_a_good_document() -> None:
    (function,) = read_yaml(GOOD, "f.yaml", Path("/base"))
    assert function.name == "index"
    assert function.spec.files[0].source == "/base/server.py"
    assert function.spec.limits.memory_mb == 512
    assert from_builtins(to_builtins(function)) == function


def test_what_get_prints_can_be_applied() -> None:
    (function,) = read_yaml(GOOD, "f.yaml", Path("/base"))
    printed = yaml.safe_dump({**to_builtins(function), "status": {"rung": "cached"}})
    assert read_yaml(printed, "f.yaml", Path("/elsewhere")) == [function]


def test_several_documents() -> None:
    assert len(read_yaml(f"---\n~\n---\n---\n{GOOD}", "f.yaml", Path("/base"))) == 1
    assert len(read_yaml(GOOD + "---\n" + GOOD.replace("index", "other"), "f.yaml", Path("/"))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("port: 8080", "port: 80800"), "f.yaml:7: spec.port"),
        (("port: 8080", "port: http"), "f.yaml:7: spec.port"),
        (("memoryMb: 512", "memoryMb: 1"), "f.yaml:11: spec.limits.memoryMb"),
        (("memoryMb: 512", "memory: 512"), "f.yaml:11: spec.limits: Object contains unknown field `memory`"),
        (("name: index", "name: Index_1"), "f.yaml:4: metadata.name"),
        (("kind: Function", "kind: Pod"), "f.yaml:2: kind"),
        (("target: /srv/server.py", "target: /srv/../etc/passwd"), r"f.yaml:9: spec.files\[0\].target"),
        (("target: /srv/server.py", "target: /proc/x"), r"f.yaml:9: spec.files\[0\].target"),
        (("command: [python3, server.py]", "command: []"), "f.yaml:6: spec.command"),
        (("  port: 8080\n", ""), "missing required field `port`"),
        (("spec:", "spec: ["), r"f.yaml:\d+: not valid YAML"),
        ((GOOD, ""), "no document"),
        ((GOOD, "~"), "no document"),
        ((GOOD, "- 1\n- 2\n"), "f.yaml:1: document"),
    ],
)
def test_a_wrong_document_is_told_with_line_and_field(change: tuple[str, str], said: str) -> None:
    with pytest.raises(FunctionInvalid, match=said):
        read(GOOD.replace(*change))


def test_only_what_shapes_the_process_is_in_the_digest() -> None:
    (one,) = read_yaml(GOOD, "f", Path("/base"))
    (scaled,) = read_yaml(GOOD + "  instances: {max: 50}\n  policy: {idleSeconds: 1}\n", "f", Path("/base"))
    (other,) = read_yaml(GOOD.replace("server.py]", "server.py, --fast]"), "f", Path("/base"))
    assert one.digest == scaled.digest
    assert one.digest != other.digest


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(FunctionInvalid):
        read(text)
