"""The manifests agree with what they describe (the Function document, settings, words of the code) and ask for no more than needed."""

from __future__ import annotations

import copy
import functools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

import infra
from agent.api.function import Function, FunctionSpec, PodTemplate, from_builtins
from agent.errors import FunctionInvalid
from infra import settings as settings_module
from infra.tls import identities
from scaler.edges.kubernetes.agents import SELECTOR
from scaler.snapshots import FunctionSnapshot
from tests.function_documents import BAD, GOOD, a_file, document

MANIFESTS = Path(infra.__file__).parent / "kubernetes" / "manifests"
#: Kubernetes' own, and described by it: compared apart.
POD = "template"


def documents() -> list[dict[str, Any]]:
    return [document for path in sorted(MANIFESTS.rglob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]


def named(kind: str, name: str) -> dict[str, Any]:
    [found] = [document for document in documents() if (document["kind"], document["metadata"]["name"]) == (kind, name)]
    return found


def crd_version() -> dict[str, Any]:
    [version] = named("CustomResourceDefinition", "functions.thaw.dev")["spec"]["versions"]
    return version  # type: ignore[no-any-return]


@functools.cache
def schema() -> dict[str, Any]:
    return crd_version()["schema"]["openAPIV3Schema"]  # type: ignore[no-any-return]


# Agreement of fields, bounds and defaults


def described(kind: inspect.Type) -> dict[str, Any]:
    """A msgspec type in the CRD's words, as far as both can say it."""
    if isinstance(kind, inspect.UnionType):
        [other] = [item for item in kind.types if not isinstance(item, inspect.NoneType)]
        return {**described(other), "nullable": True}
    if isinstance(kind, inspect.StructType):
        fields = {field.encode_name: described(field.type) | default(field) for field in kind.fields}
        required = {field.encode_name for field in kind.fields if field.required}
        return {"type": "object", "properties": fields} | ({"required": required} if required else {})
    if isinstance(kind, inspect.ListType):
        bounds = {"minItems": kind.min_length, "maxItems": kind.max_length}
        return {"type": "array", "items": described(kind.item_type)} | {key: value for key, value in bounds.items() if value is not None}
    if isinstance(kind, inspect.DictType):
        return {"type": "object", "additionalProperties": described(kind.value_type)}
    if isinstance(kind, inspect.LiteralType):
        return {"type": "string", "enum": set(kind.values)}
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        name = "integer" if isinstance(kind, inspect.IntType) else "number"
        found: dict[str, Any] = {"type": name, "minimum": kind.ge if kind.gt is None else kind.gt, "maximum": kind.le}
        return found | ({"exclusiveMinimum": True} if kind.gt is not None else {})
    assert isinstance(kind, inspect.StrType), kind
    return {"type": "string"}


def default(field: inspect.Field) -> dict[str, Any]:
    if field.default is not msgspec.NODEFAULT and field.default is not None:
        return {"default": field.default}
    if field.default_factory is not msgspec.NODEFAULT:
        return {"default": [] if field.default_factory is list else {}}
    return {}


#: What the CRD says beyond types: checked by behaviour below.
_BEYOND = {"description", "pattern", "x-kubernetes-validations", "maxProperties", "maxLength", "minLength"}


def in_our_words(node: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in node.items() if key not in _BEYOND}
    for key in ("required", "enum"):
        if key in found:
            found[key] = set(found[key])
    if "properties" in found:
        found["properties"] = {name: in_our_words(child) for name, child in found["properties"].items() if name != POD}
    for key in ("items", "additionalProperties"):
        if key in found:
            found[key] = in_our_words(found[key])
    return found


def test_the_resource_has_the_fields_bounds_and_defaults_of_the_document() -> None:
    kind = inspect.type_info(FunctionSpec)
    assert isinstance(kind, inspect.StructType)
    kind.fields = tuple(field for field in kind.fields if field.encode_name != POD)
    ours, theirs = described(kind), in_our_words(schema()["properties"]["spec"])
    # A list without a bound would make rules over it unaffordable for the API server.
    for name in ("files", "warmUp"):
        assert theirs["properties"][name].pop("maxItems") == 256
    assert theirs == ours
    version = crd_version()["name"]
    group = named("CustomResourceDefinition", "functions.thaw.dev")["spec"]["group"]
    assert f"{group}/{version}" == Function(metadata=_metadata(), spec=FunctionSpec(command=["x"], port=1)).api_version


def _metadata() -> Any:
    return msgspec.convert({"name": "f"}, inspect.type_info(Function).fields[2].type.cls)  # type: ignore[attr-defined]


# Agreement of behaviour


def refused(node: Mapping[str, Any], value: Any, where: str = "") -> Iterator[str]:
    """Where an API server would refuse ``value``: structural schema, and the rules of this CRD."""
    if value is None and ("default" in node or node.get("nullable")):
        return  # null is the default
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    if not isinstance(value, kinds[node["type"]]) or (isinstance(value, bool) and node["type"] != "boolean"):  # type: ignore[arg-type]
        yield f"{where}: not {node['type']}"
        return
    if "enum" in node and value not in node["enum"]:
        yield f"{where}: not one of {node['enum']}"
    if isinstance(value, str):
        if not re.search(node.get("pattern", "").replace("$", r"\Z"), value):
            yield f"{where}: pattern"
        if len(value) > node.get("maxLength", len(value)):
            yield f"{where}: too long"
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = node.get("minimum", value), node.get("maximum", value)
        if value < low or value > high or (value == low and node.get("exclusiveMinimum")):
            yield f"{where}: out of bounds"
    if isinstance(value, list):
        if not node.get("minItems", 0) <= len(value) <= node.get("maxItems", len(value)):
            yield f"{where}: number of items"
        for index, item in enumerate(value):
            yield from refused(node["items"], item, f"{where}[{index}]")
    if isinstance(value, dict):
        for name in set(node.get("required", ())) - set(value):
            yield f"{where}.{name}: missing"
        for name, child in value.items():
            known = node.get("properties", {}).get(name, node.get("additionalProperties"))
            if known is not None:
                yield from refused(known, child, f"{where}.{name}")
            elif not node.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{where}.{name}: unknown"
    for rule in node.get("x-kubernetes-validations", ()):
        if not RULES[rule["rule"]](value):
            yield f"{where}: {rule['message']}"


#: The CRD's rules in Python. A rule that is changed there must be changed here: it is looked up by its text.
RULES = {
    "self[0].size() > 0": lambda words: len(words) == 0 or words[0] != "",
    "!self.matches('(^|/)[.][.](/|$)') && !self.matches('^/+([.]/+)*[.]?$')": lambda path: (
        not re.search(r"(^|/)[.][.](/|\Z)", path) and not re.search(r"^/+([.]/+)*[.]?\Z", path)
    ),
    "!self.matches('^/+([.]/+)*(proc|sys|dev|run|tmp)(/|$)')": lambda path: not re.search(r"^/+([.]/+)*(proc|sys|dev|run|tmp)(/|\Z)", path),
    "(has(self.min) ? self.min : 0) <= (has(self.max) ? self.max : 10)": lambda bounds: bounds.get("min", 0) <= bounds.get("max", 10),
}


def test_every_rule_is_known_here() -> None:
    def rules(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (rule["rule"] for rule in node.get("x-kubernetes-validations", ()))
            for child in node.values():
                yield from rules(child)

    assert sorted(rules(schema())) == sorted(RULES)


def both(document: dict[str, Any]) -> tuple[list[str], str]:
    """What the API server and what the document's own reader have against it."""
    try:
        from_builtins(copy.deepcopy(document))
        ours = ""
    except FunctionInvalid as error:
        ours = str(error)
    body = {key: value for key, value in document.items() if key not in ("apiVersion", "kind")}
    return [*refused({**schema(), "x-kubernetes-preserve-unknown-fields": False}, body)], ours


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_both_take_it(value: dict[str, Any]) -> None:
    assert both(value) == ([], "")


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_both_refuse_it(value: dict[str, Any]) -> None:
    theirs, ours = both(value)
    assert theirs, ours
    assert ours, theirs


def test_null_for_a_default_is_taken_by_kubernetes_alone() -> None:
    theirs, ours = both(document(policy={"delayWeight": None}))
    assert theirs == []
    assert "delayWeight" in ours


@given(st.text(alphabet="/.aprocdevsyntmu\n", max_size=12))
def test_both_agree_on_targets(target: str) -> None:
    theirs, ours = both(a_file(target))
    assert bool(theirs) == bool(ours), (target, theirs, ours)


@given(st.text(alphabet="/ab \r\n?", max_size=6), st.integers(-1, 10002), st.integers(-1, 10002))
def test_both_agree_on_paths_and_bounds(path: str, low: int, high: int) -> None:
    value = document(warmUp=[{"path": path}], readiness={"path": path}, workingDirectory=path, instances={"min": low, "max": high})
    theirs, ours = both(value)
    assert bool(theirs) == bool(ours), (theirs, ours)


def test_the_template_is_a_pod() -> None:
    spec = schema()["properties"]["spec"]["properties"]
    assert set(spec) == {field.encode_name for field in inspect.type_info(FunctionSpec).fields}
    metadata = inspect.type_info(PodTemplate).fields[0].type
    assert set(spec["template"]["properties"]["metadata"]["properties"]) == {field.encode_name for field in metadata.fields}
    pod = {"spec": {"containers": [{"name": "main", "image": "image", "resources": {"limits": {"memory": "64Mi"}}}], "volumes": []}}
    assert [*refused(spec["template"], pod)] == []
    assert [*refused(spec["template"], {"spec": {"containers": []}})] == [".spec.containers: number of items"]
    assert both(document(template=pod)) == ([], "")


# What people see, and what the parts may do


def test_columns_status_and_short_name() -> None:
    crd, version = named("CustomResourceDefinition", "functions.thaw.dev")["spec"], crd_version()
    assert crd["names"]["shortNames"] == ["fn"]
    assert version["subresources"] == {"status": {}}
    columns = {column["name"]: column["jsonPath"] for column in version["additionalPrinterColumns"]}
    assert list(columns) == ["Rung", "Instances", "Standbys", "Checkpoint", "Last start ms", "Age"]
    status = schema()["properties"]["status"]["properties"]
    for path in columns.values():
        assert path == ".metadata.creationTimestamp" or path.removeprefix(".status.") in status
    snapshot = {field.name for field in inspect.type_info(FunctionSnapshot).fields}
    words = {name: re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", name) for name in status}
    assert {word for word in words.values() if word not in snapshot} == {"observed_generation", "conditions", "placeholders"}


def rights(role: str) -> set[tuple[str, str, str]]:
    rules = named("ClusterRole", role)["rules"]
    return {
        (group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    }


def test_least_privilege() -> None:
    look = ("get", "list", "watch")
    scaler = {("thaw.dev", "functions", verb) for verb in look} | {("thaw.dev", "functions/status", verb) for verb in ("get", "patch")}
    scaler |= {("", "pods", verb) for verb in (*look, "create", "delete")} | {("", "pods/resize", "patch")}
    scaler |= {("", "events", verb) for verb in ("create", "patch")}
    assert rights("thaw-scaler") == scaler
    agent = {("", "pods", verb) for verb in look} | {("", "pods/status", "patch"), ("", "events", "create")}
    assert rights("thaw-agent") == agent
    for binding in documents():
        if binding["kind"] == "ClusterRoleBinding":
            [subject] = binding["subjects"]
            assert subject["name"] == binding["roleRef"]["name"] == binding["metadata"]["name"]


def test_only_the_agent_is_privileged() -> None:
    agent = named("DaemonSet", "thaw-agent")["spec"]["template"]["spec"]
    assert (agent["hostPID"], agent["containers"][0]["securityContext"]["privileged"]) == (True, True)
    assert "hostNetwork" not in agent
    scaler = named("Deployment", "thaw-scaler")["spec"]["template"]["spec"]
    [container] = scaler["containers"]
    # The restricted Pod Security Standard.
    assert (scaler["securityContext"]["runAsNonRoot"], scaler["securityContext"]["seccompProfile"]["type"]) == (True, "RuntimeDefault")
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all(set(volume) - {"name"} <= {"configMap", "emptyDir", "secret"} for volume in scaler["volumes"])
    assert not {"hostPID", "hostNetwork", "hostIPC"} & set(scaler)


def test_selectors_find_their_pods() -> None:
    pods = {name: named(kind, name)["spec"] for kind, name in (("DaemonSet", "thaw-agent"), ("Deployment", "thaw-scaler"))}
    for spec in pods.values():
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    agent, scaler = pods["thaw-agent"]["selector"]["matchLabels"], pods["thaw-scaler"]["selector"]["matchLabels"]
    assert named("Service", "thaw-agent")["spec"]["selector"] == agent
    assert named("PodDisruptionBudget", "thaw-scaler")["spec"]["selector"]["matchLabels"] == scaler
    policy = named("NetworkPolicy", "thaw-agent")["spec"]
    assert policy["podSelector"]["matchLabels"] == agent
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": scaler}}]


def test_network_policies_open_only_ports_that_are_there() -> None:
    """The test cluster's network enforces no policy, so that what they say is all that a test can see."""
    closed = named("NetworkPolicy", "thaw-closed")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress"]}, "whatever no other policy opens is closed, for every pod"
    workloads = [item["spec"]["template"] for item in documents() if item["kind"] in ("DaemonSet", "Deployment")]
    opened = [item["spec"] for item in documents() if item["kind"] == "NetworkPolicy" and item["spec"] != closed]
    assert opened
    for spec in opened:
        assert spec["policyTypes"] == ["Ingress"]
        wanted = spec["podSelector"]["matchLabels"].items()
        [ports] = [
            {port["containerPort"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}
            for pod in workloads
            if wanted <= pod["metadata"]["labels"].items()
        ]
        for rule in spec["ingress"]:
            assert rule["ports"] and {port["port"] for port in rule["ports"]} <= ports
            assert rule["from"], "nothing is open to everybody"


def test_pods_read_settings_that_thaw_knows(tmp_path: Path) -> None:
    text = named("ConfigMap", "thaw")["data"]["thaw.toml"]
    file = tmp_path / "thaw.toml"
    file.write_text(text)
    loaded = settings_module.load(file, {})
    agent = named("DaemonSet", "thaw-agent")["spec"]["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"] for mount in agent["volumeMounts"]}
    assert {str(loaded.paths.state_dir), str(loaded.paths.runtime_dir), "/etc/thaw"} <= mounts
    volumes = {volume["name"]: volume for volume in named("DaemonSet", "thaw-agent")["spec"]["template"]["spec"]["volumes"]}
    assert volumes["image-keys"]["secret"] == {"secretName": named("Secret", "thaw-image-keys")["metadata"]["name"], "defaultMode": 0o400}
    assert next(item["value"] for item in agent["env"] if item["name"] == "THAW_IMAGES_KEYS") in mounts
    assert agent["ports"][0]["containerPort"] == loaded.agent.listen_port
    assert loaded.scaler.agents == loaded.scaler.functions == "kubernetes"
    assert loaded.agent.sandboxes == "pods"
    assert loaded.kubernetes.agents_namespace == named("DaemonSet", "thaw-agent")["metadata"]["namespace"]
    assert loaded.kubernetes.agent_image == agent["image"]
    labels = named("DaemonSet", "thaw-agent")["spec"]["template"]["metadata"]["labels"]
    assert sorted(SELECTOR.split(",")) == sorted(f"{key}={value}" for key, value in labels.items())
    assert named("NetworkPolicy", "thaw-agent")["spec"]["ingress"][0]["ports"][0]["port"] == loaded.agent.listen_port
    for kind, name in (("DaemonSet", "thaw-agent"), ("Deployment", "thaw-scaler")):
        pod = named(kind, name)["spec"]["template"]["spec"]
        mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert {str(Path(path).parent) for path in (loaded.tls.ca, loaded.tls.certificate, loaded.tls.key)} == {mounted["tls"]}
        [secret] = [volume["secret"]["secretName"] for volume in pod["volumes"] if volume["name"] == "tls"]
        certificate = named("Certificate", name)["spec"]
        assert certificate["secretName"] == secret
        [identity] = identities(certificate["uris"])
        assert identity.covers(name.removeprefix("thaw-"), "any-node" if name == "thaw-agent" else "")
        assert certificate["usages"][1] == ("server auth" if name == "thaw-agent" else "client auth")
    # Terraform writes what the pods need itself.
    module = (MANIFESTS.parents[1] / "terraform" / "modules" / "kubernetes" / "main.tf").read_text()
    written = tomllib.loads(text)
    for field, value in {**written["paths"], **written["tls"], "listen_port": written["agent"]["listen_port"]}.items():
        assert f"{field} = {json.dumps(str(value))}" in module
    environment = {item["name"]: item.get("value", "x") for item in agent["env"] if item["name"] != "THAW_CONFIG"}
    named_by_environment = settings_module.load(None, environment)
    assert (named_by_environment.agent.node_name, named_by_environment.agent.listen_host) == ("x", "x")


def test_health_and_metrics_are_where_probes_and_prometheus_look() -> None:
    told = tomllib.loads(named("ConfigMap", "thaw")["data"]["thaw.toml"])["telemetry"]
    [endpoint] = named("ServiceMonitor", "thaw")["spec"]["endpoints"]
    for kind, name in (("DaemonSet", "thaw-agent"), ("Deployment", "thaw-scaler")):
        container = named(kind, name)["spec"]["template"]["spec"]["containers"][0]
        [port] = [item for item in container["ports"] if item["name"] == endpoint["port"]]
        assert (port["containerPort"], told["health_host"]) == (told["health_port"], "0.0.0.0")
        probes = {probe: container[f"{probe}Probe"]["httpGet"] for probe in ("startup", "liveness", "readiness")}
        assert {probe: item["path"] for probe, item in probes.items()} == {
            "startup": "/healthz",
            "liveness": "/healthz",
            "readiness": "/readyz",
        }
        assert all(item["port"] == port["name"] for item in probes.values())
        service = named("Service", name)
        assert endpoint["port"] in [item["name"] for item in service["spec"]["ports"]]
        assert named("ServiceMonitor", "thaw")["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert named("NetworkPolicy", "thaw-metrics")["spec"]["ingress"] == [{"ports": [{"port": told["health_port"], "protocol": "TCP"}]}]
    module = (MANIFESTS.parents[1] / "terraform" / "modules" / "kubernetes" / "main.tf").read_text()
    assert f'health_port = "{told["health_port"]}"' in module


def test_terraform_knows_the_sections_of_settings() -> None:
    variables = (MANIFESTS.parents[1] / "terraform" / "modules" / "kubernetes" / "variables.tf").read_text()
    found = re.search(r"contains\(\[(.*?)\], section\)", variables)
    assert found is not None
    assert sorted(json.loads(f"[{found[1]}]")) == sorted(settings_module._sections())


def test_quantities_are_canonical() -> None:
    """The API server writes 1 for 1000m, which Terraform would take for a change by somebody else."""

    def quantities(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("requests", "limits"):
                    yield from value.values()
                elif key == "sizeLimit":
                    yield value
                else:
                    yield from quantities(value)
        elif isinstance(node, list):
            for item in node:
                yield from quantities(item)

    found = [text for kind, name in (("DaemonSet", "thaw-agent"), ("Deployment", "thaw-scaler")) for text in quantities(named(kind, name))]
    assert len(found) >= 6
    for text in found:
        assert re.fullmatch(r"([1-9][0-9]*)(Mi|Gi|)|[1-9][0-9]{0,2}m", text), text
        number = int(re.match(r"[0-9]+", text)[0])  # type: ignore[index]
        assert not (text.endswith("Mi") and number % 1024 == 0), text
