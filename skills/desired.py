"""Desired state: what one device should run, signed and counted. Pure but for the signature itself.

The assignment is sealed with the controller's *director* key (Ed25519 over a domain prefix and the exact payload bytes,
as DSSE does: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md). It says which releases a device
should run; which releases exist is said by the TUF repository. A device installs only what both list.
"""

import base64
import binascii
import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from skills.errors import FormatError, TrustError
from skills.manifest import Name, Version
from skills.report import Sha256
from skills.wire import Limits, decode_json, encode_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_ASSIGNMENT_BYTES = 32 << 10
PREFIX = b"skerry desired/v1\n"


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectRef:
    """An object by its content: SHA-256 and size in bytes."""

    sha256: Sha256
    size: Annotated[int, Limits(min=0, max=1 << 40)]


@dataclasses.dataclass(frozen=True, slots=True)
class WantedSkill:
    """One release that a device should run; `target` is its path in the TUF repository."""

    skill: Name
    version: Version
    target: Annotated[str, Limits(max_items=200)]
    manifest: ObjectRef


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """All that one device should run. `counter` grows with every change; `nonce` answers the device's hello."""

    device: str
    counter: Annotated[int, Limits(min=0)]
    time: Annotated[int, Limits(min=0)]
    metadata: ObjectRef
    skills: Annotated[tuple[WantedSkill, ...], Limits(max_items=64)] = ()
    nonce: str = ""
    format: Literal["desired/v1"] = "desired/v1"


@dataclasses.dataclass(frozen=True, slots=True)
class _Envelope:
    payload: str
    signature: str


def seal(assignment: Assignment, director: "Ed25519PrivateKey") -> bytes:
    """Sign an assignment; the result is what travels."""
    return seal_payload(PREFIX, encode_json(assignment), director)


def open_sealed(data: bytes, director_pem: bytes, device: str, last: Assignment | None) -> Assignment:
    """Check who sealed an assignment, for whom, and that it is not older than `last`, the last one accepted.

    Raises:
        FormatError: not a sealed assignment at all.
        TrustError: another key, another device, an older counter, or the same counter with other content.
    """
    payload = open_payload(PREFIX, data, director_pem, "the assignment", MAX_ASSIGNMENT_BYTES)
    assignment = decode_json(Assignment, payload, "the assignment", MAX_ASSIGNMENT_BYTES)
    if assignment.device != device:
        raise TrustError(f"the assignment is for the device '{assignment.device}', this is '{device}'")
    if last is not None and assignment.counter < last.counter:
        raise TrustError(f"the assignment has the counter {assignment.counter}, {last.counter} was already accepted")
    if last is not None and assignment.counter == last.counter and assignment.skills != last.skills:
        raise TrustError(f"the assignment changes its skills without a new counter (still {last.counter})")
    return assignment


def seal_payload(prefix: bytes, payload: bytes, director: "Ed25519PrivateKey") -> bytes:
    """Sign the exact bytes of a payload in the domain `prefix`."""
    signature = director.sign(prefix + payload)
    return encode_json(_Envelope(base64.b64encode(payload).decode(), base64.b64encode(signature).decode()))


def open_payload(prefix: bytes, data: bytes, director_pem: bytes, what: str, max_bytes: int) -> bytes:
    """Return the payload of an envelope that `seal_payload` made with the director's key in the same domain.

    Raises:
        FormatError: no such envelope, or one of more than `max_bytes`; `what` says what it was to be.
        TrustError: sealed with another key or in another domain.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    envelope = decode_json(_Envelope, data, what, max_bytes)
    try:
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.signature, validate=True)
    except binascii.Error as error:
        raise FormatError(f"{what} is not base64: {error}") from None
    key = load_pem_public_key(director_pem)
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError("the pinned director key is not an Ed25519 key: enrol the device again")
    try:
        key.verify(signature, prefix + payload)
    except InvalidSignature:
        raise TrustError(f"{what} is not signed by this device's controller") from None
    return payload
