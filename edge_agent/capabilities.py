"""What this device can do: machine, instruction sets, runtimes, accelerators, memory and disk, read below injectable roots."""

import dataclasses
import os
import platform
from pathlib import Path

from edge_agent.config import AgentConfig
from edge_agent.runtimes import installed
from skills import __version__
from skills.isa import isa
from skills.resolve import Capabilities


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
    """An NPU that may be here: its device nodes and the libraries that would drive it."""

    name: str
    nodes: tuple[str, ...]
    libraries: tuple[str, ...]


# Where two families share a node (mainline /dev/accel), the library decides.
ACCELERATORS = (
    Accelerator("ethosu", ("dev/ethosu0",), ("libethosu_delegate.so", "libethosu.so")),
    Accelerator("vsi", ("dev/galcore",), ("libvx_delegate.so", "libtim-vx.so")),
    Accelerator("rknpu", ("dev/rknpu", "dev/dri/renderD129"), ("librknnrt.so",)),
    Accelerator("qnn", ("dev/fastrpc-cdsp", "dev/adsprpc-smd"), ("libQnnHtp.so",)),
    Accelerator("edgetpu", ("dev/apex_0",), ("libedgetpu.so.1",)),
    Accelerator("hailo", ("dev/hailo0",), ("libhailort.so",)),
    Accelerator("neutron", ("dev/neutron0",), ("libneutron_delegate.so", "libNeutronDriver.so")),
)
LIBRARY_FOLDERS = ("usr/lib", "usr/lib64", "usr/local/lib", "opt/lib", f"usr/lib/{platform.machine()}-linux-gnu")


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """One rung of the ladder: what was found of an accelerator. Its placement is unproven until a model ran on it."""

    name: str
    node: str
    library: str

    @property
    def state(self) -> str:
        if self.node and self.library:
            return "present, placement unproven"
        return f"no library ({self.node} is there)" if self.node else f"no device node ({self.library} is there)"


def capabilities(config: AgentConfig, root: Path = Path("/")) -> Capabilities:
    """Return what the device reports in its hello."""
    return Capabilities(
        arch=platform.machine(),
        ram_mb=min(config.memory_mb, memory_mb(root)),
        disk_mb=config.disk_mb,  # what happens to be free changes from hour to hour: the store looks before each fetch
        agent=__version__,
        isa=isa(root),
        npu=tuple(found.name for found in accelerators(root) if found.node and found.library),
        runtimes=installed(config.runtimes),
    )


def memory_mb(root: Path = Path("/")) -> int:
    """Return the machine's memory in MiB."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) >> 10
    return 1 << 20


def free_mb(path: Path) -> int:
    """Return the free space of the file system that holds `path`, in MiB."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize >> 20


def accelerators(root: Path = Path("/")) -> tuple[Found, ...]:
    """Return every accelerator of which at least a device node or a library is here."""
    found = []
    for entry in ACCELERATORS:
        node = next((f"/{name}" for name in entry.nodes if (root / name).exists()), "")
        library = next(
            (
                f"/{folder}/{name}"
                for name in entry.libraries
                for folder in LIBRARY_FOLDERS
                if (root / folder / name).exists()
            ),
            "",
        )
        if node or library:
            found.append(Found(entry.name, node, library))
    return tuple(found)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
