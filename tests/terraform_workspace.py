"""A copy of the shipped Terraform configuration, and what a person would type there."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import infra
from infra.local.terraform import Terraform

_INFRA = Path(infra.__file__).parent
ENOUGH_S = 280
#: hashicorp/aws can't be built here: where no mirror has it, what needs it is left out, with this sentence.
NO_AWS = "hashicorp/aws is in no mirror of this machine: set THAW_STACK_TERRAFORM_MIRROR to a folder made by `terraform providers mirror`"
_COLOURED = ("apply", "destroy", "init", "plan", "test", "validate")


class Workspace:
    """``infra/terraform`` and the manifests in a folder of the test's own."""

    def __init__(self, terraform: Terraform, home: Path, root: str, **environment: str) -> None:
        """Copy, and choose where commands run.

        Args:
            terraform: what runs them.
            home: an empty folder.
            root: folder below infra/terraform, such as ``example``.
            environment: more variables of Terraform.
        """
        self._program = terraform.program
        self._environment = {**terraform.environment(home / "home"), **environment}
        copy = home / "infra"
        for name in ("terraform/modules", "terraform/example", "kubernetes/manifests"):
            shutil.copytree(_INFRA / name, copy / name, ignore=shutil.ignore_patterns(".terraform*"))
        self.folder = copy / "terraform" / root

    def write(self, name: str, text: str) -> None:
        """Put a file into the folder."""
        (self.folder / name).write_text(text)

    def variables(self, **values: Any) -> None:
        """Set variables for all further commands."""
        self.write("test.auto.tfvars.json", json.dumps(values))

    def __call__(self, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run one command; returns what it said."""
        plain = ["-no-color"] if words[0] in _COLOURED else []
        command = [str(self._program), words[0], *plain, *words[1:]]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=ENOUGH_S,
            check=False,
        )
        assert done.returncode in codes, f"terraform {' '.join(words)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def init(self) -> None:
        """Install modules and providers."""
        self("init", "-input=false")

    def apply(self, *words: str) -> str:
        """Make it so, then see that a second plan has nothing to do."""
        said = self("apply", "-auto-approve", "-input=false", *words)
        self.nothing_to_do(*words)
        return said

    def nothing_to_do(self, *words: str) -> None:
        """The plan is empty (exit code 2 of -detailed-exitcode: it is not)."""
        self("plan", "-detailed-exitcode", "-input=false", *words)

    def destroy(self) -> None:
        """Remove all of it; nothing to be done, as after an earlier call, takes no providers, whose start costs the most."""
        state = self.folder / "terraform.tfstate"
        if not state.exists() or not json.loads(state.read_text())["resources"]:
            return
        self("destroy", "-auto-approve", "-input=false")
        assert self("state", "list").strip() == ""

    def outputs(self) -> dict[str, Any]:
        """Values of all outputs, the sensitive ones too."""
        return {name: output["value"] for name, output in json.loads(self("output", "-json")).items()}


@contextlib.contextmanager
def running_aws(terraform: Terraform, home: Path) -> Iterator[dict[str, str]]:
    """Run hashicorp/aws once for many commands: its start and its schema are most of what one takes.

    Args:
        terraform: has a mirror with it.
        home: a folder for its settings, and for what it says.

    Yields:
        Variables with which Terraform uses it (https://developer.hashicorp.com/terraform/plugin/debugging).
    """
    assert terraform.aws is not None
    command = [max(terraform.aws.glob("registry.terraform.io/hashicorp/aws/*/linux_amd64/terraform-provider-aws_v*")), "-debug"]
    environment = terraform.environment(home)
    with (home / "aws.log").open("w") as log, subprocess.Popen(command, env=environment, stdout=-1, stderr=log, text=True) as server:
        try:
            assert server.stdout is not None
            setting = next(line for line in server.stdout if "TF_REATTACH_PROVIDERS=" in line)
            (name, _, value) = shlex.split(setting.strip())[0].partition("=")
            yield {name: value}
        finally:
            server.kill()
