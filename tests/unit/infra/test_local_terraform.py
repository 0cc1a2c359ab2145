"""Where providers come from: the setting first, then the usual places, never a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import settings as settings_module
from infra.errors import InstallError
from infra.local import terraform
from infra.local.terraform import Terraform
from infra.settings import Settings


def with_mirror(folder: Path | str) -> Settings:
    return settings_module.load(environment={"THAW_STACK_TERRAFORM_MIRROR": str(folder)})


def mirror(folder: Path) -> Path:
    path = folder / "registry.terraform.io" / "hashicorp" / "aws" / "5.100.0" / "linux_amd64" / "terraform-provider-aws_v5.100.0_x5"
    path.parent.mkdir(parents=True)
    path.touch()
    return folder


def test_the_setting_names_a_mirror(tmp_path: Path) -> None:
    assert terraform.aws_mirror(with_mirror(mirror(tmp_path / "mine"))) == tmp_path / "mine"
    with pytest.raises(InstallError, match=r"stack\.terraform_mirror: .*empty has no registry\.terraform\.io/hashicorp/aws"):
        terraform.aws_mirror(with_mirror(tmp_path / "empty"))


def test_else_a_usual_place_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terraform, "_SOFTWARE", tmp_path / "software")
    monkeypatch.setattr(terraform, "_USUAL_PLACES", (str(tmp_path / "plugins"),))
    assert terraform.aws_mirror(with_mirror("")) is None
    found = mirror(tmp_path / "software" / "something")
    assert terraform.aws_mirror(with_mirror("")) == found
    assert terraform.aws_mirror(with_mirror(mirror(tmp_path / "plugins"))) == tmp_path / "plugins"


@pytest.mark.parametrize("aws", [True, False])
def test_the_environment_leads_to_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aws: bool) -> None:
    for name in ("TF_VAR_bucket", "AWS_ACCESS_KEY_ID", "KUBECONFIG"):
        monkeypatch.setenv(name, "the user's")
    tools = Terraform(Path("terraform"), tmp_path / "ours", tmp_path / "mirror" if aws else None)
    environment = tools.environment(tmp_path / "home")
    assert not {"TF_VAR_bucket", "AWS_ACCESS_KEY_ID", "KUBECONFIG"} & set(environment)
    text = Path(environment["TF_CLI_CONFIG_FILE"]).read_text()
    assert "direct" not in text
    assert text.count("filesystem_mirror") == (2 if aws else 1)
    assert '"hashicorp/kubernetes", "mongey/kafka"' in text


def test_only_this_version_of_the_machines_own_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "terraform"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for said, taken in (('{"terraform_version": "1.11.4"}', True), ('{"terraform_version": "1.5.7"}', False), ("Terraform v1.11.4", False)):
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
        assert (terraform._own() == program) == taken
