"""The shipped Kafka module on a real broker with an authorizer: made, changed, used by Thaw within its ACLs, removed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError

from agent.api.function import Function, FunctionSpec, Metadata
from infra import kafka, telemetry
from infra import settings as settings_module
from infra.errors import KafkaUnavailable
from infra.local import broker, ports, processes
from infra.local.terraform import Terraform
from infra.settings import Settings
from scaler.demand import DEMAND_TOPIC, FORECASTS_TOPIC, FUNCTIONS_TOPIC, RESTORES_TOPIC, STATE_TOPIC, DemandEvent, encode
from scaler.edges.topics import TOPICS
from scaler.service import Service
from tests.terraform_workspace import Workspace
from thaw.functions import apply_functions, read_functions

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

ROLES = ("scaler", "gateway", "operator")
#: A second listener, on which users log in, and the authorizer. On the first everybody is the administrator.
SECURED = """
listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER_PORT@,USERS://127.0.0.1:{users}
advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER_PORT@,USERS://127.0.0.1:{users}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,USERS:SASL_PLAINTEXT
listener.name.users.sasl.enabled.mechanisms=PLAIN
listener.name.users.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required {logins};
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""


@dataclass(frozen=True)
class SecuredBroker:
    """Addresses for the administrator and for users who log in."""

    administrator: str
    users: str


@pytest.fixture(scope="module")
def secured(stack_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    home = tmp_path_factory.mktemp("secured")
    port, controller, users = ports.free(3)
    logins = " ".join(f'user_{name}="{name}"' for name in ROLES)
    properties = home / "kafka.properties"
    kept = [
        line for line in broker._PROPERTIES.read_text().splitlines() if "listener" not in line or line.startswith(("controller.", "inter."))
    ]
    properties.write_text("\n".join(kept) + SECURED.format(users=users, logins=logins))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker, "_PROPERTIES", properties)
        identity = broker.start(stack_settings, data=home / "data", port=port, controller_port=controller, record=home / "pid")
    try:
        deadline = time.monotonic() + 60
        while not ports.answers("127.0.0.1", users):
            assert identity.alive() and time.monotonic() < deadline, (home / "data" / "kafka.log").read_text()[-2000:]
            time.sleep(0.1)
        yield SecuredBroker(f"127.0.0.1:{port}", f"127.0.0.1:{users}")
    finally:
        processes.stop(identity)


@pytest.fixture
def world(terraform_tools: Terraform, tmp_path: Path, secured: SecuredBroker) -> Iterator[Workspace]:
    """A root that uses the module as the example does; what it made is gone afterwards."""
    made = Workspace(terraform_tools, tmp_path / "terraform", "modules/kafka")
    provider = f'provider "kafka" {{\n  bootstrap_servers = ["{secured.administrator}"]\n  tls_enabled       = false\n}}\n'
    made.write("provider.tf", provider)
    made.init()
    yield made
    made.destroy()


@dataclass(frozen=True)
class Found:
    """A topic as the broker has it."""

    partitions: int
    replicas: int
    config: MappingProxyType[str, str]


async def topics_of(address: str) -> dict[str, Found]:
    """Thaw's topics, with the configuration that was set for them."""
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        found = {}
        for topic in await admin.describe_topics():
            if topic["topic"].startswith("thaw."):
                [described] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic["topic"])])
                [(_, _, _, _, entries)] = described.resources
                config = {entry[0]: entry[1] for entry in entries if entry[3] == 1}  # source: set for this topic
                found[topic["topic"]] = Found(len(topic["partitions"]), len(topic["partitions"][0]["replicas"]), MappingProxyType(config))
        return found
    finally:
        await admin.close()


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that Thaw makes log in as who the task that makes them is."""

    def logged_in(kind: Callable[..., Any]) -> Callable[..., Any]:
        def make(**options: Any) -> Any:
            login = {"sasl_mechanism": "PLAIN", "sasl_plain_username": _user.get(), "sasl_plain_password": _user.get()}
            return kind(**options, security_protocol="SASL_PLAINTEXT", **login)

        return make

    for kind in (AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient):
        monkeypatch.setattr(kafka, kind.__name__, logged_in(kind))


_user: ContextVar[str] = ContextVar("_user")


@contextmanager
def log_in(name: str) -> Iterator[None]:
    token = _user.set(name)
    try:
        yield
    finally:
        _user.reset(token)


def settings_of(secured: SecuredBroker, home: Path) -> Settings:
    flags = {
        "kafka.bootstrap_servers": secured.users,
        "kafka.session_timeout_ms": 3000,
        "paths.state_dir": home / "state",
        "scaler.agents": "127.0.0.1:1",
        "scaler.node_grace_s": 0.2,
    }
    return settings_module.load(environment={}, flags=flags)


async def test_topics_are_made_as_thaw_makes_them_and_change(world: Workspace, secured: SecuredBroker) -> None:
    world.variables(replication_factor=1)
    world.apply()
    found = await topics_of(secured.administrator)
    wanted = {
        topic.name: Found(topic.partitions or 4, 1, MappingProxyType({**topic.config, "min.insync.replicas": "1"})) for topic in TOPICS
    }
    assert found == wanted

    world.variables(replication_factor=1, partitions=6, retention_hours={"demand": 48, "restores": 1})
    said = world.apply()
    assert "0 to add, 3 to change, 0 to destroy" in said
    changed = await topics_of(secured.administrator)
    assert (changed[DEMAND_TOPIC].partitions, changed[DEMAND_TOPIC].config["retention.ms"]) == (6, "172800000")
    assert (changed[RESTORES_TOPIC].partitions, changed[RESTORES_TOPIC].config["retention.ms"]) == (6, "3600000")
    assert (changed[FORECASTS_TOPIC].partitions, changed[FORECASTS_TOPIC].config) == (6, wanted[FORECASTS_TOPIC].config)
    assert {name: changed[name] for name in (STATE_TOPIC, FUNCTIONS_TOPIC)} == {
        name: wanted[name] for name in (STATE_TOPIC, FUNCTIONS_TOPIC)
    }

    world.variables(replication_factor=1, partitions=6)
    world.apply()
    again = await topics_of(secured.administrator)
    assert again[RESTORES_TOPIC].config == wanted[RESTORES_TOPIC].config
    assert world.outputs()["settings"]["kafka"] == {"partitions": "6", "replication_factor": "1"}

    world.destroy()
    deadline = time.monotonic() + 5  # brokers hear a moment later of what the controller has deleted
    while (left := await topics_of(secured.administrator)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert left == {}


async def test_a_topic_that_was_removed_by_hand_comes_back(world: Workspace, secured: SecuredBroker) -> None:
    world.variables(replication_factor=1)
    world.apply()
    admin = AIOKafkaAdminClient(bootstrap_servers=secured.administrator)
    await admin.start()
    await admin.delete_topics([STATE_TOPIC])
    await admin.close()
    assert "1 to add" in world("plan", "-detailed-exitcode", codes=(2,))
    world.apply()
    assert STATE_TOPIC in await topics_of(secured.administrator)


@asynccontextmanager
async def running_scaler(settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    running = asyncio.create_task(Service(settings, telemetry.configure("scaler", settings)).run(stop))
    try:
        yield running
    finally:
        stop.set()
        await running


async def test_each_role_can_do_its_work_and_nothing_else(world: Workspace, secured: SecuredBroker, tmp_path: Path, users: None) -> None:
    world.variables(
        replication_factor=1, principals={"scalers": ["User:scaler"], "producers": ["User:gateway"], "operators": ["User:operator"]}
    )
    world.apply()
    settings = settings_of(secured, tmp_path)
    function = Function(metadata=Metadata(name="guarded"), spec=FunctionSpec(command=["/bin/true"], port=8080))

    with log_in("operator"):
        assert await apply_functions(settings.kafka, [function]) == {"guarded": "created"}
        with pytest.raises(TopicAuthorizationFailedError):
            await send(settings, DEMAND_TOPIC, demand("guarded"))

    with log_in("gateway"):
        await send(settings, DEMAND_TOPIC, demand("guarded"))
        for topic in (FUNCTIONS_TOPIC, STATE_TOPIC, RESTORES_TOPIC):
            with pytest.raises(TopicAuthorizationFailedError):
                await send(settings, topic, b"forged")
        assert await read(settings, DEMAND_TOPIC) is None

    with log_in("scaler"):
        async with running_scaler(settings) as running:
            with log_in("operator"):
                deadline = time.monotonic() + 60
                while (state := (await read_functions(settings.kafka))["guarded"].state) is None or not state.level:
                    assert not running.done() and time.monotonic() < deadline, f"the scaler published {state}"
                    await asyncio.sleep(0.2)
            assert state.level == 1
        for topic in (DEMAND_TOPIC, FUNCTIONS_TOPIC):
            with pytest.raises(TopicAuthorizationFailedError):
                await send(settings, topic, b"forged")
        with pytest.raises(GroupAuthorizationFailedError):
            await join(settings, "another-group")

    world.variables(replication_factor=1)
    assert "15 to destroy" in world.apply()
    with log_in("gateway"), pytest.raises((TopicAuthorizationFailedError, KafkaUnavailable)):
        await send(settings, DEMAND_TOPIC, demand("guarded"))


def demand(function: str) -> bytes:
    now_ns = time.time_ns()
    return encode(DemandEvent(function=function, source="test", epoch=now_ns, seq=1, at=now_ns, in_flight=1, arrivals=1, ttl=120))


async def send(settings: Settings, topic: str, value: bytes) -> None:
    async with kafka.started(kafka.producer(settings.kafka, "test"), settings.kafka) as producer:
        await producer.send_and_wait(topic, value, b"guarded")


async def read(settings: Settings, topic: str) -> ConsumerRecord | None:
    """The first record of partition 0, None where reading is refused."""
    async with kafka.started(kafka.consumer(settings.kafka, "test"), settings.kafka) as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        try:
            async with asyncio.timeout(5):
                return await consumer.getone()
        except (TopicAuthorizationFailedError, TimeoutError):
            return None


async def join(settings: Settings, group: str) -> None:
    async with kafka.started(kafka.consumer(settings.kafka, "test", group=group), settings.kafka) as consumer:
        consumer.subscribe([DEMAND_TOPIC])
        async with asyncio.timeout(10):
            await consumer.getone()
