"""The embedded broker: Apache Kafka, one KRaft node, from Maven's jars with pinned digests.

In: ``kafka-pom.xml`` (what), ``kafka-jars.sha256`` (exactly which bytes), ``kafka.properties`` (how it runs).
Out: an installed folder with a class-data archive that halves the start (3.9 s instead of 6), and a running process.
Next: :mod:`infra.local.stack` calls :func:`start`; :mod:`infra.local.health` asks the broker whether it works.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from infra.errors import InstallError, StackError
from infra.local import debian, install, ports, processes
from infra.settings import Settings

VERSION = "4.3.1"
_HERE = Path(__file__).parent
_POM = _HERE / "kafka-pom.xml"
_DIGESTS = _HERE / "kafka-jars.sha256"
_PROPERTIES = _HERE / "kafka.properties"
_TRUST_STORE = _HERE / "TrustStore.java"
_LOGGING = _HERE / "kafka-log4j2.yaml"
_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
#: A broker for one machine lives short and handles little: a quick start beats peak throughput.
_JVM = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


def folder(settings: Settings) -> Path:
    """Return where this version of the broker belongs, there or not."""
    recipe = hashlib.sha256(_DIGESTS.read_bytes()).hexdigest()[:12]
    return settings.paths.cache_dir / f"kafka-{VERSION}-{recipe}"


def ensure(settings: Settings, report: install.Report, *, force: bool = False) -> Path:
    """Install the broker unless it is there, and check every jar of it.

    Raises:
        InstallError: Java or Maven is missing, a download failed, or a jar is not the pinned one.
    """

    def build(temporary: Path) -> Sequence[str]:
        debian.require("broker", f"the broker (Kafka {VERSION})")
        report(f"kafka {VERSION}: fetching {len(_expected())} jars (44 MB) by Maven")
        repository = temporary / "repository"
        command: list[str | Path] = [
            *("mvn", "-q", "-B", "-ntp", "--strict-checksums", f"-Dmaven.repo.local={repository}"),
            *("-f", _POM, _COPY, f"-DoutputDirectory={temporary / 'libs'}", "-DincludeScope=runtime"),
        ]
        log = temporary / "build.log"
        environment = _maven_environment(temporary, log)
        install.run(command, what="fetching Kafka", log=log, cwd=temporary, environment=environment)
        install.discard(repository)
        _verify_jars(temporary / "libs", remedy="the download is not what Thaw was tested with; try again")
        return []

    home = install.install_folder(folder(settings), build, report, title=f"Kafka {VERSION}", force=force)
    _verify_jars(home / "libs", remedy=f"remove {home} and run `thaw stack install`")
    archive = _archive(home)
    if not archive.exists():
        with install.exclusive(settings.paths.cache_dir / install.LOCK, report):
            if not archive.exists():
                report("kafka: preparing a class archive that makes it start faster")
                _make_archive(home, archive)
    return home


def installed(settings: Settings) -> bool:
    """Tell whether nothing is left to do."""
    return folder(settings).is_dir()


def start(
    settings: Settings,
    *,
    data: Path,
    port: int,
    controller_port: int,
    record: Path,
    host: str = ports.LOOPBACK,
    advertised_port: int = 0,
) -> processes.Identity:
    """Start the broker; it is not ready yet when this returns.

    Args:
        settings: where the installation is.
        data: folder of its own for data, configuration and logs; formatted when new.
        port: port of the broker.
        controller_port: loopback port of the controller in the same process.
        record: where the identity of the process goes.
        host: address that the broker listens on.
        advertised_port: port that clients are told to use; 0: ``port``.

    Raises:
        StackError: the data folder can't be formatted or the process can't be started.
    """
    home = folder(settings)
    return _launch(home, data, host, (port, advertised_port or port, controller_port), record, archive_options(home))


def archive_options(home: Path) -> list[str]:
    """Return the JVM flags that use the class archive, if this Java has one."""
    archive = _archive(home)
    return [f"-XX:SharedArchiveFile={archive}", "-Xshare:auto", "-Xlog:disable"] if archive.exists() else []


def logs(data: Path) -> list[Path]:
    """Return the log files, the most telling last."""
    return [path for path in (data / "format.log", data / "kafka.out", data / "kafka.log") if path.exists()]


def _maven_environment(folder: Path, log: Path) -> dict[str, str]:
    """Let Maven trust the authorities that every other program here does.

    Java has a list of its own and ignores the machine's: behind a company's proxy, apt, pip and go would work and Maven
    would not.
    """
    bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    if not bundle.is_file():
        return {}
    store = folder / "trust.p12"
    install.run([_java(), _TRUST_STORE, bundle, store], what="reading the machine's authorities", log=log, cwd=folder)
    ours = f"-Djavax.net.ssl.trustStore={store} -Djavax.net.ssl.trustStorePassword=changeit"
    # Of two equal options the later one wins: the user's.
    return {"MAVEN_OPTS": f"{ours} {os.environ.get('MAVEN_OPTS', '')}".strip()}


def _launch(home: Path, data: Path, host: str, numbers: tuple[int, int, int], record: Path, options: Sequence[str]) -> processes.Identity:
    """Start it; ``numbers`` are its port, the one that clients are told, and the controller's."""
    data.mkdir(parents=True, exist_ok=True)
    text = _PROPERTIES.read_text()
    named = zip(("PORT", "ADVERTISED_PORT", "CONTROLLER_PORT"), numbers, strict=True)
    for name, value in (("HOST", host), *named, ("DATA", data / "data")):
        text = text.replace(f"@{name}@", str(value))
    properties = data / "kafka.properties"
    properties.write_text(text)
    java: list[str | Path] = [
        _java(),
        *_JVM,
        f"-Dlog4j2.configurationFile={_LOGGING}",
        f"-Dthaw.log={data / 'kafka.log'}",
    ]
    classpath = ["-cp", _classpath(home)]
    if not (data / "data" / "meta.properties").exists():
        _format([*java, *options, *classpath], properties, data)
    command: list[str | Path] = [*java, *options, *classpath, "kafka.Kafka", properties]
    processes.keep_previous(data / "kafka.log")
    return processes.start(command, record=record, output=data / "kafka.out", cwd=data, environment=_environment())


def _format(java: Sequence[str | Path], properties: Path, data: Path) -> None:
    # A format that was interrupted left no meta.properties but perhaps other files, which the next one refuses.
    shutil.rmtree(data / "data", ignore_errors=True)
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    # One word with its option: an id may begin with a dash.
    words = ["kafka.tools.StorageTool", "format", "--standalone", f"--cluster-id={cluster}", "-c", str(properties)]
    with (data / "format.log").open("wb") as log:
        code = subprocess.call([*java, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=data, env=_environment(), timeout=60)
    if code:
        raise StackError(f"kafka: its data folder cannot be formatted: {(data / 'format.log').read_text()[-500:]}")


def _make_archive(home: Path, archive: Path) -> None:
    """Run a throw-away broker once and keep which classes it loaded, ready to map.

    A failure only costs start time later, so it is not an error.
    """
    scratch = home / "archive-run"
    shutil.rmtree(scratch, ignore_errors=True)
    new = archive.with_suffix(".new")
    identity = None
    try:
        port, controller_port = ports.free(2)
        options = [f"-XX:ArchiveClassesAtExit={new}", "-Xlog:disable"]
        identity = _launch(home, scratch, ports.LOOPBACK, (port, port, controller_port), scratch / "pid", options)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and identity.alive():
            # The broker opens its port when it has loaded what a start needs.
            if ports.answers(ports.LOOPBACK, port):
                break
            time.sleep(0.1)
    finally:
        # The archive is written by the clean exit.
        processes.stop(identity, grace_s=60)
        shutil.rmtree(scratch, ignore_errors=True)
    if new.exists():
        new.rename(archive)


def _archive(home: Path) -> Path:
    # An archive fits one build of Java: another one ignores it, so each gets its own.
    shown = subprocess.run([_java(), "-Xinternalversion"], capture_output=True, check=False, env=_environment()).stdout
    return home / f"classes-{hashlib.sha256(shown).hexdigest()[:12]}.jsa"


def _java() -> str:
    found = shutil.which("java")
    if found is None:
        raise StackError("kafka: Java is not installed; run `make setup`")
    return found


def _classpath(home: Path) -> str:
    # Spelled out and sorted: the class archive is valid for exactly one order.
    return ":".join(str(home / "libs" / name) for name in sorted(_expected()))


def _environment() -> dict[str, str]:
    unwanted = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH")
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def _expected() -> dict[str, str]:
    lines = [line.split() for line in _DIGESTS.read_text().splitlines()]
    return {name: sha256 for sha256, name in lines}


def _verify_jars(libs: Path, remedy: str) -> None:
    expected = _expected()
    for name, sha256 in expected.items():
        install.verify(libs / name, sha256, remedy=remedy)
    extra = sorted({path.name for path in libs.iterdir()} - set(expected))
    if extra:
        raise InstallError(f"{libs / extra[0]} does not belong there: {remedy}")
