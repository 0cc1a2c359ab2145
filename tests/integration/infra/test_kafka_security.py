"""Thaw on a broker that wants TLS and a login: every client of infra.kafka, and what is said when it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import kafka
from infra.errors import KafkaUnavailable, SettingsError
from infra.kafka import Topic
from infra.local import broker, health, ports, processes
from infra.settings import KafkaSettings, Settings
from loadgen.producer import open_producer
from scaler.demand import DEMAND_TOPIC
from scaler.edges.membership import Membership

pytestmark = [pytest.mark.stack]
#: Listeners of every kind. Users of SCRAM are made with the storage; the store's password is for this test only.
SECURED = """
listeners={addresses}
advertised.listeners={addresses}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL,SASL_PLAINTEXT:SASL_PLAINTEXT
ssl.keystore.type=PEM
ssl.keystore.location={home}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={home}/ca.crt
listener.name.ssl.ssl.client.auth=required
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
"""
LISTENERS = ("PLAINTEXT", "SSL", "SASL_SSL", "SASL_PLAINTEXT")
LOGIN = """
listener.name.{listener}.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_thaw="plain-word";
listener.name.{listener}.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.{listener}.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
"""


def openssl(*words: object, cwd: Path) -> None:
    subprocess.run(["openssl", *map(str, words)], cwd=cwd, check=True, capture_output=True)


def make_certificates(home: Path) -> None:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", 1)
    for name in ("ca", "stranger"):
        openssl("req", "-x509", *curve, "-subj", f"/CN={name}", "-out", f"{name}.crt", "-keyout", f"{name}.key", cwd=home)
    for name in ("broker", "client"):
        (home / "names").write_text("subjectAltName=IP:127.0.0.1")
        openssl("req", *curve, "-subj", f"/CN={name}", "-out", f"{name}.csr", "-keyout", f"{name}.key", cwd=home)
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", 1, "-extfile", "names", "-out", f"{name}.crt")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, cwd=home)
    (home / "broker.pem").write_text((home / "broker.key").read_text() + (home / "broker.crt").read_text())


@pytest.fixture(scope="module")
def home(stack_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secured")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def addresses(stack_settings: Settings, home: Path) -> Iterator[dict[str, str]]:
    controller, *chosen = ports.free(1 + len(LISTENERS))
    found = {name: f"127.0.0.1:{port}" for name, port in zip(LISTENERS, chosen, strict=True)}
    listening = ",".join(f"{name}://{address}" for name, address in {**found, "CONTROLLER": f"127.0.0.1:{controller}"}.items())
    kept = [
        line for line in broker._PROPERTIES.read_text().splitlines() if "listener" not in line or line.startswith(("controller.", "inter."))
    ]
    logins = "".join(LOGIN.format(listener=name.lower()) for name in LISTENERS if name.startswith("SASL"))
    properties = home / "kafka.properties"
    properties.write_text("\n".join(kept) + SECURED.format(addresses=listening, home=home) + logins)
    users = [f"--add-scram={mechanism}=[name=thaw,password=scram-word]" for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")]
    call = subprocess.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker, "_PROPERTIES", properties)
        patch.setattr(broker.subprocess, "call", lambda command, **options: call([*command, *users], **options))
        identity = broker.start(stack_settings, data=home / "data", port=chosen[0], controller_port=controller, record=home / "pid")
    try:
        deadline = time.monotonic() + 60
        while not all(ports.answers("127.0.0.1", port) for port in chosen):
            assert identity.alive() and time.monotonic() < deadline, (home / "data" / "kafka.log").read_text()[-2000:]
            time.sleep(0.1)
        yield found
    finally:
        processes.stop(identity)


def settings_of(addresses: dict[str, str], home: Path, protocol: str, mechanism: str = "PLAIN") -> KafkaSettings:
    given = KafkaSettings(
        bootstrap_servers=addresses[protocol], security_protocol=protocol, sasl_mechanism=mechanism, request_timeout_ms=8000
    )
    if protocol.startswith("SASL"):
        given = dataclasses.replace(given, username="thaw", password="plain-word" if mechanism == "PLAIN" else "scram-word")
    if protocol.endswith("SSL"):
        given = dataclasses.replace(given, ca=str(home / "ca.crt"))
    if protocol == "SSL":
        given = dataclasses.replace(given, certificate=str(home / "client.crt"), key=str(home / "client.key"))
    return given


@pytest.mark.parametrize(
    ("protocol", "mechanism"),
    [
        ("SASL_SSL", "PLAIN"),
        ("SASL_SSL", "SCRAM-SHA-256"),
        ("SASL_SSL", "SCRAM-SHA-512"),
        ("SASL_PLAINTEXT", "SCRAM-SHA-256"),
        ("SSL", "PLAIN"),
    ],
)
async def test_every_client_works(addresses: dict[str, str], home: Path, tmp_path: Path, protocol: str, mechanism: str) -> None:
    settings = settings_of(addresses, home, protocol, mechanism)
    health.check_kafka(settings, write=True)
    table = f"table-{protocol}-{mechanism}"
    await kafka.ensure_topics(settings, [Topic(table, 1), Topic(DEMAND_TOPIC)])
    async with kafka.started(kafka.producer(settings, "test"), settings) as producer:
        await producer.send_and_wait(table, b"value", b"key")
    [record] = (await kafka.read_table(settings, [table], "test"))[table]
    assert (record.key, record.value) == (b"key", b"value")
    async with open_producer(settings, 5.0) as producer:
        await producer.send(DEMAND_TOPIC, b"x", b"f", headers=[])
        await producer.flush()
    async with kafka.started(kafka.consumer(settings, "test", group=f"group-{table}"), settings) as consumer:
        consumer.subscribe([table])
        assert (await consumer.getone()).value == b"value"
        member_id = consumer._coordinator.member_id
        whole = dataclasses.replace(Settings(), kafka=settings)
        await Membership(dataclasses.replace(whole, paths=dataclasses.replace(whole.paths, state_dir=tmp_path)))._leave(
            f"group-{table}", member_id
        )


@pytest.mark.parametrize(
    ("protocol", "wrong", "message"),
    [
        ("SASL_SSL", {"password": "wrong"}, r"it refuses the login .*check kafka\.username, kafka\.password"),
        ("SASL_SSL", {"ca": "stranger.crt"}, r"its certificate is not accepted .*check kafka\.ca"),
        ("SASL_SSL", {"ca": ""}, r"its certificate is not accepted .*check kafka\.ca"),
        ("SSL", {"certificate": "stranger.crt", "key": "stranger.key"}, r"cannot reach the Kafka broker"),
    ],
)
async def test_what_the_broker_refuses_is_named(
    addresses: dict[str, str], home: Path, protocol: str, wrong: dict[str, str], message: str
) -> None:
    given = {name: str(home / value) if value.startswith("stranger") else value for name, value in wrong.items()}
    settings = dataclasses.replace(settings_of(addresses, home, protocol), **given)
    with pytest.raises(KafkaUnavailable, match=message) as caught:
        await kafka.start(kafka.producer(settings, "test"), settings)
    with pytest.raises(KafkaUnavailable):
        health.check_kafka(settings, write=False)
    assert "plain-word" not in str(caught.value) + repr(settings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"security_protocol": "TLS"}, "none of PLAINTEXT, SSL"),
        ({"password": "x"}, r"kafka\.password is set and kafka\.security_protocol is PLAINTEXT"),
        ({"security_protocol": "SASL_SSL"}, r"set kafka\.username and kafka\.password"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "GSSAPI", "username": "u", "password": "p"}, "none of PLAIN, SCRAM"),
        ({"security_protocol": "SSL", "ca": "/nowhere"}, r"kafka\.ca: /nowhere"),
        ({"security_protocol": "SSL", "certificate": "/nowhere"}, r"kafka\.certificate /nowhere"),
    ],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        kafka.security(KafkaSettings(bootstrap_servers="127.0.0.1:9", **wrong))
