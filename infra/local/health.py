"""Questions that a broker or an object store can only answer when it really works.

In: addresses and credentials, of the embedded stack or the user's own. Out: nothing, or an error with the cause.
Next: :mod:`infra.local.parts` asks before it calls anything healthy.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import secrets
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.config
import botocore.exceptions
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAlreadyExistsError

from infra import kafka
from infra.errors import KafkaUnavailable, StoreUnavailable
from infra.local import ports
from infra.settings import KafkaSettings, S3Settings

#: Topic of the embedded broker that health checks write to; its records are dropped after a minute.
HEALTH_TOPIC = "thaw.health"
_THREAD = "thaw-health"


def check_kafka(settings: KafkaSettings, *, write: bool, timeout_s: float = 10.0) -> None:
    """Ask a broker for its topics and, when ``write``, send a record and read it back.

    Args:
        settings: the broker.
        write: also create :data:`HEALTH_TOPIC` and use it; False for a broker that is not ours.
        timeout_s: longest wait for all of it, s.

    Raises:
        KafkaUnavailable: it can't be reached or does not do what was asked.
    """
    bootstrap_servers = settings.bootstrap_servers
    # aiokafka logs each refused connection as an error: ask quietly first.
    if not any(ports.answers(host, port) for host, port in addresses(bootstrap_servers)):
        raise KafkaUnavailable(f"nothing answers at {bootstrap_servers}")

    async def ask() -> None:
        async with asyncio.timeout(timeout_s):
            try:
                await (_round_trip(settings) if write else _list_topics(settings))
            except KafkaConnectionError as error:
                if reason := await kafka.refusal_of(settings):
                    raise KafkaUnavailable(f"the broker at {bootstrap_servers}: {reason}") from error
                raise

    try:
        # In a thread of its own, because the caller may itself be inside a running event loop.
        with _quiet(), concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=_THREAD) as pool:
            pool.submit(lambda: asyncio.run(ask())).result()
    except TimeoutError:
        raise KafkaUnavailable(f"the broker at {bootstrap_servers} did not answer in {timeout_s:.0f} s") from None
    except (KafkaError, OSError, AssertionError) as error:
        raise KafkaUnavailable(f"the broker at {bootstrap_servers}: {type(error).__name__} {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's errors about a server that does not work out of the log: the check itself reports them.

    Only those of the checking thread: other parts of this process use the same client.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not (record.threadName or "").startswith(_THREAD)

    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("aiokafka")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def addresses(bootstrap_servers: str) -> list[tuple[str, int]]:
    """Split ``host:port,host:port``.

    Raises:
        KafkaUnavailable: a part is no ``host:port``.
    """
    found = []
    for part in bootstrap_servers.split(","):
        host, _, port = part.strip().rpartition(":")
        if not host or not port.isdigit():
            raise KafkaUnavailable(f"{part!r} in kafka.bootstrap_servers is not host:port")
        found.append((host.strip("[]"), int(port)))
    return found


def _options(settings: KafkaSettings) -> dict[str, Any]:
    return {"bootstrap_servers": settings.bootstrap_servers, **kafka.security(settings)}


async def _list_topics(settings: KafkaSettings) -> None:
    admin = AIOKafkaAdminClient(**_options(settings))
    try:
        await admin.start()
        await admin.list_topics()
    finally:
        await admin.close()


async def _round_trip(settings: KafkaSettings) -> None:
    admin = AIOKafkaAdminClient(**_options(settings))
    try:
        await admin.start()
        topic = NewTopic(HEALTH_TOPIC, 1, 1, topic_configs={"retention.ms": "60000", "segment.ms": "60000"})
        with contextlib.suppress(TopicAlreadyExistsError):
            await admin.create_topics([topic])
    finally:
        await admin.close()
    nonce = secrets.token_bytes(16)
    producer = AIOKafkaProducer(**_options(settings), acks="all")
    try:
        await producer.start()
        sent = await producer.send_and_wait(HEALTH_TOPIC, nonce, partition=0)
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer(**_options(settings), group_id=None, enable_auto_commit=False)
    try:
        await consumer.start()
        place = TopicPartition(HEALTH_TOPIC, 0)
        consumer.assign([place])
        consumer.seek(place, sent.offset)
        record = await consumer.getone()
    finally:
        await consumer.stop()
    if record.value != nonce:
        raise KafkaUnavailable(f"the broker at {settings.bootstrap_servers} returned another record than was sent")


def check_s3(settings: S3Settings, *, timeout_s: float = 5.0) -> None:
    """Write an object, read it back, delete it. Makes the bucket when it is missing.

    Args:
        settings: address, credentials and bucket.
        timeout_s: longest wait for one request, s.

    Raises:
        StoreUnavailable: it can't be reached, refuses the credentials, or returned something else.
    """
    client = _client(settings, timeout_s)
    key, nonce = f"health/{secrets.token_hex(8)}", secrets.token_bytes(16)
    try:
        _ensure_bucket(client, settings)
        client.put_object(Bucket=settings.bucket, Key=key, Body=nonce)
        found = client.get_object(Bucket=settings.bucket, Key=key)["Body"].read()
        client.delete_object(Bucket=settings.bucket, Key=key)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError) as error:
        raise StoreUnavailable(f"the object store at {settings.endpoint_url}: {error}", bucket=settings.bucket) from error
    finally:
        client.close()
    if found != nonce:
        raise StoreUnavailable(f"the object store at {settings.endpoint_url} returned other bytes than were put")


def _client(settings: S3Settings, timeout_s: float) -> Any:
    config = botocore.config.Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"},
    )
    return boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key or None,
        aws_secret_access_key=settings.secret_key or None,
        aws_session_token=settings.session_token or None,
        verify=settings.ca or None,
        config=config,
    )


def _ensure_bucket(client: Any, settings: S3Settings) -> None:
    try:
        client.head_bucket(Bucket=settings.bucket)
    except botocore.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        try:
            client.create_bucket(Bucket=settings.bucket)
        except botocore.exceptions.ClientError as refused:
            if refused.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
