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


TEMPLATE = """\
  template:
    metadata: {labels: {app: index}}
    spec:
      nodeSelector: {disk: fast}
      containers:
        - name: function
          image: registry.example/index@sha256:0
          env: [{name: MODE, value: full}]
          resources: {limits: {memory: 512Mi}}
"""


def templated(text: str = TEMPLATE, head: str = GOOD):
    (function,) = read_yaml(head + text, "f", Path("/base"))
    return function


@pytest.mark.parametrize(
    ("old", "new", "other_process"),
    [
        ("index@sha256:0", "index@sha256:1", True),
        ("value: full", "value: fast", True),
        ("containers:", "securityContext: {runAsUser: 7}\n      containers:", True),
        ("containers:", "aFieldOfTomorrow: 1\n      containers:", True),
        ("limits: {memory: 512Mi}", "limits: {memory: 1Gi}", False),
        ("disk: fast", "disk: slow", False),
        ("{app: index}", "{app: other}", False),
        ("image:", "imagePullPolicy: Never\n          image:", False),
    ],
)
def test_the_pod_is_in_the_digest_as_far_as_it_shapes_the_process(old: str, new: str, other_process: bool) -> None:
    assert (templated().digest != templated(TEMPLATE.replace(old, new)).digest) == other_process


def test_the_order_of_a_pods_fields_is_of_no_meaning_and_the_namespace_is() -> None:
    turned = TEMPLATE.replace("[{name: MODE, value: full}]", "[{value: full, name: MODE}]")
    assert templated(turned).digest == templated().digest
    elsewhere = GOOD.replace("name: index", "name: index\n  namespace: b")
    assert templated(head=elsewhere).digest != templated().digest
    # Without a template nothing has changed: checkpoints that exist stay valid.
    assert templated("", elsewhere).digest == templated("").digest == read_yaml(GOOD, "f", Path("/base"))[0].digest


def test_a_template_goes_through_the_wire() -> None:
    assert from_builtins(to_builtins(templated())) == templated()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("image: registry.example/index@sha256:0", "image: ''", r"spec.template.spec.containers\[0\].image"),
        ("- name: function", "- nome: function", r"spec.template.spec.containers\[0\].name"),
        (TEMPLATE, "  template: {spec: {}}", "spec.template.spec.containers"),
        (TEMPLATE, "  template: {}", "spec.template"),
        ("value: full", "value: 2026-01-01", r"spec.template.spec.containers\[0\].env\[0\].value"),
        ("value: full", "value: 99999999999999999999", r"spec.template.spec.containers\[0\].env\[0\].value"),
    ],
)
def test_a_wrong_template_is_told_with_its_field(old: str, new: str, said: str) -> None:
    with pytest.raises(FunctionInvalid, match=said):
        templated(TEMPLATE.replace(old, new))
