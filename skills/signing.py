"""Keys, and the writing and checking side of the TUF repository that says which releases exist.

Roles (TUF specification 1.0, https://theupdateframework.github.io/specification/latest/): *root* lists all keys and is
signed offline; *targets* lists releases and is signed by the publisher; *snapshot* and *timestamp* say what is current
and are signed online by the controller. All keys are Ed25519. Functions take and return the exact bytes of metadata
files; files and network belong to the callers.
"""

import dataclasses
import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from skills.desired import ObjectRef
from skills.errors import FormatError, MissingExtra, TrustError
from skills.files import read_bytes, write_atomic
from skills.wire import Limits, decode_json, encode_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_METADATA_SET_BYTES = 1 << 20
ROOT_LIFETIME = dt.timedelta(days=3650)
TARGETS_LIFETIME = dt.timedelta(days=365)
ONLINE_LIFETIME = dt.timedelta(days=7)


@dataclasses.dataclass(frozen=True, slots=True)
class MetadataSet:
    """All metadata that a device needs to judge a release, texts verbatim; `root` by version number."""

    root: Annotated[Mapping[str, str], Limits(min=1, max_items=256)]
    timestamp: str
    snapshot: str
    targets: str
    format: Literal["metadata/v1"] = "metadata/v1"


def release_target(skill: str, version: str) -> str:
    """Return the path of a release in the repository."""
    return f"skills/{skill}/{version}.json"


# --- keys -----------------------------------------------------------------------------------------


def new_key() -> "Ed25519PrivateKey":
    """Return a new Ed25519 key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def save_key(key: "Ed25519PrivateKey", path: Path) -> None:
    """Write a private key (PKCS #8 PEM), readable by its owner only.

    Raises:
        StorageError: it cannot be written.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def load_key(path: Path) -> "Ed25519PrivateKey":
    """Read a private key that `save_key` wrote.

    Raises:
        NotFound, StorageError: it is not there, or cannot be read.
        FormatError: it is no Ed25519 key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_bytes(path, "the key", 64 << 10), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{path} is no usable key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise FormatError(f"{path} holds a {type(key).__name__}, expected an Ed25519 key")
    return key


def public_pem(key: "Ed25519PrivateKey") -> bytes:
    """Return the public half as PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


# --- writing --------------------------------------------------------------------------------------


def new_root(
    root: "Ed25519PrivateKey", publisher: "Ed25519PrivateKey", online: "Ed25519PrivateKey", now: dt.datetime
) -> bytes:
    """Return version 1 of the root: who may sign what, each role with a threshold of one."""
    api = _tuf()
    signed = api.Root(version=1, expires=_expires(now, ROOT_LIFETIME), consistent_snapshot=False)
    for key, roles in ((root, ("root",)), (publisher, ("targets",)), (online, ("snapshot", "timestamp"))):
        for role in roles:
            signed.add_key(_signer(key).public_key, role)
    return _sign(signed, root)


def new_targets(publisher: "Ed25519PrivateKey", now: dt.datetime) -> bytes:
    """Return version 1 of the list of releases: none."""
    return _sign(_tuf().Targets(version=1, expires=_expires(now, TARGETS_LIFETIME)), publisher)


def add_release(
    targets: bytes, target: str, manifest: ObjectRef, publisher: "Ed25519PrivateKey", now: dt.datetime
) -> bytes:
    """Return the next version of the list of releases, with one more in it.

    Raises:
        FormatError: `targets` is no targets metadata.
        TrustError: the release is listed already with other content: a release never changes.
    """
    api = _tuf()
    signed = _parse(targets, api.Targets).signed
    listed = signed.targets.get(target)
    if listed is not None and (listed.length, listed.hashes.get("sha256")) != (manifest.size, manifest.sha256):
        raise TrustError(f"{target} is released already with other content: raise the version in skill.yaml")
    signed.targets[target] = api.TargetFile(manifest.size, {"sha256": manifest.sha256}, target)
    signed.version += 1
    signed.expires = _expires(now, TARGETS_LIFETIME)
    return _sign(signed, publisher)


def sign_online(targets: bytes, version: int, online: "Ed25519PrivateKey", now: dt.datetime) -> tuple[bytes, bytes]:
    """Return (snapshot, timestamp) at `version`, which must grow each time, for these targets."""
    api = _tuf()
    snapshot = api.Snapshot(version=version, expires=_expires(now, ONLINE_LIFETIME))
    snapshot.meta["targets.json"] = api.MetaFile(version=_parse(targets, api.Targets).signed.version)
    snapshot_bytes = _sign(snapshot, online)
    meta = api.MetaFile.from_data(version, snapshot_bytes, ["sha256"])
    return snapshot_bytes, _sign(
        api.Timestamp(version=version, expires=_expires(now, ONLINE_LIFETIME), snapshot_meta=meta), online
    )


def pack_metadata(roots: Mapping[int, bytes], timestamp: bytes, snapshot: bytes, targets: bytes) -> bytes:
    """Return one object with all metadata, as it travels to devices.

    Raises:
        FormatError: together more than the limit.
    """
    texts = {str(version): data.decode() for version, data in sorted(roots.items())}
    packed = encode_json(MetadataSet(texts, timestamp.decode(), snapshot.decode(), targets.decode()))
    if len(packed) > MAX_METADATA_SET_BYTES:
        raise FormatError(f"the repository's metadata has {len(packed)} bytes, the limit is {MAX_METADATA_SET_BYTES}")
    return packed


def unpack_metadata(data: bytes) -> MetadataSet:
    """Read what `pack_metadata` wrote; nothing in it is trusted before a TUF client has verified it.

    Raises:
        FormatError: it is not that.
    """
    return decode_json(MetadataSet, data, "the metadata set", MAX_METADATA_SET_BYTES)


# --- checking (controller; devices run python-tuf's client: edge_agent/trust.py) ------------------


def check_targets(root: bytes, targets: bytes, previous: bytes | None) -> dict[str, ObjectRef]:
    """Return all releases of a list that a key in `root` signed and that only adds to `previous`.

    Raises:
        FormatError: not targets metadata.
        TrustError: signed by a key that the root does not list, not newer than `previous`, or a release changed or gone.
    """
    from tuf.api.exceptions import UnsignedMetadataError

    api = _tuf()
    trusted, found = _parse(root, api.Root).signed, _parse(targets, api.Targets)
    try:
        trusted.verify_delegate("targets", found.signed_bytes, found.signatures)
    except UnsignedMetadataError:
        raise TrustError("targets.json is signed by no key that the repository's root lists for releases") from None
    releases = _releases(found.signed)
    if previous is not None:
        before = _parse(previous, api.Targets).signed
        if found.signed.version <= before.version:
            raise TrustError(
                f"targets.json has version {found.signed.version}, the repository has {before.version}: "
                "fetch it again and sign anew"
            )
        for target, ref in _releases(before).items():
            if releases.get(target) != ref:
                raise TrustError(f"targets.json changes or drops {target}: a release never changes")
    return releases


def list_releases(targets: bytes) -> dict[str, ObjectRef]:
    """Return all releases of a list without checking who signed it."""
    return _releases(_parse(targets, _tuf().Targets).signed)


def metadata_version(data: bytes) -> int:
    """Return the version number of any metadata file."""
    return int(_parse(data, None).signed.version)


def metadata_expires(data: bytes) -> dt.datetime:
    """Return when a metadata file expires (UTC)."""
    expires: dt.datetime = _parse(data, None).signed.expires
    return expires


def _releases(signed: Any) -> dict[str, ObjectRef]:
    return {
        path: ObjectRef(str(file.hashes.get("sha256", "")), int(file.length)) for path, file in signed.targets.items()
    }


def _parse(data: bytes, kind: Any) -> Any:
    from tuf.api.metadata import Metadata
    from tuf.api.serialization import DeserializationError

    try:
        metadata = Metadata.from_bytes(data)
    except DeserializationError as error:
        raise FormatError(f"not TUF metadata: {error}") from None
    if kind is not None and not isinstance(metadata.signed, kind):
        raise FormatError(f"expected {kind.type} metadata, found {metadata.signed.type}")
    return metadata


def _sign(signed: Any, key: "Ed25519PrivateKey") -> bytes:
    from tuf.api.metadata import Metadata

    metadata = Metadata(signed)
    metadata.sign(_signer(key))
    return metadata.to_bytes()


def _signer(key: "Ed25519PrivateKey") -> Any:
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

    return CryptoSigner(key)


def _expires(now: dt.datetime, lifetime: dt.timedelta) -> dt.datetime:
    return (now + lifetime).astimezone(dt.UTC).replace(microsecond=0)


def _tuf() -> Any:
    try:
        from tuf.api import metadata
    except ImportError:
        raise MissingExtra("python-tuf is not installed: pip install 'skerry[edge]' or 'skerry[cloud]'") from None
    return metadata
