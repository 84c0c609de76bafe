"""What a device says: hello, its state, and which chunks it needs. Pure values and the binary chunk frame."""

import dataclasses
import struct
from collections.abc import Mapping
from typing import Annotated, Literal

from skills.errors import FormatError
from skills.manifest import Name, Version
from skills.resolve import Capabilities
from skills.wire import Limits

CHUNK_BYTES = 64 << 10
MAX_RANGES = 16
MAX_CHUNKS_A_NEED = 64  # 4 MiB in flight at the most

Sha256 = Annotated[str, Limits(pattern="[0-9a-f]{64}", hint="64 hexadecimal digits")]
Phase = Literal["fetching", "staging", "probing", "serving", "refused", "failed", "stalled"]


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """First words after every connect; the nonce comes back inside the next assignment and proves that it is fresh."""

    device: str
    nonce: Annotated[str, Limits(max_items=64)]
    boot: Annotated[str, Limits(max_items=64)]
    capabilities: Capabilities
    format: Literal["hello/v1"] = "hello/v1"


@dataclasses.dataclass(frozen=True, slots=True)
class SkillState:
    """How far one version of one skill is on a device."""

    skill: Name
    version: Version
    manifest_sha256: Sha256
    phase: Phase
    reason: Annotated[str, Limits(max_items=4000)] = ""
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    received_bytes: int = 0
    reused_bytes: int = 0
    progress: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceState:
    """All that a device reports: one entry for each version that serves or is wanted."""

    device: str
    seq: int
    counter: int
    skills: Annotated[tuple[SkillState, ...], Limits(max_items=64)] = ()
    format: Literal["state/v1"] = "state/v1"

    def of(self, skill: str, manifest_sha256: str) -> SkillState | None:
        """Return the entry of one version, if there is one."""
        return next((s for s in self.skills if s.skill == skill and s.manifest_sha256 == manifest_sha256), None)

    def serving(self, skill: str) -> SkillState | None:
        """Return the entry of the version that answers, if one does."""
        return next((s for s in self.skills if s.skill == skill and s.phase == "serving"), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Ask for the chunks [a, b) of an object; request, acknowledgement and credit in one. The giver keeps no state."""

    transfer: Annotated[int, Limits(min=0, max=(1 << 32) - 1)]
    sha256: Sha256
    ranges: Annotated[tuple[tuple[int, int], ...], Limits(min=1, max_items=MAX_RANGES)]
    format: Literal["need/v1"] = "need/v1"

    def __post_init__(self) -> None:
        if any(not 0 <= a < b < 1 << 32 for a, b in self.ranges):
            raise FormatError("a range of chunks is empty or backwards")
        if sum(b - a for a, b in self.ranges) > MAX_CHUNKS_A_NEED:
            raise FormatError(f"more than {MAX_CHUNKS_A_NEED} chunks asked for at once")


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of an object; `gone` means that the giver has no such object and `data` says why (UTF-8)."""

    transfer: int
    index: int
    data: bytes
    gone: bool = False


_HEAD = struct.Struct(">BBHII")


def encode_chunk(chunk: Chunk) -> bytes:
    """Return the binary frame: version 1, flags, reserved, transfer, index, bytes."""
    return _HEAD.pack(1, int(chunk.gone), 0, chunk.transfer, chunk.index) + chunk.data


def decode_chunk(frame: bytes) -> Chunk:
    """Read a frame that `encode_chunk` wrote.

    Raises:
        FormatError: another version, unknown flags, too short or too long.
    """
    if not _HEAD.size <= len(frame) <= _HEAD.size + CHUNK_BYTES:
        raise FormatError(f"a chunk frame has {len(frame)} bytes")
    version, flags, reserved, transfer, index = _HEAD.unpack_from(frame)
    if version != 1 or flags > 1 or reserved != 0:
        raise FormatError(f"a chunk frame has version {version} and flags {flags}")
    return Chunk(transfer, index, frame[_HEAD.size :], gone=bool(flags))
