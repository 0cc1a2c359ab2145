"""Every setting of Thaw: one frozen dataclass per concern, one loader.

In: an optional TOML file, ``THAW_<SECTION>_<FIELD>`` environment variables and command-line flags, later ones winning.
Out: :class:`Settings`, passed down by :mod:`thaw.cli`. Addresses and credentials that none of these give are taken from
the embedded stack's ``stack.json`` when it is up (:mod:`infra.local.stack`), so that local use needs no settings at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import SettingsError


@dataclass(frozen=True)
class PathSettings:
    """Where things live on this machine."""

    #: Installed tools (CRIU, broker, object store), shared between projects and runs; safe to delete.
    cache_dir: Path = field(default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "thaw")
    #: All mutable data of this installation: stack data, agent journal, node cache, logs, traces.
    state_dir: Path = field(default_factory=lambda: Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")) / "thaw")
    #: Sockets and records of what the agent runs now, in a folder ``thaw-<node_name>``. On a tmpfs: a start makes and removes files
    #: here, and on a disk with a journal that takes a millisecond of its time.
    runtime_dir: Path = Path("/run")


@dataclass(frozen=True)
class KafkaSettings:
    """How to reach the broker. Empty address: the embedded one."""

    bootstrap_servers: str = ""
    #: Partitions of topics that Thaw creates; a partition is the unit of sharding between scalers.
    partitions: int = 4
    replication_factor: int = 1
    #: Longest wait of a fetch without data, ms. 10 halves the p50 of aiokafka's default (measured 3.0 -> 2.1 ms).
    fetch_max_wait_ms: int = 10
    #: A consumer that is silent this long loses its partitions, ms. Also how long a killed scaler's shard is unowned.
    session_timeout_ms: int = 6000
    request_timeout_ms: int = 10000
    #: As in Kafka: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.
    security_protocol: str = "PLAINTEXT"
    #: With SASL: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
    sasl_mechanism: str = "PLAIN"
    username: str = ""
    password: str = field(default="", repr=False)
    #: With SSL: PEM file of the authorities that are trusted. Empty: those of the machine.
    ca: str = ""
    #: PEM files of a client's certificate and its key, where the broker wants one.
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True)
class S3Settings:
    """How to reach the object store. Empty endpoint: the embedded one."""

    endpoint_url: str = ""
    bucket: str = "thaw"
    region: str = "us-east-1"
    #: Empty: botocore's chain (environment, shared files, web identity, instance profile), which renews what expires.
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    #: With credentials that are given for a time only.
    session_token: str = field(default="", repr=False)
    #: PEM file of the authorities that are trusted with https. Empty: $AWS_CA_BUNDLE, else botocore's own.
    ca: str = ""
    connect_timeout_s: float = 2.0
    read_timeout_s: float = 10.0
    #: Attempts of one request, the first included.
    attempts: int = 4
    #: Encryption by the store itself, asked for with every PUT: ``AES256``, ``aws:kms``, or empty for what the bucket does by default.
    sse: str = ""
    #: With ``aws:kms``: the key; empty for the account's own.
    sse_kms_key_id: str = ""


@dataclass(frozen=True)
class ImageSettings:
    """How checkpoint images are encrypted and signed (docs/images.md)."""

    #: Folder with the files ``ring``, ``signing`` and ``trusted``, as ``thaw keys make`` writes them. Empty: ``state_dir/image-keys``,
    #: which an agent with local sandboxes makes by itself. Agents that share checkpoints have the same keys.
    keys: str = ""


@dataclass(frozen=True)
class StackSettings:
    """The embedded stack. Ports of 0 mean: a free one, kept for the life of the state folder."""

    #: Where broker and store listen: on loopback, or, for pods, where the cluster on this machine reaches it (``thaw cluster status``).
    listen_host: str = "127.0.0.1"
    kafka_port: int = 0
    s3_port: int = 0
    #: Port that the broker tells its clients to use, where something that passes connections on is in front of it. 0: its own.
    kafka_advertised_port: int = 0
    #: Longest wait for one part to become healthy, s.
    start_timeout_s: float = 60.0
    #: For tests of infra/terraform: folder laid out as a filesystem mirror of Terraform's that has hashicorp/aws. Empty: looked for in
    #: the usual places.
    terraform_mirror: str = ""


@dataclass(frozen=True)
class ClusterSettings:
    """The Kubernetes cluster on this machine (``thaw cluster``)."""

    #: Addresses of nodes, pods and Services; a /16. The half of 198.18/15 that the agent's instances leave.
    subnet: str = "198.19.0.0/16"
    #: Longest wait for one part to become ready, s.
    start_timeout_s: float = 60.0


@dataclass(frozen=True)
class KubernetesSettings:
    """How to reach the API server, for scalers and agents in a cluster."""

    #: Empty: the service account of the pod that this runs in; outside of one $KUBECONFIG or ~/.kube/config.
    kubeconfig: str = ""
    #: Namespace whose functions are scaled. Empty: all.
    functions_namespace: str = ""
    #: Image of the agents: it brings placeholder pods their first process.
    agent_image: str = "thaw-agent:0.1.0"
    #: Namespace of the agents' pods.
    agents_namespace: str = "thaw"
    #: Longest wait for an answer, s.
    request_timeout_s: float = 10.0
    #: A watch is opened anew after this long, s; and after half of it in which the server said nothing.
    watch_s: float = 240.0
    #: Pause after a failed request, s; doubles up to the second, with jitter.
    retry_s: float = 0.2
    retry_max_s: float = 3.0
    #: From a pod's condition to the last node that opens no new connection to it, s: EndpointSlices follow within 0.7 s, and kube-proxy
    #: writes its rules once a second.
    routes_settle_s: float = 2.0


@dataclass(frozen=True)
class TlsSettings:
    """Mutual TLS between scalers, watchers and agents. Without files: certificates of this machine's own, in state_dir/tls."""

    #: ``on`` or ``off``; off only where nobody else reaches the agent's port.
    mode: str = "on"
    #: PEM file of the authorities that are trusted (cert-manager: ca.crt).
    ca: str = ""
    #: PEM file of this side's certificate (tls.crt), with the SAN URI thaw://agent/NODE, thaw://scaler/NAME or thaw://watcher/NAME.
    certificate: str = ""
    #: PEM file of its key (tls.key).
    key: str = ""


#: Of the setting ``agent.allowed``.
ALL_ALLOWED = "thaw://scaler/*=*"


@dataclass(frozen=True)
class AgentSettings:
    """One node agent."""

    listen_host: str = "127.0.0.1"
    #: 0: a free port, published in state_dir/agent.json.
    listen_port: int = 7070
    node_name: str = "node-1"
    #: Where instances live: ``local`` (sandboxes that the agent makes) or ``pods`` (placeholder pods of the Kubernetes node that is
    #: named as this one).
    sandboxes: str = "local"
    #: Addresses of instances, one each; the first is the bridge. 198.18/15 is reserved for benchmarks (RFC 2544).
    subnet: str = "198.18.0.0/16"
    bridge: str = "thaw0"
    #: User and group that functions run as; they get no capabilities.
    run_as: int = 65534
    #: Ready sandboxes (namespaces, cgroup, network, root, a waiting CRIU worker) kept for the next starts, per root. 0.8 MB each.
    pool_size: int = 8
    #: Starts in progress at once; the rest waits in order. About twice the cores (measured, FACTS: fan-out).
    starts_in_flight: int = field(default_factory=lambda: 2 * (os.cpu_count() or 1))
    #: Starts that wait for their turn, restores and cold starts each; beyond that the function with most of them is refused one.
    starts_waiting_max: int = 1000
    #: Standbys and fetches that wait, each; beyond that the ones that would be of use for the shortest time are refused.
    background_waiting_max: int = 256
    #: Parallel GETs and PUTs to the store.
    store_parallel: int = 16
    #: Trial restores that record the working set of a new checkpoint; what any of them touched belongs to it.
    recordings: int = 3
    #: Background fill of instances that keep faulting: begins this long after the start, s.
    fill_after_s: float = 10.0
    #: Rate of the background fill, MB/s; 0 turns it off.
    fill_mb_per_s: float = 64.0
    #: Instances outlive an agent that dies, for the next one to adopt; without one they end after this long, s.
    orphan_s: float = 30.0
    #: Starts that wait for their turn are refused when no scaler has been heard for so long, s: they have been started elsewhere. Longer
    #: than a scaler takes to be there again.
    lease_s: float = 15.0
    #: A released instance answers the requests in progress for so long at most, s, and no longer than the command's deadline allows; 0:
    #: it is ended at once. As terminationGracePeriodSeconds of Kubernetes.
    drain_timeout_s: float = 30.0
    #: Node cache ceiling, MB; least recently used images are dropped first.
    cache_mb: int = 16384
    #: Failed restores of one checkpoint before it is quarantined on this node.
    quarantine_after: int = 3
    #: An instance's log is cut to nothing when it grows beyond this, MB.
    log_mb: int = 16
    #: Reconciliation of leaks, s.
    reconcile_s: float = 30.0
    #: Which scaler may command which functions: comma-separated ``IDENTITY=FUNCTION``, both with ``*`` and ``?``, the identity as in the
    #: scaler's certificate, such as ``thaw://scaler/blue=blue-*,thaw://scaler/main=*``.
    allowed: str = ALL_ALLOWED


@dataclass(frozen=True)
class ScalerSettings:
    """One scaler replica."""

    #: Node agents, comma-separated host:port. Empty: the one on this machine (state_dir/agent.json). ``kubernetes``: the agents' pods.
    agents: str = ""
    #: Where functions come from: ``topic`` (``thaw apply``) or ``kubernetes`` (``kubectl apply``). With the latter the scaler makes
    #: placeholder pods and tells the functions' status.
    functions: str = "topic"
    #: Empty placeholder pods of each function beyond what is running, held and expected: the next start needs one.
    placeholders_ahead: int = 1
    #: Empty placeholders beyond that are removed after this long, s.
    placeholder_idle_s: float = 60.0
    #: What a start has caused (another placeholder, greater requests) waits this long, s, unless a start waits for a pod: to make a pod
    #: takes the node's cores for most of a second, and those are needed for the start and for the way to it through the Service.
    placeholder_pause_s: float = 0.25
    group: str = "thaw-scaler"
    #: Age at which a source that sent nothing counts as zero, s, when its event names none.
    source_ttl_s: float = 10.0
    #: Deadline of a start command, s.
    start_deadline_s: float = 60.0
    checkpoint_deadline_s: float = 300.0
    #: Pause before a failed start is tried again, s; doubles up to 16x.
    retry_s: float = 0.25
    #: Granularity of timers (idle release, expiry), s.
    tick_s: float = 0.1
    #: A node whose stream is down this long counts as lost and its instances are started elsewhere, s. Short, because a start too
    #: many costs 10 ms and is released again, while a missing instance costs requests.
    node_grace_s: float = 1.0
    #: A scaler that finds no broker when it begins tries again for this long, s, then it ends; 0: it ends at once.
    broker_patience_s: float = 0.0
    #: A scaler that takes over reads demand at most this old, s: longer ttls of sources do not outlive a change of scaler.
    replay_max_s: float = 3600.0


@dataclass(frozen=True)
class TelemetrySettings:
    """Logs, traces, metrics, health."""

    #: OTLP/HTTP endpoint for traces and metrics, e.g. http://collector:4318. Empty: traces go to JSON lines in state_dir/traces only.
    otlp_endpoint: str = ""
    #: Where agent and scaler answer /healthz, /readyz, /status and /metrics. Port 0: a free one, published in state_dir/health for ``thaw
    #: status``; -1: nowhere.
    health_host: str = "127.0.0.1"
    health_port: int = 0
    log_level: str = "INFO"


@dataclass(frozen=True)
class Settings:
    """All concerns together."""

    paths: PathSettings = field(default_factory=PathSettings)
    kafka: KafkaSettings = field(default_factory=KafkaSettings)
    s3: S3Settings = field(default_factory=S3Settings)
    images: ImageSettings = field(default_factory=ImageSettings)
    stack: StackSettings = field(default_factory=StackSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    agent: AgentSettings = field(default_factory=AgentSettings)
    scaler: ScalerSettings = field(default_factory=ScalerSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    @property
    def stack_file(self) -> Path:
        """Addresses and credentials of the running embedded stack (mode 0600)."""
        return self.paths.state_dir / "stack.json"

    @property
    def runtime_folder(self) -> Path:
        """What the agent of this machine keeps in ``paths.runtime_dir``."""
        return self.paths.runtime_dir / f"thaw-{self.agent.node_name}"

    @property
    def image_keys(self) -> Path:
        """Folder of the keys that seal checkpoint images."""
        return (Path(self.images.keys).expanduser() if self.images.keys else self.paths.state_dir / "image-keys").absolute()

    @property
    def agent_file(self) -> Path:
        """Where the agent of this machine listens: ``{"host", "port", "pid"}``."""
        return self.paths.state_dir / "agent.json"


def load(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read settings: file, then environment, then flags.

    Args:
        file: TOML with one table per section; ``THAW_CONFIG`` names it when None.
        environment: variables to read; the process's own when None.
        flags: ``{"section.field": value}``; None values are ignored.

    Raises:
        SettingsError: an unknown section or field, or a value of the wrong type; the message names it.
    """
    env = os.environ if environment is None else environment
    given: dict[str, dict[str, Any]] = {}
    path = file or (Path(env["THAW_CONFIG"]) if env.get("THAW_CONFIG") else None)
    if path is not None:
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"cannot read settings file {path}: {error}") from error
        for section, table in document.items():
            if not isinstance(table, dict):
                raise SettingsError(f"{path}: {section!r} must be a table such as [{section}]")
            given.setdefault(section, {}).update(table)
    for section, kind in _sections().items():
        for item in dataclasses.fields(kind):
            name = f"THAW_{section}_{item.name}".upper()
            if name in env:
                given.setdefault(section, {})[item.name] = env[name]
    for key, value in (flags or {}).items():
        if value is not None:
            section, _, name = key.partition(".")
            given.setdefault(section, {})[name] = value
    settings = Settings(**{section: _build(section, kind, given.pop(section, {})) for section, kind in _sections().items()})
    if given:
        raise SettingsError(f"unknown settings section {sorted(given)[0]!r}; known: {', '.join(_sections())}")
    return with_embedded_stack(settings)


def with_assignments(settings: Settings, assignments: Iterable[str]) -> Settings:
    """Other values for some settings.

    Args:
        settings: all others.
        assignments: ``section.field=value``, as on the command line.

    Raises:
        SettingsError: one is not that, or there is no such setting.
    """
    for text in assignments:
        name, separator, value = text.partition("=")
        section, _, item = name.partition(".")
        if not separator or section not in _sections() or item not in typing.get_type_hints(_sections()[section]):
            raise SettingsError(f"{text!r} is not SECTION.FIELD=VALUE of a setting that there is")
        kind = typing.get_type_hints(_sections()[section])[item]
        changed = dataclasses.replace(getattr(settings, section), **{item: _convert(name, kind, value)})
        settings = dataclasses.replace(settings, **{section: changed})
    return settings


def with_embedded_stack(settings: Settings) -> Settings:
    """Fill in what the embedded stack provides and the user did not set."""
    found = _read_json(settings.stack_file)
    kafka, s3 = found.get("kafka", {}), found.get("s3", {})
    if kafka and not settings.kafka.bootstrap_servers:
        settings = dataclasses.replace(settings, kafka=dataclasses.replace(settings.kafka, bootstrap_servers=kafka["bootstrap_servers"]))
    if s3 and not settings.s3.endpoint_url:
        settings = dataclasses.replace(
            settings,
            s3=dataclasses.replace(
                settings.s3,
                endpoint_url=s3["endpoint_url"],
                access_key=s3["access_key"],
                secret_key=s3["secret_key"],
            ),
        )
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _sections() -> dict[str, type[Any]]:
    return typing.get_type_hints(Settings)


def _build(section: str, kind: type[Any], values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise SettingsError(f"unknown setting {section}.{unknown[0]}; known: {', '.join(hints)}")
    converted = {name: _convert(f"{section}.{name}", hints[name], value) for name, value in values.items()}
    built = kind(**converted)
    paths = {item.name: getattr(built, item.name).expanduser() for item in dataclasses.fields(kind) if hints[item.name] is Path}
    return dataclasses.replace(built, **paths) if paths else built


def _convert(name: str, kind: type[Any], value: Any) -> Any:
    if kind is bool and isinstance(value, str):
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        if value.lower() in ("0", "false", "no", "off"):
            return False
        raise SettingsError(f"setting {name} must be true or false, not {value!r}")
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"setting {name} must be {kind.__name__}, not {value!r}") from error
