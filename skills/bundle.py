"""A bundle: one immutable skill version, content-addressed, in parts that travel one by one.

Format `bundle/v1`. The *manifest* is the canonical JSON of `Bundle`; its SHA-256 is the bundle's digest. Each part is
known by the SHA-256 of its content and travels as its *wire form*, one zstd frame, in chunks of 64 KiB whose hashes stand
in the manifest. A `.skb` file is a ZIP (stored) with `bundle.json` and `objects/<sha256 of the wire form>`.
"""

import dataclasses
import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from skills import zstd
from skills.errors import FormatError, NotFound, TrustError
from skills.files import read_bytes, sha256_file, sha256_hex, write_atomic
from skills.manifest import Skill, check_path, load_skill
from skills.report import CHUNK_BYTES, Sha256
from skills.resolve import Capabilities, Choice, Misfit, resolve
from skills.split_plan import load_plan
from skills.stages import check_placement
from skills.units import readable
from skills.wire import Limits, decode_json, encode_json

MANIFEST_NAME = "skill.yaml"
MAX_MANIFEST_BYTES = 4 << 20
MAX_PART_BYTES = 1 << 30
MAX_PARTS = 1024
MAX_BUNDLE_BYTES = 4 << 30
WIRE_LEVEL = 19
# All that zipfile raises on hostile bytes: it documents only the first.
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    KeyError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One file of a skill: its content and its wire form, each by SHA-256 and size in bytes."""

    path: str
    sha256: Sha256
    size: Annotated[int, Limits(min=0, max=MAX_PART_BYTES)]
    wire_sha256: Sha256
    wire_size: Annotated[int, Limits(min=1, max=MAX_PART_BYTES + (1 << 20))]
    chunks: Annotated[tuple[Sha256, ...], Limits(min=1, max_items=MAX_PART_BYTES // CHUNK_BYTES + 32)]

    def __post_init__(self) -> None:
        check_path(self.path)
        if len(self.chunks) != -(-self.wire_size // CHUNK_BYTES):
            raise FormatError(f"part {self.path} has {len(self.chunks)} chunks for {self.wire_size} bytes")


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """The manifest of a bundle; `splits` names the segment files of each split plan."""

    skill: Skill
    parts: Annotated[tuple[Part, ...], Limits(min=1, max_items=MAX_PARTS)]
    splits: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    format: Literal["bundle/v1"] = "bundle/v1"

    def __post_init__(self) -> None:
        paths = [part.path for part in self.parts]
        if len(set(paths)) != len(paths):
            raise FormatError("two parts have the same path")
        known = set(paths)
        for path in paths:
            for folder in PurePosixPath(path).parents:
                if str(folder) in known:
                    raise FormatError(f"the part {folder} is a file and the folder of the part {path} at once")
        wanted = {*self.skill.files(), *(path for files in self.splits.values() for path in files)}
        if missing := sorted(wanted - set(paths)):
            raise FormatError(f"the bundle lacks the part {missing[0]}")
        plans = {variant.split for model in self.skill.models.values() for variant in model.variants if variant.split}
        plans |= {self.skill.placement} if self.skill.placement else set()
        if plans != set(self.splits):
            odd = min(plans ^ set(self.splits))
            raise FormatError(f"the bundle's splits and the skill's variants disagree on the split plan {odd}")

    @property
    def size(self) -> int:
        """Bytes of all wire forms together."""
        return sum({part.wire_sha256: part.wire_size for part in self.parts}.values())


@dataclasses.dataclass(frozen=True, slots=True)
class BundleFile:
    """An opened and fully verified `.skb`: the manifest, its exact bytes and the wire forms by SHA-256."""

    bundle: Bundle
    manifest_bytes: bytes
    objects: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        return sha256_hex(self.manifest_bytes)


def load_folder(folder: Path) -> tuple[Skill, dict[str, tuple[str, ...]]]:
    """Check a skill's folder: its manifest, and that every file that it names is there.

    Returns:
        The skill, and for each split plan the paths of its segments, relative to the folder.

    Raises:
        NotFound: no such folder, no skill.yaml in it, or a named file is missing.
        FormatError: skill.yaml or a split plan is not what it should be.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder: name the folder that holds {MANIFEST_NAME}")
    if not (folder / MANIFEST_NAME).is_file():
        raise NotFound(f"{folder} is no skill: it has no {MANIFEST_NAME} (make one with: skerry skill new NAME)")
    skill = load_skill(read_text(folder / MANIFEST_NAME, "the skill's manifest"), str(folder / MANIFEST_NAME))
    splits: dict[str, tuple[str, ...]] = {}
    for path in skill.files():
        if not (folder / path).is_file():
            raise NotFound(f"{folder / MANIFEST_NAME} names {path}, which is not there")
    named = [variant.split for model in skill.models.values() for variant in model.variants]
    for plan_path in (path for path in (*named, skill.placement) if path is not None):
        plan = load_plan(read_text(folder / plan_path, "the split plan"), str(folder / plan_path))
        splits[plan_path] = tuple(str(PurePosixPath(plan_path).parent / file) for file in plan.files())
        for path in splits[plan_path]:
            check_path(path)
            if not (folder / path).is_file():
                raise NotFound(f"{folder / plan_path} names {path}, which is not there")
        if plan_path == skill.placement:
            check_placement(skill, plan, {path: sha256_file(folder / path) for path in splits[plan_path]})
    return skill, splits


def build_bundle(folder: Path, out: Path, progress: Callable[[str], None] = lambda path: None) -> Bundle:
    """Pack a skill's folder into one `.skb` file, whole or not at all; the same content gives the same bytes.

    Raises:
        NotFound, FormatError: as `load_folder`, or a file over a limit.
        StorageError: `out` cannot be written; nothing half-written is left.
    """
    skill, splits = load_folder(folder)
    parts, objects = [], {}
    for path in sorted({*skill.files(), *(path for files in splits.values() for path in files)}):
        progress(path)
        content = read_bytes(folder / path, "the part", MAX_PART_BYTES)
        wire = zstd.compress(content, WIRE_LEVEL)
        objects[sha256_hex(wire)] = wire
        parts.append(Part(path, sha256_hex(content), len(content), sha256_hex(wire), len(wire), chunk_hashes(wire)))
    bundle = Bundle(skill, tuple(parts), splits)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("bundle.json"), encode_json(bundle))
        for digest, wire in sorted(objects.items()):
            archive.writestr(zipfile.ZipInfo(f"objects/{digest}"), wire)
    write_atomic(out, buffer.getvalue())
    return bundle


def open_bundle(path: Path) -> BundleFile:
    """Read a `.skb` file and check every hash in it.

    Raises:
        NotFound: no such file.
        FormatError: not a bundle, or over a limit.
        TrustError: an object does not have the hash that the manifest states.
    """
    data = read_bytes(path, "the bundle", MAX_BUNDLE_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_PARTS + 1 or sum(entry.file_size for entry in entries) > MAX_BUNDLE_BYTES:
                raise FormatError(f"{path} is larger than a bundle may be")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise zipfile.BadZipFile("an entry is compressed")
            manifest_bytes = archive.read("bundle.json")
            bundle = decode_bundle(manifest_bytes, f"{path}: bundle.json")
            objects = {part.wire_sha256: archive.read(f"objects/{part.wire_sha256}") for part in bundle.parts}
    except _ZIP_FAULTS as error:
        raise FormatError(f"{path} is no bundle (made with: skerry skill build): {error}") from None
    for part in bundle.parts:
        content = unpack_part(part, objects[part.wire_sha256])
        if part.path == bundle.skill.placement:
            plan = load_plan(content.decode("utf-8", "replace"), f"{path}: {part.path}")
            check_placement(bundle.skill, plan, {one.path: one.sha256 for one in bundle.parts})
        if chunk_hashes(objects[part.wire_sha256]) != part.chunks:
            raise TrustError(f"part {part.path} has other chunks than the manifest states")
    return BundleFile(bundle, manifest_bytes, objects)


def decode_bundle(manifest_bytes: bytes, source: str) -> Bundle:
    """Check the bytes of a bundle's manifest.

    Raises:
        FormatError: what is wrong with it.
    """
    return decode_json(Bundle, manifest_bytes, source, MAX_MANIFEST_BYTES)


def parts_for(bundle: Bundle, choice: Choice) -> tuple[Part, ...]:
    """Return the parts that a device with this choice of variants needs: code, assets, probe and its variants' files."""
    skill = bundle.skill
    wanted = {stage.code for stage in skill.stages} | {skill.probe.file, *skill.assets}
    for variant in choice.variants.values():
        wanted.add(str(variant.file or variant.split))
        wanted.update(bundle.splits.get(str(variant.split), ()))
    if skill.placement is not None:
        wanted.add(skill.placement)  # the models in it are the tail's; here those of the choice serve
    return tuple(part for part in bundle.parts if part.path in wanted)


def fit(bundle: Bundle, device: Capabilities) -> Choice | Misfit:
    """Choose variants as `resolve` does, and hold their parts against the disk space that the device offers."""
    choice = resolve(bundle.skill, device)
    if isinstance(choice, Misfit):
        return choice
    need, offered = sum({part.sha256: part.size for part in parts_for(bundle, choice)}.values()), device.disk_mb << 20
    if need > offered:
        return Misfit((f"needs {readable(need)} of disk, {readable(offered)} are offered (disk_mb)",))
    return choice


def unpack_part(part: Part, wire: bytes) -> bytes:
    """Return a part's content from its wire form, verified.

    Raises:
        TrustError: wire form or content have another hash than the manifest states.
    """
    if (found := sha256_hex(wire)) != part.wire_sha256:
        raise TrustError(
            f"part {part.path} arrived with sha256 {found[:12]}…, the signed manifest says {part.wire_sha256[:12]}…"
        )
    try:
        content = zstd.decompress(wire, part.size)
    except FormatError as error:
        raise TrustError(f"part {part.path}: {error}") from None
    if (found := sha256_hex(content)) != part.sha256:
        raise TrustError(f"part {part.path} has sha256 {found[:12]}…, the signed manifest says {part.sha256[:12]}…")
    return content


def chunk_hashes(wire: bytes) -> tuple[str, ...]:
    """Return the SHA-256 of each 64 KiB piece."""
    return tuple(sha256_hex(wire[at : at + CHUNK_BYTES]) for at in range(0, max(len(wire), 1), CHUNK_BYTES))


def read_text(path: Path, what: str) -> str:
    """Read a small UTF-8 text file.

    Raises:
        NotFound, StorageError: it is not there, or cannot be read.
        FormatError: it is not UTF-8.
    """
    try:
        return read_bytes(path, what, 1 << 20).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
