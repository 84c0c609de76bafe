"""What is on the device's disk, and the order in which it gets there.

    objects/<sha256>            verified content: parts, manifests, metadata sets; read-only, never changed
    partial/<sha256>            a wire form on its way in; what of it is good is found by hashing, never remembered
    versions/<manifest sha256>/ one complete version: hard links to objects (its manifest stays an object)
    active/<skill>.json         the pointer: what serves, what to return to, what was refused. The commit point.
    assignment.json             the last accepted assignment, sealed

Every write is safe against death at any moment: content reaches the disk under another name before it gets its own.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from edge_agent.plan import Pointer
from skills import zstd
from skills.bundle import MAX_MANIFEST_BYTES, Bundle, Part, decode_bundle
from skills.desired import MAX_ASSIGNMENT_BYTES
from skills.errors import FormatError, NotFound, StorageError, TrustError
from skills.files import (
    fsync_directory,
    read_bytes,
    read_pieces,
    sha256_file,
    sha256_hex,
    storage_errors,
    write_atomic,
    write_atomic_pieces,
)
from skills.report import CHUNK_BYTES
from skills.wire import decode_json, encode_json

MAX_POINTER_BYTES = 256 << 10
RESERVE_BYTES = (
    64 << 20
)  # never given to skills, or 1/16 of a small disk: room for pointers, logs and the next assignment
READ_ONLY = 0o444


class Store:
    """The data directory of one agent."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.objects = data / "objects"
        self.partial = data / "partial"
        self.versions = data / "versions"
        self.active = data / "active"
        self.assignment = data / "assignment.json"

    def prepare(self) -> None:
        """Make the folders and clear what a death left half-made.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors(self.data):
            for folder in (self.objects, self.partial, self.versions, self.active):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.data, self.objects, self.active):
                for stray in folder.glob(".*.tmp"):
                    stray.unlink()
            for stray in self.versions.glob(".*"):
                shutil.rmtree(stray)

    # --- looking ----------------------------------------------------------------------------------

    def object_digests(self) -> frozenset[str]:
        return frozenset(name for name in _names(self.objects) if not name.startswith("."))

    def version_digests(self) -> frozenset[str]:
        return frozenset(name for name in _names(self.versions) if not name.startswith("."))

    def skills(self) -> tuple[str, ...]:
        """Return the skills that have a pointer."""
        return tuple(sorted(name[:-5] for name in _names(self.active) if name.endswith(".json") and name[0] != "."))

    def folder(self, digest: str) -> Path:
        """Return where a version's files are."""
        return self.versions / digest

    def pointer(self, skill: str) -> Pointer:
        """Return a skill's pointer; an empty one when there is none.

        Raises:
            FormatError, StorageError: it is damaged or cannot be read.
        """
        try:
            text = read_bytes(self.active / f"{skill}.json", "the pointer", MAX_POINTER_BYTES)
        except NotFound:
            return Pointer(skill)
        return decode_json(Pointer, text, str(self.active / f"{skill}.json"))

    def read_object(self, digest: str, max_bytes: int) -> bytes:
        """Return a verified object.

        Raises:
            NotFound: it is not there, or was damaged on the disk; then it is removed, to be fetched again.
        """
        path = self.objects / digest
        content = read_bytes(path, "the object", max_bytes)
        if sha256_hex(content) != digest:
            self._drop(path)
            raise NotFound(f"the object {path} was damaged on the disk")
        return content

    def bundle(self, digest: str) -> Bundle | None:
        """Return the manifest with this digest; None when it is no bundle's.

        Raises:
            NotFound: it is not on the device.
        """
        try:
            return decode_bundle(self.read_object(digest, MAX_MANIFEST_BYTES), f"the manifest {digest[:12]}…")
        except FormatError:
            return None

    def damage(self, digest: str) -> str:
        """Compare every file of a version with its manifest; return what is wrong, or "". Reads the whole version."""
        folder = self.folder(digest)
        try:
            bundle = self.bundle(digest)
            if bundle is None:
                return f"the manifest {digest[:12]}… is not a bundle's"
            by_path = {part.path: part for part in bundle.parts}
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                part = by_path.get(path.relative_to(folder).as_posix())
                if part is None:
                    continue  # written by the skill itself beside its files: not ours to judge
                if path.stat().st_size != part.size or sha256_file(path) != part.sha256:
                    self._drop(self.objects / part.sha256)
                    return f"{path} was changed on the disk"
        except (NotFound, OSError) as error:
            return str(error)
        return ""

    def discard(self, digest: str) -> None:
        """Take a version away; its objects stay."""
        with storage_errors(self.folder(digest)), contextlib.suppress(FileNotFoundError):
            # 1. Out of sight under a name that prepare() clears, so that no half-removed version is ever looked at.
            doomed = self.versions / f".{digest}"
            os.replace(self.folder(digest), doomed)
            # 2. The files themselves.
            shutil.rmtree(doomed, ignore_errors=True)

    # --- writing ----------------------------------------------------------------------------------

    def put_object(self, digest: str, content: bytes) -> None:
        """Keep an object under its digest.

        Raises:
            TrustError: it has another hash.
            StorageError: the disk is full or refuses.
        """
        if (found := sha256_hex(content)) != digest:
            raise TrustError(f"an object arrived with sha256 {found[:12]}…, expected {digest[:12]}…")
        if not (self.objects / digest).is_file():
            write_atomic(self.objects / digest, content, READ_ONLY)

    def finish_part(self, part: Part) -> None:
        """Unpack a part's complete wire form into its object.

        Raises:
            TrustError: wire form or content have another hash than the manifest states.
            StorageError: the disk is full or refuses.
        """
        path = self.partial / part.wire_sha256
        # 1. The content becomes an object, verified before it gets its name. Until then the partial file is whole; a crash
        # costs only work.
        if not (self.objects / part.sha256).is_file():
            write_atomic_pieces(self.objects / part.sha256, _unpacked(part, path), READ_ONLY)
        # 2. The partial file is of no more use. A crash before this leaves it; collect() finds it.
        self._drop(path)

    def stage(self, digest: str, parts: tuple[Part, ...]) -> None:
        """Lay out a version's folder from its objects.

        Raises:
            StorageError: the disk is full or refuses; no half-made folder stays.
        """
        building, done = self.versions / f".{digest}", self.folder(digest)
        if done.is_dir():
            return  # a folder has its name only when it is complete
        with storage_errors(done):
            shutil.rmtree(building, ignore_errors=True)
            try:
                # 1. All files under another name. A crash leaves a folder that prepare() removes.
                building.mkdir()
                for part in parts:
                    path = building / part.path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _link(self.objects / part.sha256, path)
                for folder, _, _ in os.walk(building, topdown=False):
                    fsync_directory(Path(folder))
                # 2. Commit point of the staging: the folder gets its name, complete.
                os.replace(building, done)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
            # 3. The name reaches the disk before any pointer may speak of it.
            fsync_directory(self.versions)

    def write_pointer(self, pointer: Pointer) -> None:
        """Move a skill's pointer: the commit point of every change to what serves.

        Raises:
            StorageError: the disk is full or refuses; the old pointer stands.
        """
        write_atomic(self.active / f"{pointer.skill}.json", encode_json(pointer))

    def remove_pointer(self, skill: str) -> None:
        with storage_errors(self.active):
            (self.active / f"{skill}.json").unlink(missing_ok=True)
            fsync_directory(self.active)

    def write_assignment(self, sealed: bytes) -> None:
        """Remember the last accepted assignment, exactly as it came."""
        write_atomic(self.assignment, sealed)

    def read_assignment(self) -> bytes | None:
        try:
            return read_bytes(self.assignment, "the assignment", MAX_ASSIGNMENT_BYTES)
        except NotFound:
            return None

    def collect(self, objects: frozenset[str], versions: frozenset[str], partials: frozenset[str]) -> int:
        """Remove everything but what is named; return the bytes that came free. Never called with less than what serves."""
        freed = 0
        for name in self.version_digests() - versions:
            self.discard(name)
        for folder, keep in ((self.objects, objects), (self.partial, partials)):
            for name in set(_names(folder)) - keep:
                with contextlib.suppress(OSError):
                    freed += (folder / name).stat().st_size
                self._drop(folder / name)
        return freed

    def room(self) -> int:
        """Return the bytes that skills may still take: what is free and what lies in `partial/`, less a reserve.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors(self.data):
            disk = shutil.disk_usage(self.data)
            begun = sum(path.stat().st_blocks * 512 for path in self.partial.iterdir())
        return disk.free + begun - min(RESERVE_BYTES, disk.total >> 4)

    def _drop(self, path: Path) -> None:
        with storage_errors(path):
            path.unlink(missing_ok=True)


class PartialPart:
    """A part's wire form on its way in. Only verified chunks are written; opening it finds them again by hashing."""

    def __init__(self, store: Store, part: Part) -> None:
        self.part = part
        self._path = store.partial / part.wire_sha256
        self.have: set[int] = set()
        with storage_errors(self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            for index, digest in enumerate(part.chunks):
                piece = os.pread(self._file, self._size(index), index * CHUNK_BYTES)
                if piece and sha256_hex(piece) == digest:
                    self.have.add(index)

    def write(self, index: int, data: bytes) -> bool:
        """Write a chunk; False when its hash is not the manifest's, and then nothing was written.

        Raises:
            StorageError: the disk is full or refuses.
        """
        if not 0 <= index < len(self.part.chunks) or sha256_hex(data) != self.part.chunks[index]:
            return False
        with storage_errors(self._path):
            written = 0
            while written < len(data):
                count = os.pwrite(self._file, data[written:], index * CHUNK_BYTES + written)
                if count == 0:
                    raise OSError(errno.ENOSPC, "nothing was written")
                written += count
        self.have.add(index)
        return True

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _size(self, index: int) -> int:
        return min(CHUNK_BYTES, self.part.wire_size - index * CHUNK_BYTES)


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from [entry.name for entry in entries]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror or error}") from error


def _unpacked(part: Part, path: Path) -> Iterator[bytes]:
    """Yield a part's content from the file of its wire form. It is verified when this ends, and not before.

    Raises:
        TrustError: wire form or content have another hash than the manifest states.
    """
    wire, content = hashlib.sha256(), hashlib.sha256()
    try:
        for piece in zstd.decompress_pieces(_hashed(read_pieces(path, "the part"), wire), part.size):
            content.update(piece)
            yield piece
    except FormatError as error:
        raise TrustError(f"part {part.path}: {error}") from None
    for found, said, which in ((wire, part.wire_sha256, "wire form"), (content, part.sha256, "content")):
        if found.hexdigest() != said:
            raise TrustError(
                f"part {part.path}: its {which} has sha256 {found.hexdigest()[:12]}…, the signed manifest says {said[:12]}…"
            )


def _hashed(pieces: Iterator[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP):
            raise
        write_atomic_pieces(
            target, read_pieces(source, "the object"), READ_ONLY
        )  # a file system without hard links, such as FAT
