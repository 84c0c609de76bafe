"""Joining a fleet: a key made here that never leaves, a certificate for it, and everything that is pinned afterwards.

The invitation (base64url JSON {"u": address, "s": secret, "f": SHA-256 of the CA's certificate}) is the root of trust: the
CA that the controller sends is accepted only with that fingerprint, and everything after it travels inside TLS of that CA.
"""

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from edge_agent.identity import MAX_FILE_BYTES, Controller, IdentityFiles
from skills.errors import FormatError, NotFound, Refused, StorageError, TrustError, Unreachable, UsageError, error_for
from skills.files import read_bytes, storage_errors, write_atomic
from skills.wire import Limits, decode_json, encode_json

DEADLINE_S = 20.0
MAX_ANSWER_BYTES = 1 << 20
PRIVATE = 0o600
RESERVE_BYTES = 128 << 10  # several times what a welcome takes on the disk


@dataclasses.dataclass(frozen=True, slots=True)
class Invitation:
    """What `skerry devices invite` put into the token."""

    u: str
    s: str
    f: Annotated[str, Limits(pattern="[0-9a-f]{64}", hint="64 hexadecimal digits")]


@dataclasses.dataclass(frozen=True, slots=True)
class Welcome:
    """What the controller answers to a device that joined."""

    device: str
    cert_pem: str
    ca_pem: str
    mqtt_url: str
    tail_url: str
    root_json: str
    director_pem: str


def read_token(token: str) -> Invitation:
    """Read an invitation.

    Raises:
        UsageError: it is not one, or only a piece of one.
    """
    try:
        text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        return decode_json(Invitation, text, "the invitation", 4096)
    except (FormatError, binascii.Error, ValueError):
        raise UsageError(
            "this is not a whole invitation: paste the line that `skerry devices invite` prints, all of it"
        ) from None


def enroll(data: Path, token: str, *, url: str | None = None, name: str | None = None) -> Controller:
    """Join with a one-time token; the identity is on the disk, whole, when this returns.

    Raises:
        UsageError: the token is not one.
        Refused: this device has an identity already, or the controller refuses.
        Unreachable: the controller does not answer.
        TrustError: what answers is not the controller that made the invitation, or the token is unknown or used.
        FormatError: the key on the disk is damaged.
        StorageError: the identity cannot be written; the same call may be repeated, also after the controller answered.
    """
    invitation = read_token(token)
    address = url or invitation.u
    files = IdentityFiles(data / "identity")
    if files.device.exists():
        raise Refused(f"this device has an identity already: remove {files.folder} to enrol it anew")
    with storage_errors(files.folder):
        files.folder.mkdir(parents=True, exist_ok=True)
        files.folder.chmod(0o700)
        for stray in files.folder.glob(".*.tmp"):
            stray.unlink()
    # 1. The key, and room for the rest, before a word is said: a full disk must not use up the invitation. A crash from
    # here on leaves the key, to which the controller gives a certificate again for the same invitation.
    key_pem = _own_key(files.key)
    reserve = files.folder / "reserve"
    try:
        # Random: some file systems keep what repeats in less room.
        write_atomic(reserve, os.urandom(RESERVE_BYTES), PRIVATE)
        welcome, ca_pem = _join(address, invitation, token, key_pem, name)
    finally:
        with contextlib.suppress(OSError):
            reserve.unlink(missing_ok=True)
    controller = Controller(welcome.device, address, welcome.mqtt_url, welcome.tail_url)
    try:
        _keep(files, welcome, ca_pem, controller)
    except StorageError as error:
        for path in (files.device, files.cert, files.ca, files.root, files.director):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise StorageError(
            f"{error}; the invitation stays good for this device: enrol it again with the same line"
        ) from None
    return controller


def _join(address: str, invitation: Invitation, token: str, key_pem: bytes, name: str | None) -> tuple[Welcome, str]:
    """Ask for a certificate; return the welcome and the CA that was checked."""
    ca_pem = fetch_ca(address, invitation.f)
    body = {"token": token, "csr_pem": request_pem(key_pem, name or socket.gethostname())}
    if name is not None:
        body["name"] = name
    welcome = decode_json(
        Welcome, _post(address, "/v1/enroll", body, ca_pem), "the controller's welcome", MAX_ANSWER_BYTES
    )
    if fingerprint(welcome.ca_pem) != invitation.f:
        raise TrustError("the controller sends another CA than the invitation names")
    return welcome, only_certificate(welcome.ca_pem)


def _keep(files: IdentityFiles, welcome: Welcome, ca_pem: str, controller: Controller) -> None:
    # 2. Everything that device.json speaks of.
    write_atomic(files.cert, welcome.cert_pem.encode())
    write_atomic(files.ca, ca_pem.encode())
    write_atomic(files.root, welcome.root_json.encode())
    write_atomic(files.director, welcome.director_pem.encode())
    # 3. Commit point: from here on the device is enrolled.
    write_atomic(files.device, encode_json(controller))


def fetch_ca(url: str, expected: str) -> str:
    """Get the controller's CA certificate, and trust it for its fingerprint alone.

    Raises:
        Unreachable: nobody answers at `url`.
        TrustError: the certificate is another one than the invitation names.
    """
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE  # nothing is believed but a certificate with the right fingerprint
    pem = _exchange(url, "GET", "/v1/ca", None, unverified).decode(errors="replace")
    if fingerprint(pem) != expected:
        raise TrustError(
            f"what answers at {url} is not the controller that made this invitation: its CA is another one"
        )
    return only_certificate(pem)


def fingerprint(pem: str) -> str:
    """Return the SHA-256 of a certificate's DER form; "" when it is no certificate."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")).hexdigest()
    except ValueError:
        return ""


def only_certificate(pem: str) -> str:
    """Return the certificate that `fingerprint` looked at, alone: what stands behind it in the text is trusted by nobody."""
    return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(pem.strip() + "\n"))


def request_pem(key_pem: bytes, name: str) -> str:
    """Return a signed request (CSR) for a certificate of the key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except ValueError:
        raise FormatError("the device's key is damaged: remove key.pem to make a new one") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise FormatError("the device's key is not an EC key")
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:63] or "device")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _own_key(path: Path) -> bytes:
    """Return the device's key, made at the first try and used again at the next, so a lost answer costs no token."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    with contextlib.suppress(NotFound):
        return read_bytes(path, "the device's key", MAX_FILE_BYTES)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomic(path, pem, PRIVATE)
    return pem


def _post(url: str, path: str, body: Mapping[str, str], ca_pem: str) -> bytes:
    return _exchange(url, "POST", path, json.dumps(body).encode(), ssl.create_default_context(cadata=ca_pem))


def _exchange(url: str, method: str, path: str, body: bytes | None, context: ssl.SSLContext) -> bytes:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UsageError(f"{url!r} is no controller address: expected https://HOST:PORT")
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=DEADLINE_S, context=context)
    try:
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES + 1)
    except ssl.SSLError as error:
        raise TrustError(f"the controller at {url} cannot prove who it is: {error.reason or error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"the controller at {url} does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if len(answer) > MAX_ANSWER_BYTES:
        raise FormatError(f"the controller at {url} answers with more than {MAX_ANSWER_BYTES} bytes")
    if response.status != 200:
        raise _refusal(answer, response.status)
    return answer


def _refusal(answer: bytes, status: int) -> Exception:
    try:
        told = json.loads(answer)
        return error_for(int(told["code"]), str(told["error"]))
    except (ValueError, KeyError, TypeError):
        return Unreachable(f"the controller answers with HTTP status {status}")


def writable(data: Path) -> None:
    """Check early that the data directory can be used.

    Raises:
        StorageError: it cannot.
    """
    with storage_errors(data):
        data.mkdir(parents=True, exist_ok=True)
        if not os.access(data, os.W_OK):
            raise StorageError(f"cannot write to {data}: choose another with --data")
