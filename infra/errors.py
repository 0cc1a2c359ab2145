"""Exceptions of the infra package.

InfraError
├── SettingsError
├── InstallError
├── StackError
├── ClusterError
├── ImageError
├── PodTemplateInvalid
├── KafkaUnavailable
└── StoreError
    ├── StoreUnavailable
    ├── ObjectMissing
    └── ObjectConflict
"""

from __future__ import annotations


class InfraError(Exception):
    """Anything that connects to the world failed. The message says what to do."""


class SettingsError(InfraError):
    """A setting is unknown or has a wrong value."""


class InstallError(InfraError):
    """A tool could not be installed: download, digest or build."""


class StackError(InfraError):
    """A part of the embedded stack did not start, stop or answer."""


class ClusterError(InfraError):
    """The test cluster, or a part of it, did not start, stop or answer."""


class ImageError(InfraError):
    """A container image can't be made or imported from what was given."""


class PodTemplateInvalid(InfraError):
    """A Function's pod template can't be made a placeholder pod; names the field."""


class KafkaUnavailable(InfraError):
    """The broker cannot be reached."""


class StoreError(InfraError):
    """A request to the object store failed. Carries bucket and key."""

    def __init__(self, message: str, *, bucket: str = "", key: str = "") -> None:
        super().__init__(f"{message} (s3://{bucket}/{key})" if bucket else message)
        self.bucket = bucket
        self.key = key


class StoreUnavailable(StoreError):
    """The store does not answer, or answers with an error that may pass."""


class ObjectMissing(StoreError):
    """There is no such object."""


class ObjectConflict(StoreError):
    """A conditional put lost against another writer."""
