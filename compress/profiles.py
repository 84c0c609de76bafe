"""The device profiles that ship with Skerry, and which of them this machine is."""

import platform
from importlib import resources
from pathlib import Path

from skills.errors import NotFound
from skills.files import read_bytes
from skills.isa import isa
from skills.profile import Profile, load_profile

MAX_PROFILE_BYTES = 64 << 10
X86 = ("x86_64", "amd64")
VNNI = frozenset(("avx512_vnni", "avx_vnni"))


def names() -> tuple[str, ...]:
    """Return the names of the shipped profiles."""
    folder = resources.files("compress") / "profiles"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def find(device: str) -> Profile:
    """Return a shipped profile by name, one from a `.yaml` file, or with `auto` the one of this machine.

    Raises:
        NotFound: no such profile.
        FormatError: the file is no profile.
    """
    if device == "auto":
        device = detect(platform.machine(), isa())
    if device.endswith((".yaml", ".yml")):
        text = read_bytes(Path(device), "the profile", MAX_PROFILE_BYTES).decode(errors="replace")
        return load_profile(text, device)
    if device not in names():
        raise NotFound(f"there is no device profile '{device}': use auto, a .yaml file, or one of {', '.join(names())}")
    text = (resources.files("compress") / "profiles" / f"{device}.yaml").read_text()
    return load_profile(text, f"{device}.yaml")


def detect(machine: str, found: tuple[str, ...]) -> str:
    """Return the name of the profile for a machine with these instruction sets. Pure.

    Raises:
        NotFound: no shipped profile fits.
    """
    match machine.lower():
        case name if name in X86:
            return "x86-vnni" if VNNI & set(found) else "x86-avx2"
        case "aarch64" | "arm64":
            return "arm64-onnxruntime"
    raise NotFound(f"no shipped profile fits this machine ({machine}): name one with --device")


def saturates(profile: Profile, machine: str, found: tuple[str, ...]) -> bool:
    """Return whether int8 kernels of a machine with these instruction sets give wrong sums for what is made for a profile. Pure.

    x86 without VNNI adds two products of 8-bit codes in 16 bits (docs/decisions/0045-exact-sums.md).
    """
    return profile.weight_bits > 7 and machine.lower() in X86 and not VNNI & set(found)


def saturates_here(profile: Profile) -> bool:
    """Return what `saturates` says of this machine."""
    return saturates(profile, platform.machine(), isa())


def too_large(size: int, profile: Profile) -> tuple[str, ...]:
    """Return a sentence if a file of so many bytes is larger than the profile's flash. Pure."""
    if profile.flash_kib is None or size <= profile.flash_kib * 1024:
        return ()
    return (f"It takes {size / 1024:.0f} KiB of flash, {profile.name} has {profile.flash_kib:g} KiB.",)
