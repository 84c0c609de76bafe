"""The link between device and tail, by the best means that this machine has: root, a user's own namespaces, or a proxy."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, Self

from cloud.link_emulator import EmulatedLink, emulated_link
from skills.errors import Unreachable
from skills.network import Link

HERE = Path(__file__).parent
KINDS = {
    "root": "two network namespaces (root) and a TUN device",
    "user": "two network namespaces of a user (unshare -Urn) and a TUN device",
    "proxy": "a TCP proxy: **warm link only**, so there are no cold and no trace figures",
}
CORES = tuple(sorted(os.sched_getaffinity(0)))  # asked before anything is pinned
START_S = 30.0
SETTLE_S = 0.3
SMALL_BYTES = 60  # a packet with next to nothing in it takes its time on a slow link, both ways
SPREAD = 0.05  # a link whose round trip or rate is further off than this is said so


class Wire(Protocol):
    """A link that can be changed; `kind` is root, user or proxy."""

    kind: str

    def change(self, link: Link) -> None:
        """Take another rate and round-trip time from now on."""

    def cut(self, seconds: float) -> None:
        """Lose everything for this long."""

    def control(self, name: str) -> None:
        """Take another congestion control for new connections, where it can be had."""

    def device(self) -> list[str]:
        """Return what a command is preceded by to run on the device's side."""

    def tail(self) -> list[str]:
        """Return what a command is preceded by to run on the tail's side."""

    def listen(self) -> str:
        """Return the address that a server on the tail's side binds to."""

    def reach(self, port: int) -> contextlib.AbstractContextManager[str]:
        """Yield the HOST:PORT under which the device reaches a port of the tail."""


class Namespaces:
    """A shaper between two namespaces."""

    def __init__(self, child: "subprocess.Popen[bytes]", kind: str) -> None:
        self.kind, self._child = kind, child
        line = _stream(child.stdout).readline()
        if not line:
            raise Unreachable(f"there are no namespaces to be had as {kind}")
        said = json.loads(line)
        self._pid, self._spaces = said["pid"], (said["device"], said["tail"])

    def change(self, link: Link) -> None:
        self._say(f"link {link}")

    def cut(self, seconds: float) -> None:
        self._say(f"cut {seconds:g}")

    def control(self, name: str) -> None:
        self._say(f"control {name}")

    def device(self) -> list[str]:
        return self._enter(self._spaces[0])

    def tail(self) -> list[str]:
        return self._enter(self._spaces[1])

    def listen(self) -> str:
        return "10.9.0.2:0"

    @contextlib.contextmanager
    def reach(self, port: int) -> Iterator[str]:
        yield f"10.9.0.2:{port}"

    def _enter(self, space: int) -> list[str]:
        user = [f"--user=/proc/{self._pid}/ns/user", "--preserve-credentials"] if self.kind == "user" else []
        return ["nsenter", *user, f"--net=/proc/{self._pid}/fd/{space}", "--"]

    def _say(self, line: str) -> None:
        stream = _stream(self._child.stdin)
        stream.write(line.encode() + b"\n")
        stream.flush()
        if not _stream(self._child.stdout).readline():
            raise Unreachable("the shaper has ended")


class Proxied:
    """The proxy of the product's own emulator: loopback on both of its sides."""

    kind = "proxy"

    def __init__(self, first: Link) -> None:
        self._link, self._running = first, list[EmulatedLink]()

    def change(self, link: Link) -> None:
        self._link = link
        for one in self._running:
            one.change(link)

    def cut(self, seconds: float) -> None:
        for one in self._running:
            one.cut(seconds)

    def control(self, name: str) -> None:
        return None

    def device(self) -> list[str]:
        return []

    def tail(self) -> list[str]:
        return []

    def listen(self) -> str:
        return "127.0.0.1:0"

    @contextlib.contextmanager
    def reach(self, port: int) -> Iterator[str]:
        with emulated_link(port, self._link) as one:
            self._running.append(one)
            try:
                yield f"127.0.0.1:{one.port}"
            finally:
                self._running.remove(one)


@contextlib.contextmanager
def wire(wanted: str, first: Link) -> Iterator[Wire]:
    """Make the best link there is: `wanted` is root, user, proxy or auto; it ends with the block.

    Raises:
        Unreachable: the wanted kind cannot be had.
    """
    for kind, flags in (("root", "-n"), ("user", "-Urn")):
        if wanted not in (kind, "auto"):
            continue
        command = ["unshare", flags, sys.executable, "-P", str(HERE / "shaper.py"), "--link", str(first)]
        with on_core(0):
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            try:
                made = Namespaces(child, kind)
            except Unreachable:
                if wanted == kind:
                    raise
                continue
            yield made
            return
        finally:
            end(child)
    yield Proxied(first)


def end(child: "subprocess.Popen[bytes]") -> None:
    """Close a child's streams, ask it to end, and see to it."""
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Start what is started in this block on one core where there are two, or on any (None).

    Device, link and shaper have the first, the tail the second. A child inherits what its parent may use when it starts.
    """
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES if core is None else {CORES[min(core, len(CORES) - 1)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@contextlib.contextmanager
def running_tail(on: Wire, tails: Path, folder: Path, core: int | None = 1) -> Iterator[int]:
    """Run a tail on the tail's side and yield its port."""
    file = folder / "tail.port"
    file.unlink(missing_ok=True)
    command = [*on.tail(), sys.executable, "-P", "-m", "cloud.tail", "--tails", str(tails), "--listen", on.listen()]
    with running([*command, "--port-file", str(file)], file, core):
        yield int(file.read_text())


@contextlib.contextmanager
def running_link(on: Wire, path: Path, target: str) -> Iterator[None]:
    """Run the device's link process in front of `target`; workers reach it at the socket `path`."""
    path.unlink(missing_ok=True)
    command = [*on.device(), sys.executable, "-P", "-m", "edge_agent.link", "--socket", str(path), "--target", target]
    with running([*command, "--with-parent"], path, 0):
        yield


@contextlib.contextmanager
def running(command: Sequence[str], until: Path, core: int | None) -> Iterator[None]:
    """Run a command until the block ends; it is up once the file or socket `until` is there.

    Raises:
        Unreachable: it did not come up.
    """
    with on_core(core):
        child = subprocess.Popen(list(command), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        stop = time.monotonic() + START_S
        while not until.exists():
            if child.poll() is not None or time.monotonic() > stop:
                raise Unreachable(f"{Path(str(command[-1])).name}: {' '.join(map(str, command[:8]))} did not start")
            time.sleep(0.02)
        yield
    finally:
        end(child)


class Script:
    """One of this folder's scripts on a side of the link: a line in, a line of JSON out."""

    def __init__(self, prefix: Sequence[str], name: str, *arguments: str, core: int | None = 0) -> None:
        command = [*prefix, sys.executable, "-P", str(HERE / name), *arguments]
        with on_core(core):
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self) -> dict[str, Any]:
        """Return its next line.

        Raises:
            Unreachable: it has ended.
        """
        line = _stream(self._child.stdout).readline()
        if not line:
            raise Unreachable("a script of the bench has ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, line: str) -> dict[str, Any]:
        """Say a line and return its answer."""
        stream = _stream(self._child.stdin)
        stream.write(line.encode() + b"\n")
        stream.flush()
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._child)


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """What a link was asked to be, and what plain TCP through it found."""

    link: Link
    rtt_ms: float
    mbit: float
    control: str  # congestion control of both sides, as their connections say

    @property
    def good(self) -> bool:
        """Say whether both are within five percent; half a millisecond is this machine's own."""
        rtt_off = abs(self.rtt_ms - self.link.rtt_ms - 2 * SMALL_BYTES / self.link.mbit / 125) - 0.5
        return rtt_off <= SPREAD * self.link.rtt_ms and abs(self.mbit / self.link.mbit - 1) <= SPREAD


def check(on: Wire, links: Sequence[Link]) -> list[Checked]:
    """Send through every link and hold round trip and rate against what was asked for."""
    found = []
    with Script(on.tail(), "plain_tcp.py", "serve", on.listen(), core=1) as server:
        port = int(server.read()["port"])
        for link in links:
            on.change(link)
            with on.reach(port) as target, Script(on.device(), "plain_tcp.py", "measure", target) as client:
                said = client.ask(str(int(max(60_000, link.mbit * 125_000 * 0.6))))
                found.append(Checked(link, said["rtt_ms"], said["mbit"], str(said["control"])))
    return found


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise Unreachable("a process of the bench has no such stream")
    return stream
