"""What the controller's API shows, as checked values. A newer controller may send more keys; those are passed over."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from skills.errors import FormatError

View = TypeVar("View")


@dataclasses.dataclass(frozen=True, slots=True)
class SkillView:
    """One version of one skill on a device."""

    skill: str
    version: str
    manifest_sha256: str
    phase: str
    reason: str
    received_bytes: int
    reused_bytes: int
    progress: float
    variants: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceView:
    """A device; `seen` and `enrolled` are Unix seconds."""

    id: str
    labels: Mapping[str, str]
    arch: str | None
    online: bool
    seen: float | None
    enrolled: float
    capabilities: Mapping[str, Any] | None
    wanted: Mapping[str, str]
    skills: tuple[SkillView, ...]

    def serving(self, skill: str) -> SkillView | None:
        """Return the version that answers, if one does."""
        return next((entry for entry in self.skills if entry.skill == skill and entry.phase == "serving"), None)

    def of(self, skill: str, version: str) -> SkillView | None:
        """Return one version, if the device knows it."""
        return next((entry for entry in self.skills if (entry.skill, entry.version) == (skill, version)), None)


@dataclasses.dataclass(frozen=True, slots=True)
class ReleaseView:
    """A release in the signed repository."""

    id: int
    skill: str
    version: str
    manifest_sha256: str
    manifest_size: int
    target: str
    time: float


@dataclasses.dataclass(frozen=True, slots=True)
class MemberView:
    """One device in a rollout."""

    device: str
    version: str
    previous: str | None
    canary: bool
    stage: str
    reason: str
    online: bool
    phase: str | None
    variants: Mapping[str, str]
    progress: float
    received_bytes: int
    reused_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class RolloutView:
    """A rollout; `devices` is empty in lists."""

    id: int
    skill: str
    version: str | None
    kind: str
    selector: str
    canary: int
    state: str
    proven: bool
    reason: str
    time: float
    counts: Mapping[str, int]
    devices: tuple[MemberView, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class EventView:
    """One line of the audit."""

    id: int
    time: float
    kind: str
    device: str | None
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class MeasureView:
    """How far a measurement is: `share` of the present `state` from 0 to 1; `figures` only once it is `done`."""

    state: str
    share: float
    figures: Mapping[str, Any] | None


def view(kind: type[View], raw: object, source: str) -> View:
    """Return `raw` (decoded JSON) as a `kind`.

    Raises:
        FormatError: it is something else.
    """
    return typing.cast(View, _read(kind, raw, source))


def _read(kind: Any, raw: object, where: str) -> object:
    origin, parts = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, raw, where)
    if origin is types.UnionType:
        return None if raw is None else _read(parts[0], raw, where)
    if origin is tuple and isinstance(raw, list):
        return tuple(_read(parts[0], item, f"{where}[{at}]") for at, item in enumerate(raw))
    if origin is Mapping and isinstance(raw, dict):
        return {
            str(key): item if parts[1] is Any else _read(parts[1], item, f"{where}.{key}") for key, item in raw.items()
        }
    if kind is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return float(raw)
    if kind in (str, int, bool) and type(raw) is kind:
        return raw
    raise FormatError(
        f"{where} is {type(raw).__name__}, expected {getattr(kind, '__name__', kind)}: another version of the controller?"
    )


def _read_fields(kind: Any, raw: object, where: str) -> object:
    if not isinstance(raw, dict):
        raise FormatError(f"{where} is {type(raw).__name__}, expected an object: is this address a Skerry controller?")
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in raw:
            values[field.name] = _read(hints[field.name], raw[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"{where} lacks '{field.name}': another version of the controller?")
    return kind(**values)
