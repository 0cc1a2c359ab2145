"""The certificate authority of one installation on one machine: what makes TLS work there without a setting.

In: a folder of the state folder, and who asks (``thaw://agent/node-1``). Out: PEM files that only this user can read: ``ca.crt``,
``ca.key``, and a certificate with its key for each identity. Next: :mod:`infra.tls` makes contexts of them.

The certificates live as long as the authority: whoever can read one of the keys can read the authority's too, so that shorter lives would
protect nothing. Rules: RFC 5280 for the extensions, CA/Browser Forum for the length of serial numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.errors import InstallError, TlsError
from infra.files import write_private
from infra.local import install

LIFE = datetime.timedelta(days=3650)
#: An authority that ends within this time is replaced when something is asked of it.
_LEFT = datetime.timedelta(days=365)
#: Clocks of the two sides may differ.
_EARLIER = datetime.timedelta(hours=1)


class Authority:
    """One authority.

    Args:
        certificate: its own.
        key: that belongs to it.
    """

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self.key = key

    @classmethod
    def make(cls, name: str = "Thaw on this machine", life: datetime.timedelta = LIFE) -> Authority:
        """A new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            _builder(subject, subject, key, life)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(own, critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> bytes:
        """What others trust it by."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, *identities: str, life: datetime.timedelta = LIFE) -> tuple[bytes, bytes]:
        """A certificate and its key, as PEM.

        Args:
            identities: SAN URIs, such as ``thaw://agent/node-1``. Only agents may be servers with it, only the others clients.
            life: from now; negative: it has ended.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        uses = sorted({_use(identity) for identity in identities}, key=lambda use: use.dotted_string)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identities[0].removeprefix("thaw://")[:64])])
        certificate = (
            _builder(subject, self.certificate.subject, key, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity) for identity in identities]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def ensure(folder: Path, identity: str) -> tuple[Path, Path, Path]:
    """Files of the authority's certificate, of one for ``identity`` and of its key; made when they are not there.

    Raises:
        TlsError: the folder cannot be written, or holds something else.
    """
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", identity.removeprefix("thaw://"))
    paths = folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key"
    with _opened(folder) as authority:
        if not _belongs(paths[1], authority) or not paths[2].exists():
            certificate, key = authority.issue(identity)
            write_private(paths[2], key)
            write_private(paths[1], certificate)
    return paths


def export(folder: Path, out: Path, *identities: str) -> None:
    """Make a certificate for another machine: ``ca.crt``, ``tls.crt`` and ``tls.key`` in ``out``, as cert-manager names them.

    Raises:
        TlsError: a folder cannot be written, or holds something else.
    """
    with _opened(folder) as authority:
        certificate, key = authority.issue(*identities)
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in (("ca.crt", authority.pem), ("tls.key", key), ("tls.crt", certificate)):
            write_private(out / name, content)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Authority]:
    """The authority of a folder, made if it is not there, for one process at a time."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with install.exclusive(folder / ".lock", _quietly, timeout_s=30):
            authority = _read(folder)
            if authority is None:
                authority = Authority.make()
                write_private(folder / "ca.key", _pem(authority.key))
                write_private(folder / "ca.crt", authority.pem)
            yield authority
    except (OSError, ValueError, TypeError, InstallError) as error:
        raise TlsError(
            f"cannot make certificates in {folder}: {error}. Remove that folder, or set tls.ca, tls.certificate and tls.key"
        ) from error


def _quietly(_: str) -> None:
    """Another process makes the same files: a matter of milliseconds."""


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, life: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + life) - _EARLIER)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _use(identity: str) -> x509.ObjectIdentifier:
    return ExtendedKeyUsageOID.SERVER_AUTH if identity.startswith("thaw://agent/") else ExtendedKeyUsageOID.CLIENT_AUTH


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _read(folder: Path) -> Authority | None:
    """The authority in a folder; None when there is none or its time is nearly over."""
    if not (folder / "ca.crt").exists():
        return None
    certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("ca.crt and ca.key do not belong together")
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return Authority(certificate, key) if left > _LEFT else None


def _belongs(path: Path, authority: Authority) -> bool:
    if not path.exists():
        return False
    try:
        x509.load_pem_x509_certificate(path.read_bytes()).verify_directly_issued_by(authority.certificate)
    except Exception:  # whatever is wrong with it, it is made anew
        return False
    return True
