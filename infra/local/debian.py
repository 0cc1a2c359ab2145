"""Debian as a source of packages: what is missing, and upstream tarballs of any suite.

In: package lists beside this file, and the machine's own apt configuration (never an address of ours). Out: names of
missing packages for ``scripts/setup`` and error messages, and source tarballs for :mod:`infra.local.criu`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.errors import InstallError
from infra.local import install

PACKAGE_LIST = Path(__file__).with_name("packages.txt")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def packages(group: str, text: str | None = None) -> list[str]:
    """Return the entries of one group of ``packages.txt``, unchanged."""
    lines = [line for line in (PACKAGE_LIST.read_text() if text is None else text).splitlines() if line[:1] != "#"]
    found = [line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() == group]
    return [entry for entries in found for entry in entries]


def missing(*groups: str) -> list[str]:
    """Return the packages of some groups that this machine lacks; all of them where there is no dpkg."""
    entries = list(dict.fromkeys(entry for group in groups for entry in packages(group)))
    wanted = [entry.partition("?") for entry in entries]
    names = [(choice.split("|")) for choice, _, command in wanted if not command or shutil.which(command) is None]
    there = _installed([name for choice in names for name in choice])
    lacking = [choice for choice in names if not there.intersection(choice)]
    return [choice[0] if len(choice) == 1 else _first_known(choice) for choice in lacking]


def _installed(names: Sequence[str]) -> set[str]:
    if not names or shutil.which("dpkg-query") is None:
        return set()
    command = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {line.split()[0] for line in shown.splitlines() if line.endswith(" installed")}


def _first_known(choice: Sequence[str]) -> str:
    """Return the first alternative that this Debian release has."""
    for name in choice:
        if shutil.which("apt-cache") is None:
            break
        shown = subprocess.run(["apt-cache", "show", "--no-all-versions", name], capture_output=True, check=False)
        if shown.returncode == 0:
            return name
    return choice[0]


def require(group: str, purpose: str) -> None:
    """Check that the packages of a group are installed.

    Raises:
        InstallError: some are not; the message has the command that installs them.
    """
    lacking = missing(group)
    if lacking:
        raise InstallError(
            f"{purpose} needs Debian packages that are missing; run `make setup`, or: "
            f"apt-get install --no-install-recommends {' '.join(lacking)}"
        )


def source_tarball(name: str, version: str, suites: Sequence[str], folder: Path, log: Path) -> Path:
    """Fetch the upstream tarball of a Debian source package by apt, without touching the machine's apt state.

    Args:
        name: source package.
        version: upstream version; any Debian revision of it has the same tarball.
        suites: where to look, in this order.
        folder: an empty folder for apt's state and the tarball.
        log: gets apt's output.

    Raises:
        InstallError: no suite has it, or apt failed.
    """
    for kind in ("lists/partial", "cache/archives/partial", "sources"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    apt = [
        *("-o", "Dir::Etc::sourcelist=/dev/null"),
        *("-o", f"Dir::Etc::sourceparts={folder / 'sources'}"),
        *("-o", f"Dir::State::lists={folder / 'lists'}"),
        *("-o", f"Dir::Cache={folder / 'cache'}"),
        # The digest pins the content, so a mirror frozen in the past is as good as today's.
        *("-o", "Acquire::Check-Valid-Until=false"),
        *("-o", "APT::Sandbox::User="),
        *("-o", "Acquire::Retries=3"),
    ]
    mirror = _mirror()
    for suite in suites:
        entry = f"Types: deb-src\nURIs: {mirror}\nSuites: {suite}\nComponents: main\n"
        if _KEYRING.exists():
            entry += f"Signed-By: {_KEYRING}\n"
        (folder / "sources" / "source.sources").write_text(entry)
        install.run(["apt-get", "update", *apt], what=f"reading Debian {suite}'s list of sources", log=log)
        shown = install.run(["apt-cache", "showsrc", *apt, name], what=f"looking up {name}", log=log)
        found = re.findall(rf"^Version: ({re.escape(version)}-\S+)$", shown, re.MULTILINE)
        if not found:
            continue
        command = ["apt-get", "source", "--tar-only", "--download-only", *apt, f"{name}={found[0]}"]
        install.run(command, what=f"fetching the source of {name} {version}", log=log, cwd=folder)
        tarballs = sorted(folder.glob(f"{name}_{version}.orig.tar.*"))
        if tarballs:
            return tarballs[0]
    raise InstallError(f"Debian {' or '.join(suites)} has no source of {name} {version}")


def _mirror() -> str:
    """Return the Debian mirror that this machine's apt is configured to use."""
    command = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError as error:
        raise InstallError("CRIU's source comes from Debian by apt-get, which this machine does not have") from error
    for line in shown.splitlines():
        origin, label, uri = line.split("|", 2)
        if origin == label == "Debian":
            return uri
    raise InstallError("apt knows no Debian mirror; run `apt-get update` as root on a Debian machine first")


if __name__ == "__main__":
    # `python3 -m infra.local.debian GROUP…`, for scripts/setup; must run with the standard library alone.
    print(" ".join(missing(*sys.argv[1:])))
