"""What may be delivered: objects by SHA-256, the signed repository, and releases.

`objects/<sha256>` holds wire forms, manifests and metadata sets; `lent/<sha256>` what a device is to measure, until it has.
`repository/` is the TUF repository: `N.root.json` and
`targets.json` come from whoever holds those keys, `snapshot.json` and `timestamp.json` are signed here, online.
Commit point of a release is `targets.json`; what follows (online metadata, table row) is made again from it at every start.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cloud.database import Database, Release
from cloud.journal import Journal
from cloud.tail.guard import remote_cuts
from cloud.tail.layout import lay_out
from skills import signing
from skills.bundle import MAX_MANIFEST_BYTES, Bundle, Part, decode_bundle, unpack_part
from skills.desired import ObjectRef
from skills.errors import FormatError, NotFound, StorageError, TrustError
from skills.files import fsync_directory, read_bytes, sha256_hex, storage_errors, write_atomic
from skills.split_plan import MAX_PLAN_BYTES, Plan, load_plan, plan_hash
from skills.stages import check_placement

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_OBJECT_BYTES = (1 << 30) + (1 << 20)
MAX_TARGETS_BYTES = 768 << 10
MAX_CACHED = 64  # manifests held in memory
MAX_OBJECT_SETS = 512  # what belongs to a manifest: asked for with every chunk
LENT_S = 3600.0  # longer than any measurement takes
KEPT_SETS = 8  # metadata sets that a device may still be fetching
REFRESH_BEFORE = timedelta(days=5)  # of the seven that online metadata lives
ROLES = ("root", "targets", "snapshot", "timestamp")


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """The keys that the controller itself holds. Root and publisher are there only while one machine does everything."""

    online: "Ed25519PrivateKey"
    director: "Ed25519PrivateKey"


class Registry:
    """Objects, repository and releases in one data directory; used from one task at a time."""

    def __init__(self, data: Path, database: Database, journal: Journal, now: Callable[[], float]) -> None:
        """Open the registry, or make it with new keys at the first start.

        Raises:
            StorageError: a directory or key cannot be written or read.
        """
        self._objects, self._repository, self._keys_dir = data / "objects", data / "repository", data / "keys"
        self._tails, self._lent = data / "tails", data / "lent"
        self._database, self._journal, self._now = database, journal, now
        with storage_errors(self._lent), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._lent)  # nobody who asked for it is still there
        for directory in (self._objects, self._repository, self._keys_dir, self._tails, self._lent):
            with storage_errors(directory):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stray in self._objects.glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        for stray in self._tails.glob(".*.tmp"):
            shutil.rmtree(stray, ignore_errors=True)
        self._accepting = asyncio.Lock()
        self._laying = threading.Lock()
        self.keys = self._open_keys()
        self._bundles: dict[str, Bundle] = {}
        self._plans: dict[str, Mapping[str, frozenset[str]]] = {}  # by manifest; kept, for a release never changes
        self._objects_of: dict[str, frozenset[str]] = {}
        self._sets: tuple[str, ...] = ()
        self._signed_for = ""  # the targets that the online metadata speaks of
        self.metadata = self.refresh()
        self._adopt()

    # --- objects ----------------------------------------------------------------------------------

    def path_of(self, sha256: str) -> Path:
        """Return where an object lies, or would lie.

        Raises:
            FormatError: not a SHA-256.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise FormatError(f"{sha256[:80]!r} is no object's name, expected 64 hexadecimal digits")
        return self._objects / sha256

    def size_of(self, sha256: str) -> int | None:
        """Return the size of an object in bytes, or None when it is not there."""
        try:
            return self.path_of(sha256).stat().st_size
        except FileNotFoundError:
            return None

    async def put(self, sha256: str, body: AsyncIterator[bytes], *, lent: bool = False) -> int:
        """Take in an object and return its size; it appears whole and verified, or not at all.

        What is `lent` belongs to no release: devices fetch it while they measure, and `take_back` removes it.

        Raises:
            TrustError: the bytes have another hash.
            FormatError: too large.
            StorageError: the disk is full or refuses.
        """
        path = self.path_of(sha256)
        if (known := self.size_of(sha256)) is not None:
            async for _ in body:  # an answer before the end of the body would look like a broken connection
                pass
            return known
        if lent:
            path = self._lent / sha256
            self._forget_unused()
        temporary = path.with_name(f".{sha256}.{id(body):x}.tmp")
        digest, size = hashlib.sha256(), 0
        try:
            with storage_errors(path), temporary.open("wb") as file:
                async for piece in body:
                    size += len(piece)
                    if size > MAX_OBJECT_BYTES:
                        raise FormatError(f"the object is larger than the limit of {MAX_OBJECT_BYTES} bytes")
                    digest.update(piece)
                    file.write(piece)
                if digest.hexdigest() != sha256:
                    raise TrustError(
                        f"the object has the sha256 {digest.hexdigest()[:12]}…, not {sha256[:12]}… as its name says"
                    )
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
                os.replace(temporary, path)
                fsync_directory(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return size

    def read_chunk(self, sha256: str, start: int, size: int) -> bytes:
        """Return a piece of an object; empty beyond its end.

        Raises:
            NotFound: no such object.
            StorageError: it cannot be read.
        """
        try:
            path = self.path_of(sha256)
            with (path if path.exists() else self._lent / sha256).open("rb") as file:
                return os.pread(file.fileno(), size, start)
        except FileNotFoundError:
            raise NotFound(f"the controller has no object {sha256[:12]}…") from None
        except OSError as error:
            raise StorageError(f"cannot read the object {sha256[:12]}…: {error.strerror or error}") from error

    def lent_object(self, sha256: str, max_bytes: int) -> bytes:
        """Return an object that was lent.

        Raises:
            NotFound: it is not there any more, or never was.
            FormatError, StorageError: not a SHA-256, or it cannot be read or is larger.
        """
        return read_bytes(self._lent / self.path_of(sha256).name, "the lent object", max_bytes)

    def lacks(self, objects: Collection[str]) -> str | None:
        """Return one of these that is neither an object nor lent; None when all are there."""
        return next((one for one in objects if self.size_of(one) is None and not (self._lent / one).exists()), None)

    def take_back(self, objects: Collection[str]) -> None:
        """Remove lent objects."""
        for sha256 in objects:
            with contextlib.suppress(OSError):
                (self._lent / sha256).unlink(missing_ok=True)

    def _forget_unused(self) -> None:
        """Remove what was lent long ago: whoever lent it ended without a word."""
        with contextlib.suppress(OSError):
            for path in self._lent.iterdir():
                if time.time() - path.stat().st_mtime > LENT_S:
                    path.unlink(missing_ok=True)

    def manifest(self, sha256: str) -> Bundle:
        """Return a bundle's manifest by its hash.

        Raises:
            NotFound: there is no such object.
            FormatError: it is no manifest.
        """
        bundle = self._bundles.get(sha256)
        if bundle is None:
            data = read_bytes(self.path_of(sha256), "the manifest", MAX_MANIFEST_BYTES)
            bundle = self._bundles[sha256] = decode_bundle(data, f"the manifest {sha256[:12]}…")
            if len(self._bundles) > MAX_CACHED:
                self._bundles.pop(next(iter(self._bundles)))
        return bundle

    def plans_of(self, sha256: str) -> Mapping[str, frozenset[str]]:
        """Return the split plans in the bundle with this manifest: by hash, the cuts that a device may ask the tail for.

        Raises:
            NotFound, StorageError: the manifest or a plan is not there, or cannot be read.
            FormatError, TrustError: one of them is not what it should be.
        """
        found = self._plans.get(sha256)
        if found is None:
            bundle = self.manifest(sha256)
            plans = [self._plan(bundle, path)[0] for path in bundle.splits]
            found = self._plans[sha256] = {plan_hash(plan): remote_cuts(plan) for plan in plans}
        return found

    def objects_of(self, sha256: str) -> frozenset[str]:
        """Return all that a device may fetch of the bundle with this manifest: the manifest itself and its parts.

        Raises:
            NotFound, FormatError, StorageError: as `manifest`.
        """
        found = self._objects_of.get(sha256)
        if found is None:
            parts = self.manifest(sha256).parts
            found = self._objects_of[sha256] = frozenset((sha256, *(part.wire_sha256 for part in parts)))
            if len(self._objects_of) > MAX_OBJECT_SETS:
                self._objects_of.pop(next(iter(self._objects_of)))
        return found

    def is_metadata(self, sha256: str) -> bool:
        """Say whether an object is a set of metadata that an assignment named of late."""
        return sha256 in self._sets

    # --- repository -------------------------------------------------------------------------------

    @property
    def root_bytes(self) -> bytes:
        """The newest root: what a new device pins."""
        return self._roots()[max(self._roots())]

    @property
    def director_pem(self) -> bytes:
        """The key by which devices know their assignments."""
        return signing.public_pem(self.keys.director)

    def role(self, name: str) -> bytes:
        """Return one metadata file.

        Raises:
            NotFound: no such role.
        """
        if name not in ROLES:
            raise NotFound(f"the repository has no {name!r}, only {', '.join(ROLES)}")
        return (
            self.root_bytes
            if name == "root"
            else read_bytes(self._repository / f"{name}.json", "the metadata", MAX_TARGETS_BYTES)
        )

    def refresh(self) -> ObjectRef:
        """Sign snapshot and timestamp anew and return the new metadata set."""
        targets = self.role("targets")
        snapshot_path, timestamp_path = self._repository / "snapshot.json", self._repository / "timestamp.json"
        last = signing.metadata_version(timestamp_path.read_bytes()) if timestamp_path.exists() else 0
        # Unix time as the least version: after a restored backup devices must not see an older number than before.
        version = max(last + 1, int(self._now()))
        snapshot, timestamp = signing.sign_online(targets, version, self.keys.online, self._clock())
        packed = signing.pack_metadata(self._roots(), timestamp, snapshot, targets)
        ref = ObjectRef(sha256_hex(packed), len(packed))
        write_atomic(self._objects / ref.sha256, packed)
        write_atomic(snapshot_path, snapshot)
        write_atomic(timestamp_path, timestamp)
        self._forget_old_sets(ref.sha256)
        self.metadata, self._signed_for = ref, sha256_hex(targets)
        return ref

    def refresh_due(self) -> bool:
        """Say whether the online metadata should be signed again."""
        return signing.metadata_expires(self.role("timestamp")) - self._clock() < REFRESH_BEFORE

    async def accept(self, manifest_sha256: str, targets: bytes) -> Release:
        """Take in a release that somebody signed; a release that is listed already is returned as it is.

        Models are unpacked and written in a thread, one release at a time; everything else stays with the calling task.

        Raises:
            NotFound: the manifest or one of its objects was not uploaded.
            TrustError: the targets are signed by no listed key, are not newer, or do not list this manifest.
            FormatError: the manifest or the targets are not what they should be.
        """
        if len(targets) > MAX_TARGETS_BYTES:
            raise FormatError(f"targets.json has {len(targets)} bytes, the limit is {MAX_TARGETS_BYTES}")
        async with self._accepting:
            bundle = self._check_objects(manifest_sha256)
            skill, version = bundle.skill.name, bundle.skill.version
            target = signing.release_target(skill, version)
            current = self.role("targets")
            if targets == current:
                releases = signing.list_releases(targets)
            else:
                releases = signing.check_targets(self.root_bytes, targets, current)
            if releases.get(target) != ObjectRef(manifest_sha256, self.size_of(manifest_sha256) or 0):
                raise TrustError(f"targets.json does not list {target} with the manifest {manifest_sha256[:12]}…")
            for plan in await asyncio.to_thread(self._lay_out_tails, bundle):
                self._journal.info("tail.laid_out", skill=skill, version=version, plan=plan)
            if targets != current:
                # Commit point: from here on the release is in the repository. The rest is made again at the next start
                # or, where the disk was full just now, when the same release is sent again.
                write_atomic(self._repository / "targets.json", targets)
            if self._signed_for != sha256_hex(targets):
                self.refresh()
            self._adopt()
            return self.release(skill, version)

    # --- releases ---------------------------------------------------------------------------------

    def releases(self) -> list[Release]:
        """Return all releases, newest first."""
        with self._database.begin() as session:
            return session.query(Release).order_by(Release.id.desc()).all()

    def release(self, skill: str, version: str | None) -> Release:
        """Return one release, the newest of its skill when no version is given.

        Raises:
            NotFound: there is none.
        """
        with self._database.begin() as session:
            query = session.query(Release).filter_by(skill=skill)
            if version is not None:
                query = query.filter_by(version=version)
            found = query.order_by(Release.id.desc()).first()
            if found is None:
                known = [row.version for row in session.query(Release).filter_by(skill=skill).order_by(Release.id)]
        if found is None:
            if known:
                raise NotFound(f"the skill {skill} has no release {version}, only {', '.join(known[-10:])}")
            raise NotFound(f"no release of a skill {skill!r}: publish it first (skerry skill publish)")
        return found

    def _adopt(self) -> None:
        """Enter every release of the repository into the table: nothing but targets.json says what is released."""
        listed = signing.list_releases(self.role("targets"))
        with self._database.begin() as session:
            known = {row.target for row in session.query(Release)}
            for target, ref in listed.items():
                if target in known:
                    continue
                match = re.fullmatch(r"skills/([^/]+)/([^/]+)\.json", target)
                if match is None:
                    continue
                row = Release(skill=match[1], version=match[2], manifest_sha256=ref.sha256, manifest_size=ref.size)
                row.target, row.time = target, self._now()
                session.add(row)
                self._journal.info("release.accepted", skill=match[1], version=match[2], manifest=ref.sha256[:12])

    def _check_objects(self, manifest_sha256: str) -> Bundle:
        if self.size_of(manifest_sha256) is None:
            raise NotFound(f"the manifest {manifest_sha256[:12]}… was not uploaded")
        bundle = self.manifest(manifest_sha256)
        for part in bundle.parts:
            size = self.size_of(part.wire_sha256)
            if size is None:
                raise NotFound(f"the object {part.wire_sha256[:12]}… of part {part.path} was not uploaded")
            if size != part.wire_size:
                raise TrustError(f"part {part.path} has {size} bytes, the manifest says {part.wire_size}")
        return bundle

    def _lay_out_tails(self, bundle: Bundle) -> list[str]:
        """Lay out each split plan where the tail server finds it, and return the new ones; called in a thread."""
        fresh = []
        parts = {part.path: part for part in bundle.parts}
        # The task that waits for this thread may be gone (its client hung up) while the thread goes on.
        with self._laying:
            for plan_path, segments in bundle.splits.items():
                plan, text = self._plan(bundle, plan_path)
                folder = PurePosixPath(plan_path).parent
                if {str(folder / file) for file in plan.files()} != set(segments):
                    raise FormatError(f"{plan_path} names other segments than the bundle's manifest says")
                if plan_path == bundle.skill.placement:
                    check_placement(bundle.skill, plan, {part.path: part.sha256 for part in bundle.parts})

                def content(file: str, folder: PurePosixPath = folder) -> bytes:
                    return self._content(parts[str(folder / file)])

                if lay_out(plan, text, content, self._tails):
                    fresh.append(plan_hash(plan))
        return fresh

    def _plan(self, bundle: Bundle, path: str) -> tuple[Plan, str]:
        part = next(part for part in bundle.parts if part.path == path)
        if part.size > MAX_PLAN_BYTES:
            raise FormatError(f"{path} has {part.size} bytes, the limit of a split plan is {MAX_PLAN_BYTES}")
        text = self._content(part).decode("utf-8", "replace")
        return load_plan(text, path), text

    def _content(self, part: Part) -> bytes:
        return unpack_part(part, read_bytes(self.path_of(part.wire_sha256), "the object", MAX_OBJECT_BYTES))

    def _open_keys(self) -> Keys:
        """Load the keys, or make all of them and an empty repository at the first start."""
        names = ("root", "publisher", "online", "director")
        paths = {name: self._keys_dir / f"{name}.pem" for name in names}
        if not (self._repository / "targets.json").exists():
            keys = {
                name: signing.load_key(path) if path.exists() else signing.new_key() for name, path in paths.items()
            }
            for name, key in keys.items():
                if not paths[name].exists():
                    signing.save_key(key, paths[name])
            now = self._clock()
            write_atomic(
                self._repository / "1.root.json", signing.new_root(keys["root"], keys["publisher"], keys["online"], now)
            )
            # Commit point of the first start: without targets.json all of the above is made again from the same keys.
            write_atomic(self._repository / "targets.json", signing.new_targets(keys["publisher"], now))
        return Keys(signing.load_key(paths["online"]), signing.load_key(paths["director"]))

    def _roots(self) -> dict[int, bytes]:
        found = {}
        for path in self._repository.glob("*.root.json"):
            number = path.name.split(".", 1)[0]
            if number.isdigit():
                found[int(number)] = path.read_bytes()
        if not found:
            raise StorageError(f"{self._repository} has no root.json: restore the data directory from a backup")
        return found

    def _forget_old_sets(self, newest: str) -> None:
        path = self._repository / "sets"
        kept = path.read_text().split() if path.exists() else []
        kept = [*(name for name in kept if name != newest), newest]
        write_atomic(path, "\n".join(kept[-KEPT_SETS:]).encode())
        self._sets = tuple(kept[-KEPT_SETS:])
        for name in kept[:-KEPT_SETS]:
            (self._objects / name).unlink(missing_ok=True)

    def _clock(self) -> datetime:
        return datetime.fromtimestamp(self._now(), UTC)


def release_json(release: Release) -> dict[str, object]:
    """Return a release as the API shows it."""
    names = ("id", "skill", "version", "manifest_sha256", "manifest_size", "target", "time")
    return {name: getattr(release, name) for name in names}
