"""The demo on a cluster, without one: documents, settings, what is said of requests behind a Service."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import infra
from agent.api.function import from_builtins
from agent.api.records import StartRecord
from infra import tls
from infra.kubernetes.pods import FUNCTION_LABEL, placeholder
from loadgen import driver
from loadgen.checks import FUNCTIONS_DIR
from loadgen.kubernetes.demo import SAMPLES, with_modes
from loadgen.kubernetes.deploy import _settings_file
from loadgen.kubernetes.documents import Sample
from loadgen.kubernetes.site import certificates_for_pods
from loadgen.result import WARM, RequestRecord, collect

MS = 1_000_000


def test_samples_are_functions_with_pods_that_the_restricted_profile_takes(tmp_path: Path) -> None:
    for name in SAMPLES:
        sample = Sample.read(FUNCTIONS_DIR / name / "function.yaml")
        document = sample.function("demo", f"docker.io/library/{name}@sha256:{'0' * 64}", idleSeconds=2.0, checkpoint="off")
        function = from_builtins(document)
        assert (function.spec.policy.idle_seconds, function.spec.policy.checkpoint) == (2.0, "off")
        assert function.spec.files == []
        pod = placeholder(document, digest=function.digest, agent_image="agent:1")
        [own] = [item for item in pod["spec"]["containers"] if item["name"] == "function"]
        assert own["args"] == function.spec.command
        assert own["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and not pod["spec"]["automountServiceAccountToken"]
        service = sample.service("demo")["spec"]
        assert service["selector"].items() <= pod["metadata"]["labels"].items()
        assert service["selector"] == {FUNCTION_LABEL: name}
        assert service["ports"][0]["targetPort"] == function.spec.port


def test_a_sample_brings_what_its_command_names(tmp_path: Path) -> None:
    (tmp_path / "function.yaml").write_text((FUNCTIONS_DIR / "index" / "function.yaml").read_text())
    (tmp_path / "server.py").write_text("")
    sample = Sample.read(tmp_path / "function.yaml")
    assert sample.needs_python
    assert [entry.path for entry in sample.files()] == ["opt/index/server.py"]
    assert "/opt/index/server.py" in sample.document["spec"]["command"]


def test_the_settings_of_the_manifests_with_other_values() -> None:
    documents = yaml.safe_load_all((Path(infra.__file__).parent / "kubernetes/manifests/30-settings.yaml").read_text())
    text = next(item for item in documents if item["kind"] == "ConfigMap")["data"]["thaw.toml"]
    given = {
        "kafka": {"bootstrap_servers": "b:1", "replication_factor": "1"},
        "s3": {"endpoint_url": 'http://"s"'},
        "telemetry": {"log_level": "DEBUG"},
    }
    before, after = tomllib.loads(text), tomllib.loads(_settings_file(text, given))
    for section, fields in given.items():
        before.setdefault(section, {}).update(fields)
    assert after == before


def test_what_waited_behind_a_service_waited_for_the_last_start_before_its_answer() -> None:
    def record(number: int, mode: str, intended_ms: int, response_ms: int) -> RequestRecord:
        return RequestRecord(
            number=number, function="f", row=0, mode=mode, intended_ns=intended_ms * MS, response_ns=response_ms * MS, outcome="ok"
        )

    def start(ended_ms: int, mode: str, *, function: str = "f", outcome: str = "ready") -> StartRecord:
        return StartRecord(
            command_id=str(ended_ms), function=function, instance=f"i{ended_ms}", start_mode=mode, outcome=outcome, ended_ns=ended_ms * MS
        )  # type: ignore[arg-type]

    service = driver.SERVICE
    result = collect([record(0, service, 0, 100), record(1, WARM, 0, 9), record(2, service, 50, 100), record(3, service, 95, 100)])
    starts = [
        start(40, "cold"),
        start(90, "restore"),
        start(95, "cold", function="g"),
        start(96, "cold", outcome="failed"),
        start(101, "cold"),
    ]
    found = {item.number: (item.mode, item.instance) for item in with_modes(result, starts, set()).records}
    assert found == {0: ("restore", "i90"), 1: (WARM, ""), 2: ("restore", "i90"), 3: (WARM, "")}
    assert with_modes(result, starts, set()).latency["restore"].n == 2


def test_pods_of_the_demo_trust_each_other(tmp_path: Path) -> None:
    for role, name in (("agent", "any-node"), ("scaler", "")):
        files = certificates_for_pods()[role]
        for file, content in files.items():
            (tmp_path / file).write_text(content)
        tls.Credentials(tmp_path / "ca.crt", tmp_path / "tls.crt", tmp_path / "tls.key", role, name)
