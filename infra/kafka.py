"""Everything that opens a connection to Kafka: topics, producers, consumers, whole tables; and one readable error for all of them.

In: :class:`infra.settings.KafkaSettings`. Out: started aiokafka clients that reconnect by themselves for as long as they live, or
:class:`infra.errors.KafkaUnavailable`, which names the address and what to do. Used by :mod:`scaler.edges` and the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import create_conn
from aiokafka.conn import collect_hosts
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAlreadyExistsError, for_code

from infra.aiokafka_repairs import check_alive
from infra.errors import KafkaUnavailable, SettingsError
from infra.settings import KafkaSettings

logger = logging.getLogger(__name__)
#: Longest wait for a client to say goodbye, s.
_CLOSE_S = 3.0
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
#: Longest wait for the answer to :func:`trouble`, s.
_PING_S = 3.0


@dataclass(frozen=True)
class Topic:
    """A topic that Thaw makes if it is not there.

    Attributes:
        name: as in Kafka.
        partitions: None: as many as the settings say.
        config: Kafka's topic settings.
    """

    name: str
    partitions: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)


def unavailable(settings: KafkaSettings, error: BaseException, refusal: str = "") -> KafkaUnavailable:
    """The readable form of any failure to talk to the broker; ``refusal``: why, if it is known better than by the error."""
    where = settings.bootstrap_servers
    if refusal:
        reason = refusal
    elif isinstance(error, TimeoutError):
        reason = f"no answer within {settings.request_timeout_ms / 1000:g} s"
    elif isinstance(error, KafkaConnectionError):
        reason = "nothing answers there"
    else:
        reason = str(error) or type(error).__name__
    return KafkaUnavailable(
        f"cannot reach the Kafka broker at {where}: {reason}. Check that it runs (`thaw stack status` for the embedded one) "
        "and the setting kafka.bootstrap_servers (THAW_KAFKA_BOOTSTRAP_SERVERS)"
    )


def security(settings: KafkaSettings) -> dict[str, Any]:
    """Options of every aiokafka client: TLS and login. Files are read now; a client that is made later sees them replaced.

    Raises:
        SettingsError: the settings contradict each other, or a file of theirs cannot be used.
    """
    protocol, mechanism = settings.security_protocol.upper(), settings.sasl_mechanism.upper()
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise SettingsError(f"setting kafka.security_protocol: {protocol!r} is none of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL")
    given = {name: getattr(settings, name) for name in ("username", "password", "ca", "certificate", "key")}
    useless = [name for name in ("username", "password") if given[name] and not protocol.startswith("SASL")]
    useless += [name for name in ("ca", "certificate", "key") if given[name] and not protocol.endswith("SSL")]
    if useless:
        raise SettingsError(f"kafka.{useless[0]} is set and kafka.security_protocol is {protocol}, which does not use it")
    if protocol == "PLAINTEXT":
        return {}
    options: dict[str, Any] = {"security_protocol": protocol}
    if protocol.startswith("SASL"):
        if mechanism not in _MECHANISMS:
            raise SettingsError(f"setting kafka.sasl_mechanism: {mechanism!r} is none of {', '.join(_MECHANISMS)}")
        if not settings.username or not settings.password:
            raise SettingsError(f"kafka.security_protocol is {protocol}: set kafka.username and kafka.password (THAW_KAFKA_PASSWORD)")
        options |= {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password,
        }
    if protocol.endswith("SSL"):
        options["ssl_context"] = _context(settings)
    return options


def _context(settings: KafkaSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca or None)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"kafka.ca: {settings.ca} holds no certificate of an authority: {error}") from error
    if settings.certificate:
        try:
            context.load_cert_chain(settings.certificate, settings.key or None)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"kafka.certificate {settings.certificate} and kafka.key {settings.key} are no certificate and its key: {error}"
            ) from error
    return context


async def refusal_of(settings: KafkaSettings) -> str:
    """Why no broker is reached over TLS or as a user: clients keep that to their log. Empty: unknown."""
    options = security(settings)
    for host, port, _ in collect_hosts(settings.bootstrap_servers):
        try:
            connection = await create_conn(
                host, port, client_id="thaw-probe", request_timeout_ms=min(2000, settings.request_timeout_ms), **options
            )
            connection.close()
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is not accepted ({error.verify_message}); check kafka.ca"
        except ssl.SSLError as error:
            return f"no TLS with it ({error.reason or error}); check kafka.security_protocol and kafka.certificate"
        except KafkaConnectionError:
            continue  # nothing answers, or it hangs up: there may be others
        except KafkaError as error:
            return f"it refuses the login ({error}); check kafka.username, kafka.password and kafka.sasl_mechanism"
        except (OSError, TimeoutError):
            continue
    return ""


def producer(settings: KafkaSettings, client_id: str) -> AIOKafkaProducer:
    """A producer that waits for nothing but the broker: no linger, all replicas, no duplicates."""
    return AIOKafkaProducer(
        bootstrap_servers=_address(settings),
        client_id=client_id,
        acks="all",
        # Lets records wait out a restart of the broker; without it they fail after request_timeout_ms.
        enable_idempotence=True,
        linger_ms=0,
        request_timeout_ms=settings.request_timeout_ms,
        metadata_max_age_ms=30_000,
        **security(settings),
    )


def consumer(
    settings: KafkaSettings, client_id: str, *, group: str | None = None, fetch_max_wait_ms: int | None = None
) -> AIOKafkaConsumer:
    """A consumer without subscription. It never commits by itself: only its user knows what has been absorbed.

    Args:
        settings: the broker.
        client_id: its name for the broker's logs and limits.
        group: shares the partitions of its subscription; None: reads what it is assigned.
        fetch_max_wait_ms: other than the settings' one, which is for those who wait for every record: short fetches keep the
            broker and this process busy all the time.
    """
    return AIOKafkaConsumer(
        bootstrap_servers=_address(settings),
        client_id=client_id,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=fetch_max_wait_ms or settings.fetch_max_wait_ms,
        request_timeout_ms=settings.request_timeout_ms,
        session_timeout_ms=settings.session_timeout_ms,
        # Also how soon a member notices that another has left and its shards are free.
        heartbeat_interval_ms=min(500, settings.session_timeout_ms // 6),
        metadata_max_age_ms=30_000,
        **security(settings),
    )


@contextlib.asynccontextmanager
async def started(client: Any, settings: KafkaSettings) -> AsyncIterator[Any]:
    """Connect a client for the length of a block.

    Raises:
        KafkaUnavailable: no broker answers within the request timeout.
    """
    await start(client, settings)
    try:
        yield client
    finally:
        await close(client)


async def start(client: Any, settings: KafkaSettings) -> None:
    """Connect a client; the caller closes it.

    Raises:
        KafkaUnavailable: no broker answers within the request timeout.
    """
    try:
        async with asyncio.timeout(settings.request_timeout_ms / 1000):
            await client.start()
    except (KafkaError, OSError, ValueError) as error:
        await close(client)
        refusal = await refusal_of(settings) if settings.security_protocol != "PLAINTEXT" else ""
        raise unavailable(settings, error, refusal) from error
    except BaseException:
        await close(client)
        raise


def ensure_alive(client: Any, settings: KafkaSettings) -> None:
    """Notice that a producer or consumer has died inside; an outage does not count, clients wait that out.

    Raises:
        KafkaUnavailable: it does nothing any more; only a new one helps.
    """
    try:
        check_alive(client)
    except KafkaError as error:
        raise unavailable(settings, error) from error


async def trouble(client: AIOKafkaProducer, settings: KafkaSettings) -> str:
    """Ask the broker for something small; what is wrong with it, or nothing."""
    try:
        async with asyncio.timeout(min(_PING_S, settings.request_timeout_ms / 1000)):
            await client.client.fetch_all_metadata()
    except (KafkaError, OSError) as error:
        return str(unavailable(settings, error))
    return ""


async def close(client: Any) -> None:
    """Close a client, whatever state it is in, in bounded time."""
    stop = getattr(client, "stop", None) or client.close
    try:
        async with asyncio.timeout(_CLOSE_S):
            await stop()
    except (KafkaError, OSError) as error:
        logger.debug("closing a Kafka client: %s", error or type(error).__name__)


async def ensure_topics(settings: KafkaSettings, topics: Iterable[Topic]) -> None:
    """Make the topics that are not there; those that are stay as they are.

    Raises:
        KafkaUnavailable: the broker cannot be reached or does not make a topic; the message says why.
    """
    wanted = [
        NewTopic(
            topic.name,
            topic.partitions or settings.partitions,
            settings.replication_factor,
            topic_configs=dict(topic.config),
        )
        for topic in topics
    ]
    admin = AIOKafkaAdminClient(
        bootstrap_servers=_address(settings),
        client_id="thaw-topics",
        request_timeout_ms=settings.request_timeout_ms,
        **security(settings),
    )
    async with started(admin, settings):
        try:
            async with asyncio.timeout(settings.request_timeout_ms / 1000):
                # A broker that lets this client use topics and not make them refuses to make even those that are there.
                there = await admin.list_topics()
                response = await admin.create_topics([topic for topic in wanted if topic.name not in there])
        except (KafkaError, OSError) as error:
            raise unavailable(settings, error) from error
    for result in response.to_object()["topic_errors"]:
        if result["error_code"] not in (0, TopicAlreadyExistsError.errno):
            reason = result.get("error_message") or for_code(result["error_code"]).__name__
            raise KafkaUnavailable(f"the Kafka broker at {settings.bootstrap_servers} does not make the topic {result['topic']}: {reason}")


async def read_table(settings: KafkaSettings, topics: Sequence[str], client_id: str) -> dict[str, list[ConsumerRecord]]:
    """Every record of some (compacted, small) topics up to now, oldest first; a topic that does not exist is empty.

    Raises:
        KafkaUnavailable: the broker cannot be reached, or stops answering.
    """
    records: dict[str, list[ConsumerRecord]] = {topic: [] for topic in topics}
    async with started(consumer(settings, client_id), settings) as reader:
        try:
            async with asyncio.timeout(settings.request_timeout_ms / 1000):
                partitions = await partitions_of(reader, topics)
                async for record in read_to_end(reader, partitions):
                    records[record.topic].append(record)
        except (KafkaError, OSError) as error:
            raise unavailable(settings, error) from error
    return records


async def partitions_of(reader: AIOKafkaConsumer, topics: Iterable[str]) -> list[TopicPartition]:
    """All partitions of those of ``topics`` that exist."""
    # The public way, topics() and then partitions_for_topic(), looks into two different caches: the second may be empty.
    cluster = await reader._client.fetch_all_metadata()
    return [TopicPartition(topic, number) for topic in topics for number in sorted(cluster.partitions_for_topic(topic) or ())]


async def read_to_end(
    reader: AIOKafkaConsumer, partitions: Sequence[TopicPartition], *, since_ms: int | None = None
) -> AsyncIterator[ConsumerRecord]:
    """Records of ``partitions`` from their beginning, or from a time on, to what their end is now.

    The consumer stays assigned, to be read on.
    """
    if not partitions:
        return
    reader.assign(partitions)
    await reader.seek_to_beginning(*partitions)
    ends = await reader.end_offsets(partitions)
    if since_ms is not None:
        first = await reader.offsets_for_times(dict.fromkeys(partitions, since_ms))
        for partition in partitions:
            reader.seek(partition, first[partition].offset if first[partition] else ends[partition])
    # Positions, not offsets of records: the last offset of a compacted partition may hold no record.
    while any([await reader.position(partition) < ends[partition] for partition in partitions]):
        for batch in (await reader.getmany(timeout_ms=100)).values():
            for record in batch:
                yield record


def _address(settings: KafkaSettings) -> str:
    if not settings.bootstrap_servers:
        raise KafkaUnavailable(
            "no Kafka broker is known: start the embedded one with `thaw stack up`, "
            "or set kafka.bootstrap_servers (THAW_KAFKA_BOOTSTRAP_SERVERS)"
        )
    return settings.bootstrap_servers
