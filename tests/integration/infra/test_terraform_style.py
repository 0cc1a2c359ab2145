"""The shipped Terraform configuration on its own: its form, its own tests, and that it uses only what the published providers have."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import infra
from infra.local.terraform import Terraform
from tests.terraform_workspace import NO_AWS, Workspace

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

TERRAFORM = Path(infra.__file__).parent / "terraform"


def workspace(tools: Terraform, home: Path, root: str) -> Workspace:
    if root not in ("modules/kafka", "modules/kubernetes") and tools.aws is None:
        pytest.skip(NO_AWS)
    made = Workspace(tools, home, root)
    made.init()
    return made


def test_format(terraform_tools: Terraform, tmp_path: Path) -> None:
    command = [str(terraform_tools.program), "fmt", "-check", "-diff", "-recursive", str(TERRAFORM)]
    done = subprocess.run(command, capture_output=True, text=True, env=terraform_tools.environment(tmp_path), check=False)
    assert (done.returncode, done.stdout) == (0, "")


# The example is made of all three modules; those with providers of our own, which start at once, are validated by themselves too.
@pytest.mark.parametrize("root", ["modules/kafka", "modules/kubernetes", "example"])
def test_validate(terraform_tools: Terraform, tmp_path: Path, root: str) -> None:
    found = json.loads(workspace(terraform_tools, tmp_path, root)("validate", "-json"))
    assert (found["valid"], found["diagnostics"]) == (True, [])


@pytest.mark.parametrize("name", ["kafka", "s3", "kubernetes"])
def test_modules_own_tests(terraform_tools: Terraform, tmp_path: Path, name: str) -> None:
    said = workspace(terraform_tools, tmp_path, f"modules/{name}")("test")
    assert "Success!" in said
    assert said.count("... pass") >= 7


@pytest.mark.parametrize("root", ["modules/kafka", "modules/s3", "modules/kubernetes", "example"])
def test_inputs_and_outputs_are_documented(root: str) -> None:
    for name, kind in (("variables.tf", "variable"), ("outputs.tf", "output")):
        for block in (TERRAFORM / root / name).read_text().split(f'\n{kind} "')[1:]:
            assert "\n  description = " in block, block[:40]
            assert kind == "output" or "\n  type " in block, block[:40]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages that are generated from the providers' schemas."""
    folder, lock = tmp_path_factory.mktemp("wheels"), TERRAFORM / "testing" / "schemas.lock"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", str(lock), "-d", str(folder)]
    subprocess.run(command, check=True)
    return folder


def published(wheels: Path, folder: Path, package: str) -> Path:
    """Unpack one of the packages."""
    with zipfile.ZipFile(next(wheels.glob(f"{package}*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
    return folder / package


def arguments(module: Path, name: str) -> set[str]:
    """Parameters of a class's ``__init__``."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return {argument.arg for argument in [*item.args.args, *item.args.kwonlyargs]}
    raise AssertionError(f"{module} has no {name}")


def offered(tools: Terraform, home: Path, module: str, provider: str) -> dict[str, Any]:
    """What our provider, against which the modules are validated, says that it has."""
    schemas = json.loads(workspace(tools, home, f"modules/{module}")("providers", "schema", "-json"))
    schema: dict[str, Any] = schemas["provider_schemas"][f"registry.terraform.io/{provider}"]
    return schema


def fields(block: dict[str, Any]) -> set[str]:
    return {*block.get("attributes", {}), *block.get("block_types", {})} - {"id"}


def test_kubernetes_manifest_as_published(terraform_tools: Terraform, tmp_path: Path, wheels: Path) -> None:
    ours = offered(terraform_tools, tmp_path / "work", "kubernetes", "hashicorp/kubernetes")
    package = published(wheels, tmp_path, "cdktf_cdktf_provider_kubernetes")
    manifest = package / "manifest" / "__init__.py"
    block = ours["resource_schemas"]["kubernetes_manifest"]["block"]
    wait = block["block_types"]["wait"]["block"]
    assert fields(block) <= arguments(manifest, "ManifestConfig")
    assert fields(block["block_types"]["field_manager"]["block"]) <= arguments(manifest, "ManifestFieldManager")
    assert fields(wait) <= arguments(manifest, "ManifestWait")
    assert fields(wait["block_types"]["condition"]["block"]) <= arguments(manifest, "ManifestWaitCondition")
    assert fields(ours["provider"]["block"]) <= arguments(package / "provider" / "__init__.py", "KubernetesProviderConfig")


def test_kafka_as_published(terraform_tools: Terraform, tmp_path: Path, wheels: Path) -> None:
    ours = offered(terraform_tools, tmp_path / "work", "kafka", "mongey/kafka")
    package = published(wheels, tmp_path, "pulumi_kafka")
    # There the two that would hide a name of the language have a prefix.
    acl = {name.replace("acl_resource_", "resource_") for name in arguments(package / "acl.py", "AclArgs")}
    assert fields(ours["resource_schemas"]["kafka_acl"]["block"]) <= acl
    assert fields(ours["resource_schemas"]["kafka_topic"]["block"]) <= arguments(package / "topic.py", "TopicArgs")
    assert fields(ours["provider"]["block"]) <= arguments(package / "provider.py", "ProviderArgs")
