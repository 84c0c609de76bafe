"""The controller's own certificate authority and its one-time invitations.

Every connection of the fleet (MQTT, API, tail) is TLS under one P-256 CA that is made at the first start. A device makes
its key itself and has it certified once, with an invitation; the certificate's common name is the device's id. Certificates
are valid from 1970 to 9999: a board without a clock must be able to connect, and a board that was away for years too.
Who may connect is decided by the list of revoked certificates, not by the calendar (docs/decisions).
"""

import base64
import binascii
import dataclasses
import hashlib
import ipaddress
import json
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skills.errors import FormatError, StorageError, UsageError
from skills.files import storage_errors, write_atomic

ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
CONTROLLER = "controller"
DEVICE_ID = r"[a-z0-9][a-z0-9-]{0,62}"
MAX_CSR_BYTES = 8 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """A key and its certificate, as files."""

    cert: Path
    key: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Issued:
    """A device's certificate; `key_sha256` is the fingerprint of its public key, `serial` what a revocation names."""

    cert_pem: str
    serial: str
    key_sha256: str


class Authority:
    """The CA in one directory: ca.key, ca.pem, crl.pem, and the server's and controller's own certificates."""

    def __init__(self, directory: Path, hosts: Iterable[str]) -> None:
        """Open the authority, or make it at the first start; `hosts` are the names and addresses the server goes by.

        Raises:
            StorageError: the directory cannot be written or read.
        """
        self.directory = directory
        with storage_errors(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._key = _load_or_make_key(directory / "ca.key")
        self._cert = self._load_or_make_ca()
        self.ca_file = directory / "ca.pem"
        self.crl_file = directory / "crl.pem"
        self.server = self._own("server", sorted({"localhost", "127.0.0.1", "::1", *hosts}))
        self.controller = self._own(CONTROLLER, [])
        if not self.crl_file.exists():
            self.revoke(())

    @property
    def ca_pem(self) -> str:
        """The CA's certificate, which everybody may know."""
        return self._cert.public_bytes(Encoding.PEM).decode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA certificate's DER bytes: what an invitation carries."""
        return hashlib.sha256(self._cert.public_bytes(Encoding.DER)).hexdigest()

    def certify(self, csr_pem: str, device: str) -> Issued:
        """Certify a device's key under the id `device`, whatever name the request itself carries.

        Raises:
            FormatError: not a certificate request, not signed by its own key, or a key that is not ECDSA P-256.
        """
        request = read_request(csr_pem)
        cert = self._sign(device, request.public_key(), ExtendedKeyUsageOID.CLIENT_AUTH, ())
        return Issued(cert.public_bytes(Encoding.PEM).decode(), f"{cert.serial_number:x}", key_fingerprint(request))

    def impersonate(self, name: str, cert_file: Path, key_file: Path) -> None:
        """Write a key and certificate of the controller's own under a device's name, to take its connection over."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._sign(name, key.public_key(), ExtendedKeyUsageOID.CLIENT_AUTH, ())
        write_atomic(key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        write_atomic(cert_file, cert.public_bytes(Encoding.PEM), mode=0o600)

    def revoke(self, serials: Iterable[str]) -> None:
        """Write the list of revoked certificates; `serials` are all of them, not only the new ones."""
        serials = set(serials)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._cert.subject)
            # A broker that reads the list again keeps the old one too, and OpenSSL goes by the later of the two. The number
            # of entries only grows, so it serves as a clock that no restored backup turns back.
            .last_update(ALWAYS + timedelta(seconds=len(serials)))
            .next_update(NEVER)
        )
        for serial in sorted(serials):
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(ALWAYS).build()
            builder = builder.add_revoked_certificate(entry)
        write_atomic(self.crl_file, builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def _load_or_make_ca(self) -> x509.Certificate:
        path = self.directory / "ca.pem"
        # A crash between key and certificate leaves a key alone: the certificate is then made again from it.
        if path.exists():
            cert = _load_cert(path)
            if cert.public_key() == self._key.public_key():
                return cert
            raise StorageError(
                f"{path} does not belong to {self.directory / 'ca.key'}: restore both from the same backup"
            )
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Skerry {secrets.token_hex(4)}")])
        public = self._key.public_key()
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        cert = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(ALWAYS)
            .not_valid_after(NEVER)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_atomic(path, cert.public_bytes(Encoding.PEM))
        return cert

    def _own(self, name: str, hosts: list[str]) -> Identity:
        """Return one of the controller's own certificates, made again where it is missing or lacks a host."""
        key_file, cert_file = self.directory / f"{name}.key", self.directory / f"{name}.pem"
        key = _load_or_make_key(key_file)
        if cert_file.exists():
            cert = _load_cert(cert_file)
            if (
                cert.public_key() == key.public_key()
                and cert.issuer == self._cert.subject
                and set(hosts) <= set(_hosts_of(cert))
            ):
                return Identity(cert_file, key_file)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        cert = self._sign(name, key.public_key(), purpose, hosts)
        write_atomic(cert_file, cert.public_bytes(Encoding.PEM))
        return Identity(cert_file, key_file)

    def _sign(
        self, name: str, public: ec.EllipticCurvePublicKey, purpose: x509.ObjectIdentifier, hosts: Iterable[str]
    ) -> x509.Certificate:
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._cert.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(ALWAYS)
            .not_valid_after(NEVER)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        names = [_general_name(host) for host in hosts]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def read_request(csr_pem: str) -> "CheckedRequest":
    """Check a certificate request.

    Raises:
        FormatError: not one, not signed by its own key, or a key that is not ECDSA P-256.
    """
    if len(csr_pem) > MAX_CSR_BYTES:
        raise FormatError(f"the certificate request has {len(csr_pem)} bytes, the limit is {MAX_CSR_BYTES}")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        public = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FormatError(f"not a certificate request in PEM form: {error}") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise FormatError("the certificate request is for another kind of key, expected ECDSA P-256")
    if not signed:
        raise FormatError("the certificate request is not signed by its own key")
    return CheckedRequest(public)


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A certificate request whose sender holds the key."""

    key: ec.EllipticCurvePublicKey

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Return the key to certify."""
        return self.key


def key_fingerprint(request: CheckedRequest) -> str:
    """Return the SHA-256 of a public key (SubjectPublicKeyInfo, DER)."""
    return hashlib.sha256(request.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def device_id(name: str | None, key_sha256: str) -> str:
    """Return the id of a device: its name, or one made from its key.

    Raises:
        UsageError: the name cannot be an id.
    """
    if name is None or name == "":
        return f"d-{key_sha256[:12]}"
    if not re.fullmatch(DEVICE_ID, name) or name in (CONTROLLER, "all", "server"):
        raise UsageError(f"the device name {name!r} is not allowed: use up to 63 lower-case letters, digits and '-'")
    return name


@dataclasses.dataclass(frozen=True, slots=True)
class Invitation:
    """What `skerry-agent enroll` is given: where to go, the one-time secret, and by which CA to know the controller."""

    url: str
    secret: str
    fingerprint: str

    def token(self) -> str:
        """Return the one word to paste."""
        text = json.dumps({"u": self.url, "s": self.secret, "f": self.fingerprint}, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def new_secret() -> str:
    """Return 128 random bits in text form."""
    return secrets.token_urlsafe(16)


def secret_digest(secret: str) -> str:
    """Return what the database keeps of a secret: enough to recognise it, useless to a thief."""
    return hashlib.sha256(b"skerry secret\n" + secret.encode()).hexdigest()


def secret_of(token: str) -> str:
    """Return the one-time secret inside a token; a bare secret is returned as it is."""
    try:
        inner = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (ValueError, binascii.Error):
        return token
    secret = inner.get("s") if isinstance(inner, dict) else None
    return secret if isinstance(secret, str) else token


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_of(cert: x509.Certificate) -> list[str]:
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        with storage_errors(path):
            data = path.read_bytes()
        try:
            key = load_pem_private_key(data, None)
        except (ValueError, TypeError) as error:
            raise StorageError(f"{path} is not a private key ({error}): restore it from a backup") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StorageError(f"{path} is not an ECDSA key: restore it from a backup")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    return key


def _load_cert(path: Path) -> x509.Certificate:
    with storage_errors(path):
        data = path.read_bytes()
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise StorageError(f"{path} is not a certificate ({error}): restore it from a backup") from None
