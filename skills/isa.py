"""The instruction sets of this machine that decide which kernels run, named as the kernel names them."""

import contextlib
from pathlib import Path

KNOWN = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8",
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "sve", "bf16",
)  # fmt: skip


def isa(root: Path = Path("/")) -> tuple[str, ...]:
    """Return those that are here; none where the kernel does not tell."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                have = set(value.split())
                return tuple(name for name in KNOWN if name in have)
    return ()
