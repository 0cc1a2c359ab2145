"""The cluster's own certificate authority, certificates and kubeconfigs.

In: :class:`~infra.kubernetes.cluster.layout.Layout`. Out: files in ``layout.keys`` that only this user can read. Which names and
groups: https://kubernetes.io/docs/setup/best-practices/certificates/. Next: :mod:`.configuration` names the files in command lines.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.files import write_private
from infra.kubernetes.cluster.layout import Layout, Node

_DAYS = 365
#: Who gets a kubeconfig: file name -> user and group.
_USERS: Mapping[str, tuple[str, str]] = {
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kube-proxy": ("system:kube-proxy", ""),
}


def write(layout: Layout, nodes: Sequence[Node]) -> None:
    """Make what is missing; certificates that are there stay."""
    folder = layout.keys
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = Authority(folder)
    for name, (user, group) in _USERS.items():
        _client(layout, authority, name, user, group)
    for node in nodes:
        _client(layout, authority, node.name, f"system:node:{node.name}", "system:nodes")
        authority.issue(f"{node.name}-serving", f"system:node:{node.name}", "system:nodes", addresses=[node.address])
    # What the API server is to kubelets.
    authority.issue("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters")
    authority.issue(
        "apiserver",
        "kube-apiserver",
        addresses=[layout.node(1).address, layout.api_service, ipaddress.IPv4Address("127.0.0.1")],
        names=["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"],
    )
    # Signs the tokens of service accounts.
    if not (folder / "tokens.key").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(
            folder / "tokens.pub",
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        )
        write_private(folder / "tokens.key", _key_bytes(key))


class Authority:
    """A certificate authority that lives in a folder, made when it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key_file, self._certificate_file = folder / "ca.key", folder / "ca.crt"
        if self._key_file.exists():
            key = serialization.load_pem_private_key(self._key_file.read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self._key = key
            self._certificate = x509.load_pem_x509_certificate(self._certificate_file.read_bytes())
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name("thaw-cluster", "")
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        usage = _usage(key_cert_sign=True)
        builder = _builder(name, name, self._key.public_key()).add_extension(constraints, critical=True).add_extension(usage, critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self._certificate = builder.add_extension(identifier, critical=False).sign(self._key, hashes.SHA256())
        write_private(self._certificate_file, self._certificate.public_bytes(serialization.Encoding.PEM))
        write_private(self._key_file, _key_bytes(self._key))

    @property
    def certificate(self) -> bytes:
        """The certificate that others trust, PEM."""
        return self._certificate_file.read_bytes()

    def issue(
        self, file: str, name: str, group: str = "", *, addresses: Sequence[ipaddress.IPv4Address] = (), names: Sequence[str] = ()
    ) -> None:
        """Write ``<file>.crt`` and ``<file>.key`` unless they are there: for a server when it has addresses, else for a client."""
        key_file = self._folder / f"{file}.key"
        if key_file.exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if addresses else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _builder(_name(name, group), self._certificate.subject, key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(key_cert_sign=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(signer, critical=False)
        if addresses:
            alternatives: list[x509.GeneralName] = [x509.IPAddress(address) for address in addresses]
            alternatives += [x509.DNSName(text) for text in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        write_private(self._folder / f"{file}.crt", certificate.public_bytes(serialization.Encoding.PEM))
        # Last, because it says that both are there.
        write_private(key_file, _key_bytes(key))


def kubeconfig(layout: Layout, user: str, *, authority: bytes, certificate: bytes, key: bytes) -> str:
    """Render a kubeconfig that holds all it needs, so that it can be copied elsewhere."""

    def encoded(content: bytes) -> str:
        return base64.b64encode(content).decode()

    cluster = {"server": layout.api, "certificate-authority-data": encoded(authority)}
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "thaw", "cluster": cluster}],
        "users": [{"name": user, "user": {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}}],
        "contexts": [{"name": "thaw", "context": {"cluster": "thaw", "user": user}}],
        "current-context": "thaw",
    }
    return yaml.safe_dump(value, sort_keys=False)


def _client(layout: Layout, authority: Authority, file: str, user: str, group: str) -> None:
    authority.issue(file, user, group)
    certificate, key = (layout.keys / f"{file}.crt").read_bytes(), (layout.keys / f"{file}.key").read_bytes()
    text = kubeconfig(layout, user, authority=authority.certificate, certificate=certificate, key=key)
    write_private(layout.keys / f"{file}.kubeconfig", text.encode())


def _name(name: str, group: str) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    # From an hour ago: clocks may be set back a little.
    return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=_DAYS))


def _usage(*, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())
