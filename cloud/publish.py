"""Publishing: the bundle's objects go to the controller, the release is signed here, with the publisher's key."""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cloud.views import ReleaseView
from skills import signing
from skills.bundle import open_bundle
from skills.desired import ObjectRef
from skills.errors import NotFound
from skills.files import sha256_hex

Progress = Callable[[str, float], None]


class Controller(Protocol):
    """What publishing needs of the API."""

    def metadata(self, role: str) -> bytes: ...
    def has_object(self, sha256: str) -> bool: ...
    def put_object(self, sha256: str, data: bytes) -> None: ...
    def release(self, manifest_sha256: str, targets: bytes) -> ReleaseView: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A release that the controller took in, and what had to be uploaded for it."""

    release: ReleaseView
    uploaded_bytes: int
    known_bytes: int


def publish(
    client: Controller,
    file: Path,
    key: Path,
    *,
    progress: Progress = lambda text, share: None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Published:
    """Upload what the controller lacks of a bundle, then sign and hand in the release.

    Raises:
        NotFound: no such file or key.
        FormatError, TrustError: the bundle is damaged, or the controller does not accept the key.
    """
    if not key.is_file():
        raise NotFound(f"the publisher's key {key} does not exist: name it with --key, or SKERRY_KEY")
    bundle, signer = open_bundle(file), signing.load_key(key)
    objects = {sha256_hex(bundle.manifest_bytes): bundle.manifest_bytes, **bundle.objects}
    total = sum(len(data) for data in objects.values())
    uploaded = known = 0
    for sha256, data in objects.items():
        progress(f"{sha256[:12]}…", (uploaded + known) / total)
        if client.has_object(sha256):
            known += len(data)
        else:
            client.put_object(sha256, data)
            uploaded += len(data)
    progress("signing", 1.0)
    skill = bundle.bundle.skill
    target = signing.release_target(skill.name, skill.version)
    manifest = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
    targets = signing.add_release(client.metadata("targets"), target, manifest, signer, now())
    return Published(client.release(bundle.digest, targets), uploaded, known)
