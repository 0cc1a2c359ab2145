"""Mutual TLS between scalers, watchers and agents: who is who, and contexts that follow their files.

In: TLS settings, or the authority of this installation (:mod:`infra.local.authority`). Out: :class:`Credentials`, whose contexts verify the
other side, and :class:`Identity`, what a verified certificate says: a SAN URI ``thaw://ROLE/NAME``. TLS 1.3 only. Next:
:mod:`agent.api.connection`, for both sides.

Host names are not looked at: agents have addresses that change. What counts is the identity, and whoever connects compares it.
"""

from __future__ import annotations

import datetime
import logging
import ssl
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509

from infra.errors import SettingsError, TlsError
from infra.local import authority
from infra.settings import Settings

logger = logging.getLogger(__name__)
SCHEME = "thaw"
ROLES = ("agent", "scaler", "watcher")
#: As the name of an agent: of any node.
ANY = "*"
#: A certificate that ends so soon is warned of.
_SOON = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Identity:
    """What a certificate says of its owner: ``thaw://scaler/blue``."""

    role: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.role}/{self.name}"

    def covers(self, role: str, name: str = "") -> bool:
        """Whether its owner may have this role, and this name if one is given."""
        return self.role == role and (not name or self.name in (name, ANY))


def identities(uris: Iterable[str]) -> tuple[Identity, ...]:
    """Those of some SAN URIs that are Thaw's."""
    parts = [urlsplit(uri) for uri in uris]
    return tuple(Identity(part.netloc, part.path[1:]) for part in parts if part.scheme == SCHEME and part.netloc and part.path[1:])


def identities_of(certificate: Mapping[str, Any] | None) -> tuple[Identity, ...]:
    """Those of a verified peer, as :meth:`ssl.SSLSocket.getpeercert` gives its certificate."""
    return identities(value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI")


class Credentials:
    """A certificate, its key, and the authorities that this side trusts: three files, read again when one of them has changed.

    Streams that are open go on; new ones use the new files. Files that do not fit together, as in the middle of a replacement, are left for
    the next time. Thread-safe; reads files, so not on an event loop.
    """

    def __init__(self, ca: Path, certificate: Path, key: Path, role: str, name: str = "") -> None:
        """Read the files.

        Args:
            ca: PEM file of the authorities; several during their replacement.
            certificate: PEM file of this side's certificate, intermediate ones after it.
            key: PEM file of its key.
            role: that the certificate must give this side.
            name: that it must give it; empty: any.

        Raises:
            TlsError: they cannot be used; says why.
        """
        self._ca, self._certificate, self._key = ca, certificate, key
        self._role, self._name = role, name
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._contexts = self._read()
        self._trouble = ""

    def server(self) -> ssl.SSLContext:
        """For a side that accepts streams."""
        return self._current()[0]

    def client(self) -> ssl.SSLContext:
        """For a side that opens them."""
        return self._current()[1]

    def _current(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        with self._lock:
            try:
                stamp = self._look()
                if stamp != self._stamp:
                    self._contexts, self._stamp, self._trouble = self._read(), stamp, ""
                    logger.info("certificates were replaced: %s is read again", self._certificate)
            except TlsError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    logger.warning("certificates cannot be read again, those read before are used: %s", error)
            return self._contexts

    def _look(self) -> list[tuple[int, int, int]]:
        found = []
        for setting, path in (("tls.ca", self._ca), ("tls.certificate", self._certificate), ("tls.key", self._key)):
            try:
                at = path.stat()
            except OSError as error:
                raise TlsError(
                    f"{setting}: {path} cannot be read: {error.strerror}. Put the file there, or name another one by the setting {setting}"
                ) from error
            found.append((at.st_mtime_ns, at.st_ino, at.st_size))
        return found

    def _read(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        self._check_own()
        return self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _check_own(self) -> None:
        """What would only be noticed by the other side."""
        try:
            certificate = x509.load_pem_x509_certificates(self._certificate.read_bytes())[0]
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        except x509.ExtensionNotFound:
            uris = []
        except (OSError, ValueError) as error:
            raise TlsError(f"tls.certificate: {self._certificate} is no certificate: {error}") from error
        if not any(identity.covers(self._role, self._name) for identity in identities(uris)):
            wanted = Identity(self._role, self._name or "NAME")
            raise TlsError(
                f"tls.certificate: {self._certificate} is not for {wanted}, its SAN URIs are: {', '.join(uris) or 'none'}. "
                f"Have one issued with the SAN URI {wanted}"
            )
        left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        if left < _SOON:
            text = "has ended" if left < datetime.timedelta() else "ends"
            logger.warning("the certificate %s %s at %s: renew it", self._certificate, text, certificate.not_valid_after_utc)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # see the module's first lines
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            # A resumed session would go on with certificates that have been replaced.
            context.num_tickets = 0
        try:
            context.load_verify_locations(self._ca)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"tls.ca: {self._ca} holds no certificate of an authority: {error}") from error
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (OSError, ssl.SSLError, TlsError) as error:
            raise TlsError(f"tls.certificate {self._certificate} and tls.key {self._key} do not belong together: {error}") from error
        return context


def credentials(settings: Settings, role: str, name: str = "") -> Credentials | None:
    """What this process shows to others and verifies them by; None: TLS is off.

    Args:
        settings: files of the installation's authority; without them this machine's own is used, and made if need be.
        role: ``scaler``, ``agent`` or ``watcher``.
        name: of the node, for an agent.

    Raises:
        TlsError: files are missing or wrong.
        SettingsError: the settings contradict each other.
    """
    given = settings.tls
    if given.mode == "off":
        return None
    if given.mode != "on":
        raise SettingsError(f"setting tls.mode: {given.mode!r} is neither on nor off")
    paths = [given.ca, given.certificate, given.key]
    if not any(paths):
        return Credentials(*authority.ensure(settings.paths.state_dir / "tls", str(Identity(role, name or "local"))), role, name)
    if not all(paths):
        raise SettingsError("tls.ca, tls.certificate and tls.key belong together: set all three, or none for certificates of this machine")
    ca, certificate, key = (Path(path).expanduser() for path in paths)
    return Credentials(ca, certificate, key, role, name)


#: OpenSSL's names of what the other side says when it refuses.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it wants a certificate of this side: set tls.certificate and tls.key",
    "UNKNOWN_CA": "it does not know the authority of this side's certificate: both sides need a common tls.ca",
    "CERTIFICATE_EXPIRED": "this side's certificate has expired: renew tls.certificate",
    "BAD_CERTIFICATE": "it does not accept this side's certificate (tls.certificate)",
    "UNSUPPORTED_CERTIFICATE": "it does not accept this side's certificate for this role (extended key usage of tls.certificate)",
    "CERTIFICATE_UNKNOWN": "it does not accept this side's certificate (tls.certificate)",
    "DECRYPT_ERROR": "it cannot verify this side's certificate: both sides need a common tls.ca",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3",
}
#: OpenSSL's codes (x509_vfy.h) of what is wrong with the other side's certificate.
_VERIFICATION = {
    9: "its certificate is not valid yet: are both clocks right?",
    10: "its certificate has expired: renew it",
    18: "its certificate is of no authority in this side's tls.ca: both sides need a common one",
    19: "its certificate is of no authority in this side's tls.ca: both sides need a common one",
    20: "its certificate is of no authority in this side's tls.ca: both sides need a common one",
    26: "its certificate is not for this role (extended key usage): agents need serverAuth, scalers and watchers clientAuth",
}


def explain(error: BaseException) -> str:
    """Why a handshake failed, and what to do, in words about the other side."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFICATION.get(error.verify_code, f"its certificate cannot be verified: {error.verify_message}")
    reason = str(getattr(error, "reason", "") or "")
    if "ALERT" in reason:
        return next((text for name, text in _ALERTS.items() if reason.endswith(name)), f"it refuses: {reason}")
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it shows no certificate: set tls.certificate and tls.key there"
    if reason in ("UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE", "VERSION_TOO_LOW"):
        return "it does not speak TLS 1.3"
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE"):
        return "it does not speak TLS: tls.mode must be the same on both sides"
    return f"the handshake failed: {reason or error or type(error).__name__}"


def _no_password() -> str:
    # OpenSSL would ask at the terminal.
    raise TlsError("the key has a password; store it without one, readable by this user only")
