"""The object store: one small synchronous client over boto3, with errors that name bucket and key.

In: S3 settings. Out: bytes, or an exception of :mod:`infra.errors`. Thread-safe; callers on an event loop use worker threads. Whole objects
come by :mod:`infra.s3get`, and by boto3 when that cannot have them, repeated and bounded by :mod:`infra.guard`.
Next: :mod:`agent.store`, :mod:`infra.local.objectstore`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError, PartialCredentialsError
from botocore.httpsession import get_cert_path

from infra.errors import ObjectConflict, ObjectMissing, SettingsError, StoreError, StoreRefused, StoreUnavailable
from infra.guard import Guard, Limits
from infra.s3get import SignedGet
from infra.settings import S3Settings

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_CONFLICT = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_DENIED = {"403", "AccessDenied", "401"}
#: These are about who asks, so that every request will be refused; so will be those with credentials that have expired.
_STRANGER = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "RequestExpired"}
_CLOCK = "RequestTimeTooSkewed"
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
#: What botocore raises where it looks for credentials, or renews them; a provider that gives expired ones is a RuntimeError.
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, RuntimeError)
#: What boto3 raises. ValueError: a header that is none, of an answer that was corrupted on its way.
_FAILURES = (BotoCoreError, ClientError, OSError, RuntimeError, ValueError)
#: Open connections of a process in which starts wait for GETs: pointer, then head and working set, of two starts at once.
WARM_CONNECTIONS = 4
#: No such object is ever made: a store that says so works.
_PROBE_KEY = "health/probe"
T = TypeVar("T")


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing tells it: its key, bytes, and when it was written, s since 1970."""

    key: str
    size: int
    written_at: float


class ObjectStore:
    """One bucket."""

    def __init__(self, settings: S3Settings, parallel: int = 16, warm: int = 0) -> None:
        """Prepare; nothing is asked yet.

        Args:
            settings: where and who.
            parallel: connections kept, for GETs and for all else.
            warm: connections for GETs to have open before they are needed.
        """
        self.bucket = settings.bucket
        self._endpoint = settings.endpoint_url or "AWS"
        self._sealed_by_store = _server_side_encryption(settings)
        config = Config(
            signature_version="s3v4",
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            retries={"total_max_attempts": settings.attempts, "mode": "standard"},
            max_pool_connections=parallel,
            proxies={},  # neither for boto3 nor for SignedGet
            s3={"addressing_style": "path"},
            # Digests of Thaw's own cover every object; boto3's CRC would be a second pass over each byte.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        core = botocore.session.get_session()
        session = boto3.session.Session(
            aws_access_key_id=settings.access_key or None,
            aws_secret_access_key=settings.secret_key or None,
            aws_session_token=settings.session_token or None,
            botocore_session=core,
        )
        trusted = settings.ca or core.get_config_variable("ca_bundle") or get_cert_path(True)
        self._client: Any = session.client(
            "s3", endpoint_url=settings.endpoint_url or None, region_name=settings.region, config=config, verify=trusted
        )
        self._client.meta.events.register_last("before-call.s3", _expect_nothing)
        credentials = session.get_credentials()
        self._get: SignedGet | None = None
        if credentials is not None:  # else boto3 says what is missing
            self._get = SignedGet(
                settings.bucket,
                self._client.meta.endpoint_url,
                settings.region,
                credentials,
                trusted,
                warm=warm,
                most=max(parallel, warm),
                connect_timeout_s=settings.connect_timeout_s,
                read_timeout_s=settings.read_timeout_s,
            )

        self.guard = Guard(
            f"the object store at {self._endpoint}", settings.attempts, settings.read_timeout_s, self._probe if warm and self._get else None
        )

    def get(self, key: str, *, size_max: int, timeout_s: float | None = None) -> bytes:
        """One whole object.

        Args:
            key: its name.
            size_max: largest size that is read.
            timeout_s: longest wait, repetitions included.

        Raises:
            ObjectMissing, StoreUnavailable, StoreRefused, StoreError: also when the object is larger than ``size_max`` bytes.
        """
        return self.guard.run(lambda limits: self._get_once(key, size_max, limits), timeout_s)

    def _get_once(self, key: str, size_max: int, limits: Limits) -> bytes:
        try:
            data = self._get.get(key, size_max, limits) if self._get else None
            if data is not None:
                return data
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            size = int(answer["ContentLength"])
            if size > size_max:
                raise StoreError(f"the object has {size} bytes, {size_max} at most were expected", bucket=self.bucket, key=key)
            data = bytes(answer["Body"].read())
        except _FAILURES as error:
            raise self._explain(error, key) from error
        if len(data) != size:
            raise StoreUnavailable(f"the object was cut short: {len(data)} of {size} bytes", bucket=self.bucket, key=key)
        return data

    def ask(self, timeout_s: float) -> None:
        """Whether it answers: asks for an object that is never made.

        Raises:
            StoreUnavailable, StoreRefused, StoreError: it does not, and why.
        """
        with contextlib.suppress(ObjectMissing):
            self.get(_PROBE_KEY, size_max=1 << 20, timeout_s=timeout_s)

    def _probe(self, limits: Limits) -> None:
        with contextlib.suppress(ObjectMissing):
            self._get_once(_PROBE_KEY, 1 << 20, limits)

    def get_with_tag(self, key: str, *, size_max: int) -> tuple[bytes, str]:
        """A small object and its ETag, for a conditional :meth:`put` later."""

        def request() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            return answer["Body"].read(size_max), str(answer["ETag"])

        return self._watched(request, key)

    def put(self, key: str, body: bytes, *, only_if_absent: bool = False, only_if_tag: str = "") -> None:
        """Write one object.

        Args:
            key: its name.
            body: its bytes.
            only_if_absent: fail with ObjectConflict when it exists.
            only_if_tag: fail with ObjectConflict unless it exists with this ETag.
        """
        condition = dict(self._sealed_by_store)
        if only_if_absent:
            condition["IfNoneMatch"] = "*"
        if only_if_tag:
            condition["IfMatch"] = only_if_tag
        self._watched(lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=body, **condition), key)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self.written_at(key) is not None

    def delete(self, key: str) -> None:
        """Remove one object; no error when it is not there."""
        self._watched(lambda: self._client.delete_object(Bucket=self.bucket, Key=key), key)

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with ``prefix``."""
        return [item.key for item in self.objects(prefix)]

    def objects(self, prefix: str) -> Sequence[StoredObject]:
        """What begins with ``prefix``, with sizes and times."""

        def request() -> list[StoredObject]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [
                StoredObject(item["Key"], int(item["Size"]), item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", [])
            ]

        return self._watched(request, prefix)

    def folders(self, prefix: str) -> Sequence[str]:
        """What comes after ``prefix`` in keys, up to the next slash."""

        def request() -> list[str]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
            return [item["Prefix"][len(prefix) : -1] for page in pages for item in page.get("CommonPrefixes", [])]

        return self._watched(request, prefix)

    def written_at(self, key: str) -> float | None:
        """When an object was last written, s since 1970; None when there is none."""

        def request() -> float:
            modified: float = self._client.head_object(Bucket=self.bucket, Key=key)["LastModified"].timestamp()
            return modified

        try:
            return self._watched(request, key)
        except ObjectMissing:
            return None

    def close(self) -> None:
        """Close connections."""
        self.guard.close()
        if self._get:
            self._get.close()
        self._client.close()

    def _watched(self, request: Callable[[], T], key: str) -> T:
        """Anything but a GET: boto3 repeats it by itself, and it is made even if the store seems to be dead."""

        def explained() -> T:
            try:
                return request()
            except _FAILURES as error:
                raise self._explain(error, key) from error

        return self.guard.watched(explained)

    def _explain(self, error: Exception, key: str) -> StoreError:
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _MISSING:
                return ObjectMissing("there is no such object", bucket=self.bucket, key=key)
            if code in _CONFLICT:
                return ObjectConflict("another writer was first", bucket=self.bucket, key=key)
            if code in _EXPIRED:
                text = (
                    f"the credentials for the object store at {self._endpoint} have expired ({code}); set new ones (s3.access_key, "
                    "s3.secret_key, s3.session_token), or leave s3.access_key empty and let the environment or the instance renew them"
                )
                return StoreRefused(text, bucket=self.bucket, key=key)
            if code == _CLOCK:
                text = f"the object store at {self._endpoint} refuses the time of this machine ({code}): one of the clocks is wrong"
                return StoreRefused(text, bucket=self.bucket, key=key)
            if code in _DENIED | _STRANGER:
                text = f"the object store at {self._endpoint} refuses the credentials ({code}); check settings s3.access_key"
                kind = StoreRefused if code in _STRANGER else StoreError
                return kind(text, bucket=self.bucket, key=key)
            return StoreUnavailable(f"the object store at {self._endpoint} answered {code}: {error}", bucket=self.bucket, key=key)
        if isinstance(error, _CREDENTIALS):
            text = (
                f"no credentials for the object store at {self._endpoint}: {error}; set s3.access_key and s3.secret_key, or check what the "
                "environment, the service account or the instance provides"
            )
            return StoreUnavailable(text, bucket=self.bucket, key=key)
        text = f"the object store at {self._endpoint} does not answer: {error}; check settings s3.endpoint_url and that it runs"
        return StoreUnavailable(text, bucket=self.bucket, key=key)


def _server_side_encryption(settings: S3Settings) -> dict[str, str]:
    """What every PUT says of it.

    Raises:
        SettingsError: unknown, or a key without ``aws:kms``.
    """
    if settings.sse not in ("", "AES256", "aws:kms"):
        raise SettingsError(f"setting s3.sse: {settings.sse!r} is neither empty nor AES256 nor aws:kms")
    if settings.sse_kms_key_id and settings.sse != "aws:kms":
        raise SettingsError("setting s3.sse_kms_key_id needs s3.sse=aws:kms")
    said = {"ServerSideEncryption": settings.sse, "SSEKMSKeyId": settings.sse_kms_key_id}
    return {name: value for name, value in said.items() if value}


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    """Send a body without asking whether it is wanted.

    Of an answer to that question which breaks off botocore reads the rest for ever (``_consume_headers`` in its ``awsrequest``): the thread
    never ends, and takes a processor. And the question costs a round trip.
    """
    params["headers"].pop("Expect", None)
