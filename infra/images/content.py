"""What the images of scaler and agent hold beside Python: the locked packages, Thaw's own, CRIU and the small programs.

In: this checkout and the environment that its lock file made. Out: folders laid out like a root, in the order of layers: what rarely
changes first. Run as a module it copies them into one folder, which is what the ``Dockerfile`` does in its first stage::

    python -m infra.images.content agent /stage

Next: :mod:`.build` makes images of the same folders without a Docker engine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import infra
from infra import settings as settings_module
from infra.errors import ImageError, InfraError
from infra.images import runtime
from infra.local import criu, install, native
from infra.settings import Settings

Kind = Literal["agent", "scaler"]
#: Where everything of ours is; the settings of infra/kubernetes/manifests name it as paths.cache_dir.
HOME = Path("opt/thaw")
_PYTHON = HOME / "python"
_ROOT = Path(infra.__file__).parents[1]
_LOCK = _ROOT / "requirements.lock"
#: Packages of ours that run in a cluster, and what of them: sources, and what sources read.
_PACKAGES = ("agent", "infra", "scaler", "thaw")
_SUFFIXES = (".c", ".h", ".json", ".patch", ".py")
#: Of the lock: reports, tables and the cluster on one machine, which neither scaler nor agent uses.
_LEFT_OUT = {
    *("contourpy", "cycler", "fonttools", "hdrhistogram", "kiwisolver", "markdown-it-py", "matplotlib", "mdurl"),
    *("pbr", "pillow", "pygments", "pyparsing", "rich", "setuptools"),
}
#: Of packages: scripts, which lie outside; tests; what names paths of this machine.
_UNWANTED = {"..", "__pycache__", "test", "tests"}
_RECORDS = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json")
#: Descriptions of AWS' services, hundreds: only the store's, and those that credentials come from.
_BOTOCORE_DATA, _AWS_SERVICES = ("botocore", "data"), ("s3", "signin", "sso", "sso-oidc", "sts")
_LOCKED = re.compile(r"^([a-z0-9._-]+)==([^\s;]+)", re.MULTILINE)
_COMMAND = "#!/usr/local/bin/python3\nfrom thaw.cli import main\n\nmain()\n"
#: The agent's C programs: PID 1 of its sandboxes, what enters those of Kubernetes, and PID 1 of placeholder pods.
_INIT, _ENTER, _PLACEHOLDER = (_ROOT / "agent" / "sandbox" / f"{name}.c" for name in ("init", "enter", "placeholder"))


def layers(settings: Settings, kind: Kind, report: install.Report) -> list[Path]:
    """Return the folders of an image's content, the lowest first; made where they are missing.

    Raises:
        InstallError: something can't be compiled.
        ImageError: the environment is not the locked one.
    """
    common = [_packages(settings, report), _thaw(settings, report)]
    return [*common, _tools(settings, report) if kind == "agent" else _planner(settings, report)]


def _packages(settings: Settings, report: install.Report) -> Path:
    """The locked packages, as they are in the environment that runs this."""
    if not _LOCK.is_file():
        raise ImageError(f"{_LOCK} is missing: images are made from a checkout of Thaw")
    locked: dict[str, set[str]] = {}
    for name, version in _LOCKED.findall(_LOCK.read_text()):
        locked.setdefault(name, set()).add(version)
    chosen = [importlib.metadata.distribution(name) for name in sorted(set(locked) - _LEFT_OUT) if _there(name)]
    wrong = [item.name for item in chosen if item.version not in locked[_plain(item.name)]]
    missing = [name for name in sorted(set(locked) - _LEFT_OUT) if not _there(name)]
    if wrong or missing:
        raise ImageError(f"not as {_LOCK.name} says: {', '.join(wrong + missing)}; run `make setup`")
    versions = " ".join(f"{item.name}=={item.version}" for item in chosen)

    def build(root: Path) -> Sequence[str]:
        report(f"image content: {len(chosen)} locked packages")
        target = root / _PYTHON
        for item in chosen:
            for file in item.files or []:
                if _is_wanted(file.parts):
                    _copy(Path(str(file.locate())), target / Path(*file.parts))
        runtime.compile_modules(target, root, root / "build.log")
        runtime.add_libraries(root, [runtime.python(settings, report)])
        return []

    key = hashlib.sha256(f"2 {sys.version} {versions}".encode()).hexdigest()[:12]
    return install.install_folder(settings.paths.cache_dir / f"image-packages-{key}", build, report, title="packages for images")


def _thaw(settings: Settings, report: install.Report) -> Path:
    """Thaw's own packages and its command."""
    sources = [path for name in _PACKAGES for path in _sources(_ROOT / name)]

    def build(root: Path) -> Sequence[str]:
        for path in sources:
            _copy(path, root / _PYTHON / path.relative_to(_ROOT))
        command = root / "usr/local/bin/thaw"
        command.parent.mkdir(parents=True)
        command.write_text(_COMMAND)
        command.chmod(0o755)
        runtime.compile_modules(root / _PYTHON, root, root / "build.log")
        return []

    return _once(settings, "image-thaw", sources, build, report, title="Thaw for images")


def _tools(settings: Settings, report: install.Report) -> Path:
    """What the agent runs: CRIU and the small programs, where it looks for them in its cache."""
    cache = settings.paths.cache_dir
    program = criu.ensure(settings, report)
    helpers = [native.build(source, cache, report) for source in (_INIT, _ENTER)]
    placeholder = native.build(_PLACEHOLDER, cache, report)

    def build(root: Path) -> Sequence[str]:
        for path in (program, *helpers):
            _copy(path, root / HOME / path.parent.name / path.name)
        _copy(placeholder, root / HOME / placeholder.name)
        return []

    return _once(settings, "image-agent", [program, *helpers, placeholder], build, report, title="the agent's programs for images")


def _planner(settings: Settings, report: install.Report) -> Path:
    """The planner as machine code."""
    compiling = "from scaler import compiled; compiled.main(); print(compiled.folder())"
    done = subprocess.run([sys.executable, "-c", compiling], cwd=_ROOT, capture_output=True, text=True, check=False)
    folder = Path(done.stdout.strip().rpartition("\n")[2])
    if done.returncode or not folder.is_dir():
        raise ImageError(f"the planner can't be compiled: {(done.stderr or done.stdout)[-500:]}")
    modules = sorted(path for path in folder.rglob("*") if path.is_file())

    def build(root: Path) -> Sequence[str]:
        for path in modules:
            _copy(path, root / _PYTHON / path.relative_to(_ROOT))
        return []

    return _once(settings, "image-scaler", modules, build, report, title="the compiled planner for images")


def _once(
    settings: Settings, name: str, sources: Sequence[Path], build: Callable[[Path], Sequence[str]], report: install.Report, *, title: str
) -> Path:
    """The folder made of exactly these files."""
    digest = hashlib.sha256(f"1 {sys.version}".encode())
    for path in sources:
        digest.update(f"{path.relative_to(path.parents[1])} {install.digest(path)}\n".encode())
    final = settings.paths.cache_dir / f"{name}-{digest.hexdigest()[:12]}"
    return install.install_folder(final, build, report, title=title)


def _is_wanted(parts: Sequence[str]) -> bool:
    service = parts[:2] == _BOTOCORE_DATA and len(parts) > 3
    return not _UNWANTED & set(parts) and parts[-1] not in _RECORDS and (not service or parts[2] in _AWS_SERVICES)


def _sources(package: Path) -> Iterator[Path]:
    for path in sorted(package.rglob("*")):
        if path.suffix in _SUFFIXES and path.is_file() and not {"__pycache__", "_compiled"} & set(path.parts):
            yield path


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that everyone can read it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def _there(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(words: Sequence[str]) -> int:
    """Copy the content of one image into a folder."""
    kind, folder = words
    if kind not in ("agent", "scaler"):
        print(f"there are images of agent and scaler, not of {kind}", file=sys.stderr)
        return 2
    try:
        for layer in layers(settings_module.load(), "agent" if kind == "agent" else "scaler", print):
            shutil.copytree(layer, folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(install.RECEIPT))
    except InfraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
