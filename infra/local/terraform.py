"""Terraform and providers for the tests of :mod:`infra.terraform`'s modules.

In: Go modules in ``infra/terraform/testing`` with pinned digests: Terraform itself, and a provider of our own that has the resources of
Mongey/kafka and hashicorp/kubernetes. Out: :class:`Terraform`, which runs commands with providers from folders only. Users bring a
Terraform of their own, and providers from the registry.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import InstallError
from infra.local import golang, install
from infra.settings import Settings

VERSION = "1.11.4"
_SOURCES = Path(__file__).parents[1] / "terraform" / "testing"
_PROGRAM = "github.com/hashicorp/terraform"
#: A release build says so; else it warns of being a development version.
_RELEASE = "-X github.com/hashicorp/terraform/version.dev=no"
_PLATFORM = "linux_amd64"
_AWS = f"registry.terraform.io/hashicorp/aws/*/{_PLATFORM}/terraform-provider-aws_v*"
#: Where administrators put software and Terraform looks by itself.
_USUAL_PLACES = (
    "~/.terraform.d/plugins",
    "~/.local/share/terraform/plugins",
    "/usr/local/share/terraform/plugins",
    "/usr/share/terraform/plugins",
)
_SOFTWARE = Path("/opt")
#: What our program stands for. The versions are above those that the modules ask for.
_STANDS_FOR = {"mongey/kafka": "0.99.0", "hashicorp/kubernetes": "2.99.0"}


@dataclass(frozen=True)
class Terraform:
    """A Terraform that downloads nothing.

    Attributes:
        program: what is run.
        providers: the mirror with our own providers.
        aws: a mirror that has hashicorp/aws; None where this machine has none.
    """

    program: Path
    providers: Path
    aws: Path | None

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a run whose configuration and plugins are in ``home``."""
        home.mkdir(parents=True, exist_ok=True)
        mirrors = [_mirror(self.providers, sorted(_STANDS_FOR))]
        if self.aws is not None:
            mirrors.append(_mirror(self.aws, ["hashicorp/aws"]))
        configuration = home / "terraformrc"
        configuration.write_text(f"provider_installation {{\n{''.join(mirrors)}}}\ndisable_checkpoint = true\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "AWS_", "KUBE"))}
        return {**kept, "TF_CLI_CONFIG_FILE": str(configuration), "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}


def ensure(settings: Settings, report: install.Report, *, force: bool = False) -> Terraform:
    """Install what is missing: Terraform takes 5 min on two cores where the machine has none of this version, our providers 1 min.

    Raises:
        InstallError: a module could not be fetched, is not the pinned one, or does not compile.
    """
    program = _own() or _built(settings, report, force)
    return Terraform(program, _providers(settings, report, force), aws_mirror(settings))


def available(settings: Settings, report: install.Report) -> Terraform | None:
    """Return Terraform if the machine has this version or it was built before, with our providers; None if it would have to be built.

    Raises:
        InstallError: a provider could not be built.
    """
    program = _own()
    if program is None and _folder(settings).is_dir():
        program = _built(settings, report, force=False)
    return None if program is None else Terraform(program, _providers(settings, report, force=False), aws_mirror(settings))


def aws_mirror(settings: Settings) -> Path | None:
    """Return a folder laid out as a filesystem mirror that has hashicorp/aws: the setting's, else one in a usual place.

    Raises:
        InstallError: the setting names a folder that has none.
    """
    if settings.stack.terraform_mirror:
        chosen = Path(settings.stack.terraform_mirror).expanduser()
        if not any(chosen.glob(_AWS)):
            raise InstallError(f"stack.terraform_mirror: {chosen} has no {_AWS}; see `terraform providers mirror`")
        return chosen
    usual = [Path(place).expanduser() for place in _USUAL_PLACES]
    below = sorted(path for path in _SOFTWARE.glob("*") if path.is_dir()) if _SOFTWARE.is_dir() else []
    return next((folder for folder in [*usual, *below] if any(folder.glob(_AWS))), None)


def _mirror(folder: Path, providers: Sequence[str]) -> str:
    return f"  filesystem_mirror {{\n    path    = {json.dumps(str(folder))}\n    include = {json.dumps(list(providers))}\n  }}\n"


def _own() -> Path | None:
    """Return the machine's own Terraform, if it is of this version."""
    found = shutil.which("terraform")
    if found is None:
        return None
    environment = {**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1"}
    try:
        shown = subprocess.run([found, "version", "-json"], capture_output=True, text=True, check=True, timeout=30, env=environment).stdout
        return Path(found) if json.loads(shown)["terraform_version"] == VERSION else None
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None


def _folder(settings: Settings) -> Path:
    return settings.paths.cache_dir / f"terraform-{VERSION}-{golang.recipe(_SOURCES / 'terraform')}"


def _built(settings: Settings, report: install.Report, force: bool) -> Path:
    module = _SOURCES / "terraform"
    caches = settings.paths.cache_dir / "terraform-go"

    def build(temporary: Path) -> Sequence[str]:
        report(f"terraform {VERSION}: compiling (about five minutes)")
        log = temporary / "build.log"
        output = temporary / "terraform"
        golang.build(module, _PROGRAM, output, caches=caches, log=log, report=report, variables=_RELEASE, timeout_s=3600)
        install.discard(caches)
        return [output.name]

    home = install.install_folder(_folder(settings), build, report, title=f"Terraform {VERSION}", force=force)
    install.verify_receipt(home)
    return home / "terraform"


def _providers(settings: Settings, report: install.Report, force: bool) -> Path:
    module = _SOURCES / "provider"
    caches = settings.paths.cache_dir / "terraform-providers-go"

    def build(temporary: Path) -> Sequence[str]:
        report("terraform providers for tests: compiling (about a minute)")
        program = temporary / "provider"
        golang.build(module, ".", program, caches=caches, log=temporary / "build.log", report=report)
        install.discard(caches)
        files = []
        for provider, version in _STANDS_FOR.items():
            name = f"terraform-provider-{provider.partition('/')[2]}_v{version}"
            path = temporary / "registry.terraform.io" / provider / version / _PLATFORM / name
            path.parent.mkdir(parents=True)
            # The program tells by its name which provider it is.
            path.hardlink_to(program)
            files.append(str(path.relative_to(temporary)))
        program.unlink()
        return files

    folder = settings.paths.cache_dir / f"terraform-providers-{golang.recipe(module)}"
    home = install.install_folder(folder, build, report, title="Terraform providers for tests", force=force)
    install.verify_receipt(home)
    return home
