"""The object store: one small synchronous client over boto3, with errors that name bucket and key.

In: S3 settings. Out: bytes, or an exception of :mod:`infra.errors`. Thread-safe; callers on an event loop use worker threads. Whole objects
come by :mod:`infra.s3get`, and by boto3 when that cannot have them. Next: :mod:`agent.store`, :mod:`infra.local.objectstore`.
"""

from __future__ import annotations

from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError, PartialCredentialsError
from botocore.httpsession import get_cert_path

from infra.errors import ObjectConflict, ObjectMissing, SettingsError, StoreError, StoreUnavailable
from infra.s3get import SignedGet
from infra.settings import S3Settings

_MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_CONFLICT = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "401", "InvalidToken"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
#: What botocore raises where it looks for credentials, or renews them; a provider that gives expired ones is a RuntimeError.
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, RuntimeError)
#: What boto3 raises. ValueError: a header that is none, of an answer that was corrupted on its way.
_FAILURES = (BotoCoreError, ClientError, OSError, RuntimeError, ValueError)
#: Open connections of a process in which starts wait for GETs: pointer, then head and working set, of two starts at once.
WARM_CONNECTIONS = 4


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

    def get(self, key: str, *, size_max: int) -> bytes:
        """One whole object.

        Raises:
            ObjectMissing, StoreUnavailable, StoreError: also when the object is larger than ``size_max`` bytes.
        """
        try:
            data = self._get.get(key, size_max) if self._get else None
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

    def get_with_tag(self, key: str, *, size_max: int) -> tuple[bytes, str]:
        """A small object and its ETag, for a conditional :meth:`put` later."""
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            return answer["Body"].read(size_max), str(answer["ETag"])
        except _FAILURES as error:
            raise self._explain(error, key) from error

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
        try:
            self._client.put_object(Bucket=self.bucket, Key=key, Body=body, **condition)
        except _FAILURES as error:
            raise self._explain(error, key) from error

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self._client.head_object(Bucket=self.bucket, Key=key)
        except _FAILURES as error:
            explained = self._explain(error, key)
            if isinstance(explained, ObjectMissing):
                return False
            raise explained from error
        return True

    def delete(self, key: str) -> None:
        """Remove one object; no error when it is not there."""
        try:
            self._client.delete_object(Bucket=self.bucket, Key=key)
        except _FAILURES as error:
            raise self._explain(error, key) from error

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with ``prefix``."""
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [item["Key"] for page in pages for item in page.get("Contents", [])]
        except _FAILURES as error:
            raise self._explain(error, prefix) from error

    def close(self) -> None:
        """Close connections."""
        if self._get:
            self._get.close()
        self._client.close()

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
                return StoreError(text, bucket=self.bucket, key=key)
            if code in _DENIED:
                text = f"the object store at {self._endpoint} refuses the credentials ({code}); check settings s3.access_key"
                return StoreError(text, bucket=self.bucket, key=key)
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
