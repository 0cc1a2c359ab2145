"""CRIU: built once from Debian's source as one static file: it runs inside roots that hold only an application.

In: the pinned source tarball, and two patches of ours (``criu-rlimits.patch``: reads limits from /proc where the host
gives no CAP_SYS_RESOURCE; ``criu-worker.patch``: a worker prepares itself while it waits). Out:
``<cache_dir>/criu-<version>-<recipe>/criu``. Next: :mod:`agent.criu` runs it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from infra.errors import InstallError
from infra.local import debian, install
from infra.settings import Settings

VERSION = "4.2.1"
_TARBALL_SHA256 = "29ec0ee09e296479fe7048c80980e8ef1d0684d0b0204c2b101dfea19f6725b9"
_SUITES = ("forky", "sid")
_PATCHES = tuple(Path(__file__).with_name(name) for name in ("criu-rlimits.patch", "criu-worker.patch"))
#: Changes when the build below does, so that an old binary is not taken for a new one.
_RECIPE = "3"
#: pkg-config sees only these, so that the result does not depend on what else the machine has.
_PKG_CONFIG_MODULES = ("libnl-3.0", "libprotobuf-c", "protobuf")
#: A path that nothing can be put in. CRIU runs as root inside roots of functions: a plugin or a configuration there
#: (whose ``action-script`` is a command) would be a way to root. ``$HOME/.criu`` remains: run CRIU without HOME.
_NOWHERE = "/proc/thaw-has-none/"
#: Where CRIU keeps what it learnt of the kernel: a tmpfs folder that the agent hands over as this descriptor (:mod:`agent.criu.tool`).
#: /run of a pod is no tmpfs, and what lies there could be the function's.
_RUN_FOLDER = "/proc/self/fd/102"
_CONFIG_DEFINES = {
    "SYSCONFDIR": _NOWHERE,
    "GLOBAL_CONFIG_DIR": _NOWHERE,
    "DEFAULT_CONFIG_FILENAME": "default.conf",
    "USER_CONFIG_DIR": ".criu/",
}


def folder(settings: Settings) -> Path:
    """Return where this version of CRIU belongs, there or not."""
    patches = b"".join(path.read_bytes() for path in _PATCHES)
    recipe = hashlib.sha256(f"{_RECIPE} {_TARBALL_SHA256}".encode() + patches).hexdigest()[:12]
    return settings.paths.cache_dir / f"criu-{VERSION}-{recipe}"


def criu_path(settings: Settings) -> Path:
    """Return the installed CRIU.

    Raises:
        InstallError: it is not installed yet.
    """
    path = folder(settings) / "criu"
    if not path.is_file():
        raise InstallError(f"CRIU {VERSION} is not installed in {settings.paths.cache_dir}: run `thaw stack install`")
    return path


def installed(settings: Settings) -> bool:
    """Tell whether nothing is left to do."""
    return (folder(settings) / "criu").is_file()


def ensure(settings: Settings, report: install.Report, *, force: bool = False) -> Path:
    """Build and install CRIU unless it is there. Takes 30-60 s on two cores.

    Raises:
        InstallError: a package is missing, the source is not the pinned one, or the build failed.
    """

    def build(temporary: Path) -> Sequence[str]:
        debian.require("criu", f"building CRIU {VERSION}")
        work = temporary / "work"
        work.mkdir()
        try:
            report(f"criu {VERSION}: fetching the source by apt")
            tarball = debian.source_tarball("criu", VERSION, _SUITES, work, temporary / "build.log")
            install.verify(tarball, _TARBALL_SHA256, remedy="this is not the source that Thaw was tested with")
            report(f"criu {VERSION}: compiling (about half a minute)")
            program = _compile(tarball, work, temporary / "build.log")
            shutil.move(program, temporary / "criu")
        except InstallError:
            _keep_log(settings, temporary / "build.log", report)
            raise
        finally:
            install.discard(work)
        return ["criu"]

    home = install.install_folder(folder(settings), build, report, title=f"CRIU {VERSION}", force=force)
    install.verify_receipt(home)
    return home / "criu"


def _compile(tarball: Path, work: Path, log: Path) -> Path:
    install.run(["tar", "-xf", tarball], what="unpacking CRIU", log=log, cwd=work)
    source = work / f"criu-{VERSION}"
    for patch in _PATCHES:
        install.run(["patch", "-p1", "-i", patch], what="patching CRIU", log=log, cwd=source)
    environment = {"PKG_CONFIG_LIBDIR": str(_pkg_config_folder(work)), "SOURCE_DATE_EPOCH": "1", "LC_ALL": "C"}
    jobs = min(os.cpu_count() or 1, 4)
    # The caller may itself run under make or a distribution's build: its flags are not for this build.
    clean = ["env", *(word for name in ("CFLAGS", "LDFLAGS", "MAKEFLAGS", "CC") for word in ("-u", name))]
    settings = ["NO_GNUTLS=1", "V=1", f"PLUGINDIR={_NOWHERE}", f"RUNDIR={_RUN_FOLDER}"]
    settings.append("CONFIG-DEFINES=" + " ".join(f"-D{name}='\"{value}\"'" for name, value in _CONFIG_DEFINES.items()))
    text = install.run(
        [*clean, "make", f"-j{jobs}", *settings, "criu"],
        what="compiling CRIU",
        log=log,
        cwd=source,
        environment=environment,
    )
    # CRIU's makefiles have no static target: take the printed link command and add -static to it.
    links = [line for line in text.splitlines() if re.search(r"-o criu/criu$", line.strip())]
    if not links:
        raise InstallError(f"compiling CRIU: its build printed no link command, see {log}")
    words = [word for word in shlex.split(links[-1]) if word != "-rdynamic"]
    words[-1] = "criu/criu.static"
    install.run([*words, "-static", "-s"], what="linking CRIU statically", log=log, cwd=source)
    return source / "criu" / "criu.static"


def _pkg_config_folder(work: Path) -> Path:
    chosen = work / "pkgconfig"
    chosen.mkdir()
    for name in _PKG_CONFIG_MODULES:
        found = [path for root in ("/usr/lib", "/usr/share") for path in Path(root).glob(f"**/pkgconfig/{name}.pc")]
        if not found:
            raise InstallError(f"compiling CRIU: {name}.pc is missing; run `make setup`")
        shutil.copy(found[0], chosen)
    return chosen


def _keep_log(settings: Settings, log: Path, report: install.Report) -> None:
    """Save the log of a failed build from the temporary folder that is about to go."""
    if log.exists():
        kept = settings.paths.cache_dir / "criu-failed-build.log"
        shutil.copy(log, kept)
        report(f"the whole log is in {kept}")
