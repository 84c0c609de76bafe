"""Which variant of a skill fits a device, or why none does. Pure."""

import dataclasses
from collections.abc import Mapping

from skills.manifest import Skill, Variant


@dataclasses.dataclass(frozen=True, slots=True)
class Capabilities:
    """What one device reports of itself; `ram_mb` and `disk_mb` are what it offers to skills, in MiB."""

    arch: str
    ram_mb: int
    disk_mb: int
    agent: str
    isa: tuple[str, ...] = ()
    npu: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The variant of each model that fits."""

    variants: Mapping[str, Variant]


@dataclasses.dataclass(frozen=True, slots=True)
class Misfit:
    """Why a device cannot run a skill: one sentence per variant that was looked at."""

    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.reasons)


def resolve(skill: Skill, device: Capabilities) -> Choice | Misfit:
    """Take the first fitting variant of each model, in the author's order, within the memory of all together."""
    chosen: dict[str, Variant] = {}
    left_mb = device.ram_mb
    for name, model in skill.models.items():
        reasons = []
        for variant in model.variants:
            reason = why_not(variant, device, left_mb)
            if reason is None:
                chosen[name] = variant
                left_mb -= variant.ram_mb
                break
            reasons.append(f"{name}/{variant.name}: {reason}")
        else:
            return Misfit(tuple(reasons))
    return Choice(chosen)


def why_not(variant: Variant, device: Capabilities, ram_mb: int) -> str | None:
    """Return why a variant does not fit, or None when it does."""
    if variant.arch and device.arch not in variant.arch:
        return f"needs {' or '.join(variant.arch)}, the device is {device.arch}"
    version = device.runtimes.get(variant.runtime)
    if version is None:
        return f"needs {variant.runtime}, the device offers {', '.join(device.runtimes) or 'no runtime'}"
    if variant.runtime_min is not None and _numbers(version) < _numbers(variant.runtime_min):
        return f"needs {variant.runtime} {variant.runtime_min}, the device has {version}"
    missing = [isa for isa in variant.isa if isa not in device.isa]
    if missing:
        return f"needs the instruction set {', '.join(missing)}"
    if variant.npu is not None and variant.npu not in device.npu:
        return f"needs the accelerator {variant.npu}, the device has {', '.join(device.npu) or 'none'}"
    if variant.ram_mb > ram_mb:
        return f"needs {variant.ram_mb} MiB of memory, {ram_mb} MiB are offered"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split(".")[:3]:
        digits = "".join(ch for ch in part if ch.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts + [0] * (3 - len(parts)))
