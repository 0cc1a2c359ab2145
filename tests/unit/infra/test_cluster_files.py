from __future__ import annotations

import base64
import json
import stat
import tomllib
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from infra import settings as settings_module
from infra.errors import ClusterError
from infra.kubernetes.cluster import certificates, configuration
from infra.kubernetes.cluster.layout import CONTAINERD_SOCKET, PAUSE_IMAGE, Layout


def layout_in(folder: Path, subnet: str = "198.19.0.0/16") -> Layout:
    return Layout.of(settings_module.load(environment={}, flags={"paths.state_dir": folder, "cluster.subnet": subnet}))


def test_addresses_do_not_overlap(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    nodes = [layout.node(number) for number in (1, 2, 60)]
    ranges = [*(node.pods for node in nodes), layout.services]
    assert all(one.subnet_of(layout.network) for one in ranges)
    assert not any(one.overlaps(other) for one, other in combinations(ranges, 2))
    assert all(node.pods.subnet_of(layout.pods) for node in nodes)
    # kube-proxy masquerades what comes from outside of the pods' range: nodes and machine must be outside.
    assert not any(address in layout.pods for address in (layout.machine, *(node.address for node in nodes)))
    assert len({layout.machine, *(node.address for node in nodes)}) == 4


@pytest.mark.parametrize("subnet", ["198.19.0.0/24", "198.19.0.1/16", "fd00::/16", "here"])
def test_unusable_networks_are_refused(subnet: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cluster\.subnet must"):
        layout_in(tmp_path, subnet)


@pytest.mark.parametrize("number", [0, 61])
def test_unusable_node_counts_are_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="1 to 60 nodes"):
        layout_in(tmp_path).node(number)


def test_nodes_are_those_that_have_a_folder(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    assert layout.nodes == []
    for number in (10, 2, 1):
        layout.node(number).home.mkdir(parents=True)
    assert [node.number for node in layout.nodes] == [1, 2, 10]


def test_files_of_a_node_agree_with_each_other(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    node = layout.node(2)
    files = configuration.files(layout, node)
    containerd = tomllib.loads(files["containerd.toml"])
    cri = containerd["plugins"]["io.containerd.grpc.v1.cri"]
    kubelet = yaml.safe_load(files["kubelet.yaml"])
    assert kubelet["containerRuntimeEndpoint"] == f"unix://{containerd['grpc']['address']}" == f"unix://{CONTAINERD_SOCKET}"
    assert cri["sandbox_image"] == PAUSE_IMAGE
    assert cri["containerd"]["runtimes"]["runc"]["options"] == {"SystemdCgroup": False}
    assert kubelet["cgroupDriver"] == "cgroupfs"
    assert Path(cri["cni"]["conf_dir"]) / "10-thaw.conflist" == node.home / "cni/10-thaw.conflist"
    addresses = json.loads(files["cni/10-thaw.conflist"])["plugins"][0]["ipam"]["ranges"][0][0]
    assert addresses == {"subnet": "198.19.66.0/24", "gateway": "198.19.66.1"}
    assert kubelet["address"] == yaml.safe_load(files["kube-proxy.yaml"])["bindAddress"] == str(node.address)


def test_command_lines_name_files_that_are_made(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    node = layout.node(1)
    certificates.write(layout, [node])
    tools = Path("/tools")
    commands = [
        configuration.apiserver(layout, tools),
        configuration.controller_manager(layout, tools),
        configuration.scheduler(layout, tools),
        configuration.kubelet(layout, node, tools),
    ]
    named = {word.partition("=")[2] for command in commands for word in command if str(layout.keys) in word} - {str(layout.keys)}
    kubelet = yaml.safe_load(configuration.kubelet_yaml(layout, node))
    named |= {kubelet["tlsCertFile"], kubelet["tlsPrivateKeyFile"], kubelet["authentication"]["x509"]["clientCAFile"]}
    named.add(yaml.safe_load(configuration.kube_proxy_yaml(layout, node))["clientConnection"]["kubeconfig"])
    assert len(named) == 14
    assert [name for name in named if not Path(name).exists()] == []


def test_certificates_are_issued_once_and_by_one_authority(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    certificates.write(layout, [layout.node(1)])
    before = {path.name: path.read_bytes() for path in layout.keys.iterdir()}
    certificates.write(layout, [layout.node(1), layout.node(2)])
    assert {name: (layout.keys / name).read_bytes() for name in before} == before
    assert (layout.keys / "node-2.kubeconfig").exists()
    authority = x509.load_pem_x509_certificate((layout.keys / "ca.crt").read_bytes())
    for path in layout.keys.glob("*.crt"):
        x509.load_pem_x509_certificate(path.read_bytes()).verify_directly_issued_by(authority)
    assert {stat.S_IMODE(path.stat().st_mode) for path in layout.keys.iterdir()} == {0o600}
    assert stat.S_IMODE(layout.keys.stat().st_mode) == 0o700


def test_certificates_say_who_one_is(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    certificates.write(layout, [layout.node(1)])
    server = x509.load_pem_x509_certificate((layout.keys / "apiserver.crt").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {layout.node(1).address, layout.api_service} <= set(names.get_values_for_type(x509.IPAddress))
    value = yaml.safe_load((layout.keys / "node-1.kubeconfig").read_text())
    assert value["clusters"][0]["cluster"]["server"] == layout.api
    content = base64.b64decode(value["users"][0]["user"]["client-certificate-data"])
    assert x509.load_pem_x509_certificate(content).subject.rfc4514_string() == "CN=system:node:node-1,O=system:nodes"
