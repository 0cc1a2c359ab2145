"""Exceptions of the infra package.

InfraError
├── SettingsError
├── KeysInvalid              keys of checkpoint images are missing, malformed or open to others
├── InstallError
├── StackError
├── ClusterError
├── ImageError
├── ApiError                 the Kubernetes API server refused a request, or did not answer
│   ├── ApiUnavailable
│   ├── ApiBusy
│   ├── ApiConflict
│   ├── ApiExpired
│   ├── ApiMissing
│   ├── ApiForbidden
│   └── ApiInvalid
├── PodTemplateInvalid
├── KafkaUnavailable
├── TlsError
└── StoreError
    ├── StoreUnavailable
    ├── StoreRefused
    ├── ObjectMissing
    └── ObjectConflict
"""

from __future__ import annotations


class InfraError(Exception):
    """Anything that connects to the world failed. The message says what to do."""


class SettingsError(InfraError):
    """A setting is unknown or has a wrong value."""


class KeysInvalid(InfraError):
    """The keys of checkpoint images are missing, malformed, or can be read by others."""


class InstallError(InfraError):
    """A tool could not be installed: download, digest or build."""


class StackError(InfraError):
    """A part of the embedded stack did not start, stop or answer."""


class ClusterError(InfraError):
    """The test cluster, or a part of it, did not start, stop or answer."""


class ImageError(InfraError):
    """A container image can't be made or imported from what was given."""


class ApiError(InfraError):
    """The Kubernetes API server did not do what it was asked.

    Attributes:
        reason: the server's word for it (``AlreadyExists``, ``Invalid`` …), or ours.
        fields: the fields of the object that it complains of, if it does.
    """

    def __init__(self, message: str, *, reason: str = "", fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.fields = fields


class ApiUnavailable(ApiError):
    """No answer, or one that says: later. What was asked may have been done."""


class ApiBusy(ApiUnavailable):
    """429: too many requests.

    Attributes:
        retry_after_s: how long the server wants to be left alone.
    """

    def __init__(self, message: str, *, reason: str = "", fields: tuple[str, ...] = (), retry_after_s: float = 1.0) -> None:
        super().__init__(message, reason=reason, fields=fields)
        self.retry_after_s = retry_after_s


class ApiConflict(ApiError):
    """409: the object is there already, or is not as it was assumed to be."""


class ApiExpired(ApiError):
    """410: the version to watch from is too old; list again."""


class ApiMissing(ApiError):
    """404: there is no such object, or no such kind of object."""


class ApiForbidden(ApiError):
    """401, 403: not allowed to us, or by a quota or policy."""


class ApiInvalid(ApiError):
    """400, 415, 422: the object is wrong; asking again gives the same."""


class PodTemplateInvalid(InfraError):
    """A Function's pod template can't be made a placeholder pod; names the field."""


class KafkaUnavailable(InfraError):
    """The broker cannot be reached."""


class TlsError(InfraError):
    """Certificates or keys cannot be read, or are not what they must be."""


class StoreError(InfraError):
    """A request to the object store failed. Carries bucket and key."""

    def __init__(self, message: str, *, bucket: str = "", key: str = "") -> None:
        super().__init__(f"{message} (s3://{bucket}/{key})" if bucket else message)
        self.bucket = bucket
        self.key = key


class StoreUnavailable(StoreError):
    """The store does not answer, or answers with an error that may pass."""


class StoreRefused(StoreError):
    """The store does not take us for who we are: credentials that are wrong or have expired, a clock that is too far off."""


class ObjectMissing(StoreError):
    """There is no such object."""


class ObjectConflict(StoreError):
    """A conditional put lost against another writer."""
