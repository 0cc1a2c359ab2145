"""The parts of the embedded stack, each behind the same few questions.

In: settings, and what earlier runs left in ``<state_dir>/stack``. Out: :class:`Part` objects that can be started,
checked, stopped and described. Next: :mod:`infra.local.stack` does all of that in the right order.
"""

from __future__ import annotations

import abc
import dataclasses
import ipaddress
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra import files
from infra.errors import StackError
from infra.local import broker, health, objectstore, ports, processes
from infra.local.install import Report
from infra.settings import KafkaSettings, Settings


def write_private(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON that only this user can read, so that readers see the old or the new file and never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_private(path, json.dumps(value, indent=1).encode(), lasting=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or unreadable file is an empty one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Part(abc.ABC):
    """One server of the stack."""

    #: Key in stack.json and word for messages.
    name: str
    #: What is taken from settings.stack, and the ports that this part keeps for the life of the state folder.
    port_names: tuple[str, ...]
    #: Those of them that only the part itself uses: always on loopback.
    inner_ports: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.home = settings.paths.state_dir / "stack"
        self.data = self.home / self.name
        self.record = self.home / f"{self.name}.pid"

    @property
    @abc.abstractmethod
    def configured(self) -> str:
        """The address in the settings, empty when there is none."""

    @property
    @abc.abstractmethod
    def address(self) -> str:
        """The address of the embedded server, empty when no port was chosen yet."""

    @abc.abstractmethod
    def install(self, report: Report) -> None:
        """Install it unless it is there, and verify what is there."""

    @abc.abstractmethod
    def launch(self) -> processes.Identity:
        """Start the process."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise an InfraError unless the embedded server works."""

    @abc.abstractmethod
    def check_external(self) -> None:
        """Raise an InfraError unless the user's own server works."""

    @abc.abstractmethod
    def entry(self) -> dict[str, Any]:
        """Return what stack.json says about it, the pid excepted."""

    @abc.abstractmethod
    def logs(self) -> list[Path]:
        """Return its log files, the most telling last."""

    @property
    def external(self) -> bool:
        """Whether the user named a server of their own.

        Settings also carry the embedded server's address once it was read from stack.json: that one is ours.
        """
        return bool(self.configured) and self.configured != self.address

    @property
    def host(self) -> str:
        """The address that it listens on, or last did."""
        return str(read_json(self.home / "ports.json").get(f"{self.name}_host", self.settings.stack.listen_host))

    @property
    def identity(self) -> processes.Identity | None:
        """The process that was started last, running or not."""
        return processes.read(self.record)

    @property
    def alive(self) -> bool:
        """Whether that process runs."""
        identity = self.identity
        return identity is not None and identity.alive()

    def port(self, name: str) -> int:
        """Return the port chosen for ``name``, 0 when none was."""
        return int(read_json(self.home / "ports.json").get(name, 0))

    def port_free(self, name: str) -> bool:
        """Tell whether nothing listens on the port chosen for ``name``."""
        return ports.is_free(self.port(name), self._host_of(name))

    def choose_ports(self, report: Report) -> None:
        """Settle on an address and ports: those of the settings, else the ports used before, else free ones.

        Raises:
            StackError: a port that the settings ask for is taken, or the address is not one to listen on.
        """
        self._check_host()
        known = read_json(self.home / "ports.json") | {f"{self.name}_host": self.settings.stack.listen_host}
        write_private(self.home / "ports.json", known)
        chosen = dict(known)
        for name in self.port_names:
            host = self._host_of(name)
            wanted = int(getattr(self.settings.stack, f"{name}_port", 0))
            if wanted and not ports.is_free(wanted, host):
                raise StackError(
                    f"{self.name}: port {wanted} (stack.{name}_port) is taken by {ports.holder(wanted)}; choose another one, or 0 for any"
                )
            if wanted:
                chosen[name] = wanted
            elif not known.get(name) or not ports.is_free(known[name], host):
                if known.get(name):
                    report(f"{self.name}: port {known[name]} is now taken by {ports.holder(known[name])}, moving")
                # Distinct from those of the other parts, which may not listen yet.
                chosen[name] = next(port for port in ports.free(len(chosen) + 1, host) if port not in chosen.values())
        write_private(self.home / "ports.json", chosen)

    def _host_of(self, name: str) -> str:
        return ports.LOOPBACK if name in self.inner_ports else self.host

    def _check_host(self) -> None:
        """Nothing of the stack may be reached from other machines: its broker asks nobody who they are."""
        host, subnet = self.settings.stack.listen_host, self.settings.cluster.subnet
        try:
            address = ipaddress.IPv4Address(host)
            ours = address.is_loopback or address in ipaddress.IPv4Network(subnet)
        except ValueError:
            ours = False
        if not ours:
            raise StackError(
                f"stack.listen_host: {host!r} is neither a loopback address nor one of the cluster on this machine ({subnet}); "
                "the stack must not be reached from other machines"
            )
        try:
            ports.free(1, host)
        except OSError as error:
            raise StackError(
                f"stack.listen_host: {host} is no address of this machine now; start the cluster first: thaw cluster up"
            ) from error

    def last_words(self, lines: int = 4) -> str:
        """Return the end of its newest log, for an error message; lines that tell of errors, and their next, win."""
        for path in reversed(self.logs()):
            found = path.read_text(errors="replace").splitlines()[-200:]
            telling = [any(word in line for word in (" ERROR ", " FATAL ", "rror:", "panic")) for line in found]
            chosen = [line for index, line in enumerate(found) if telling[index] or (index and telling[index - 1])]
            if found:
                return " | ".join((chosen or found)[-lines:])
        return "its log is empty"


class Broker(Part):
    """Apache Kafka."""

    name = "kafka"
    port_names = ("kafka", "controller")
    inner_ports = ("controller",)

    @property
    def configured(self) -> str:
        """See :class:`Part`."""
        return self.settings.kafka.bootstrap_servers

    @property
    def address(self) -> str:
        """See :class:`Part`."""
        port = self.port("kafka")
        return f"{self.host}:{port}" if port else ""

    def install(self, report: Report) -> None:
        """See :class:`Part`."""
        broker.ensure(self.settings, report)

    def launch(self) -> processes.Identity:
        """See :class:`Part`."""
        return broker.start(
            self.settings,
            data=self.data,
            host=self.host,
            port=self.port("kafka"),
            controller_port=self.port("controller"),
            advertised_port=self.settings.stack.kafka_advertised_port,
            record=self.record,
        )

    def check(self) -> None:
        """See :class:`Part`."""
        health.check_kafka(KafkaSettings(bootstrap_servers=self.address), write=True)

    def check_external(self) -> None:
        """See :class:`Part`."""
        health.check_kafka(self.settings.kafka, write=False)

    def entry(self) -> dict[str, Any]:
        """See :class:`Part`."""
        return {"bootstrap_servers": self.address}

    def logs(self) -> list[Path]:
        """See :class:`Part`."""
        return broker.logs(self.data)


class ObjectStore(Part):
    """The S3 server."""

    name = "s3"
    port_names = ("s3",)

    @property
    def configured(self) -> str:
        """See :class:`Part`."""
        return self.settings.s3.endpoint_url

    @property
    def address(self) -> str:
        """See :class:`Part`."""
        port = self.port("s3")
        return f"http://{self.host}:{port}" if port else ""

    def credentials(self) -> tuple[str, str]:
        """Return access key and secret key, made at the first start and kept for the life of the state folder."""
        path = self.home / "credentials.json"
        found = read_json(path)
        if not found.get("access_key") or not found.get("secret_key"):
            found = {"access_key": f"thaw{secrets.token_hex(6)}", "secret_key": secrets.token_urlsafe(30)}
            write_private(path, found)
        return found["access_key"], found["secret_key"]

    def install(self, report: Report) -> None:
        """See :class:`Part`."""
        objectstore.ensure(self.settings, report)

    def launch(self) -> processes.Identity:
        """See :class:`Part`."""
        access_key, secret_key = self.credentials()
        return objectstore.start(
            self.settings,
            data=self.data,
            host=self.host,
            port=self.port("s3"),
            access_key=access_key,
            secret_key=secret_key,
            record=self.record,
        )

    def check(self) -> None:
        """See :class:`Part`."""
        access_key, secret_key = self.credentials()
        health.check_s3(dataclasses.replace(self.settings.s3, endpoint_url=self.address, access_key=access_key, secret_key=secret_key))

    def check_external(self) -> None:
        """See :class:`Part`."""
        if not urlsplit(self.configured).hostname:
            raise StackError(f"s3.endpoint_url must be a URL such as http://host:9000, not {self.configured!r}")
        health.check_s3(self.settings.s3)

    def entry(self) -> dict[str, Any]:
        """See :class:`Part`."""
        access_key, secret_key = self.credentials()
        return {"endpoint_url": self.address, "access_key": access_key, "secret_key": secret_key}

    def logs(self) -> list[Path]:
        """See :class:`Part`."""
        return objectstore.logs(self.data)


def parts(settings: Settings) -> list[Part]:
    """Return every part of the stack; the slowest to start comes first."""
    return [Broker(settings), ObjectStore(settings)]
