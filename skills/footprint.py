"""What this process takes of memory, as Linux tells it."""

from collections.abc import Callable, Iterable
from pathlib import Path

STATUS = Path("/proc/self/status")


def own_kb(name: str) -> int:
    """Return a figure of this process in KiB: `VmHWM` is the most it ever held, `VmData` what it may write.

    Raises:
        OSError: this system does not tell.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError("this system does not tell a process its memory")


def grown_mb(steps: Iterable[Callable[[], object]]) -> tuple[float, ...]:
    """Take the steps in order, and return the MiB that this process held at most after each, above what it held before.

    Raises:
        OSError: this system does not tell.
    """
    bare, found = own_kb("VmHWM"), list[float]()
    for step in steps:
        step()
        found.append(round(max(own_kb("VmHWM") - bare, 0) / 1024, 1))
    return tuple(found)
