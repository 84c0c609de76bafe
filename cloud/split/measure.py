"""Does the verdict stand? Run local, compressed input and best split over real processes and an emulated link, and compare."""

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.link_emulator import emulated_link
from cloud.split.verdict import options
from cloud.tail.store import install
from edge_agent.infer import SplitModel
from edge_agent.tail_client import LinkClient
from skills.errors import Unreachable
from skills.network import Link
from skills.split import Choice
from skills.split_plan import Millis
from skills.timer import Dilated, Local

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

START_DEADLINE_S = 30.0
WARMUP = 2
WAIT_S = 10.0  # while measuring, an answer is waited for: continuing here would hide how slow the link is
TIE = 1.05


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One option on one link: what was predicted, what was measured, and how often the tail really answered."""

    option: str  # local | input | split
    cut: str
    coding: str
    bytes: int
    predicted_ms: float
    measured_ms: Millis
    remote: int
    runs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One link: its rows, fastest predicted first; `stands` when the predicted best is the measured best, give or take 5 %."""

    link: Link
    rows: tuple[Row, ...]
    stands: bool

    @property
    def regret(self) -> float:
        """How much slower the predicted best was than the measured best, as a share of it; 0 when they are one."""
        return self.rows[0].measured_ms.p50 / min(row.measured_ms.p50 for row in self.rows) - 1


def measure_links(
    plan_folder: Path,
    feeds: "Arrays",
    links: Sequence[Link],
    *,
    rounds: int = 10,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> tuple[Measured, ...]:
    """Measure on each link the plan's best local, input and split option, interleaved, with a device dilated as planned.

    Starts a tail, an emulator and a link process, and stops them all. A private plan has no row for the input.

    Raises:
        Unreachable: one of the processes did not start.
    """
    count = len(next(iter(feeds.values())))
    samples = [{name: array[at : at + 1] for name, array in feeds.items()} for at in range(min(count, 16))]
    found = []
    with tempfile.TemporaryDirectory(prefix="skerry-") as temporary:
        folder = Path(temporary)
        install(plan_folder, folder / "tails")
        with running_tail(folder / "tails", folder) as port:
            for done, link in enumerate(links):
                progress("measuring links", done, len(links))
                with emulated_link(port, link) as emulated, running_link(folder / "l.sock", emulated.port):
                    found.append(_measure(plan_folder, folder / "l.sock", samples, link, rounds))
    progress("measuring links", len(links), len(links))
    return tuple(found)


@contextlib.contextmanager
def running_tail(tails: Path, folder: Path, *arguments: str) -> Iterator[int]:
    """Run a tail server on a free port of this machine, without TLS; it ends with the block."""
    with tail_process(tails, folder, *arguments) as (_, port):
        yield port


@contextlib.contextmanager
def tail_process(tails: Path, folder: Path, *arguments: str) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """Run a tail server and yield its process too, for those who want to kill it."""
    port_file = folder / "tail.port"
    port_file.unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "cloud.tail", "--tails", tails, "--port-file", port_file, *arguments]
    )
    try:
        _await(child, port_file.exists, "the tail server")
        yield child, int(port_file.read_text())
    finally:
        _end(child)


@contextlib.contextmanager
def running_link(path: Path, port: int, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a link process in front of a port of this machine; it ends with the block."""
    path.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "edge_agent.link",
        "--socket",
        path,
        "--target",
        f"127.0.0.1:{port}",
        "--with-parent",
    ]
    child = subprocess.Popen([*map(str, command), *arguments], stdin=subprocess.PIPE)
    try:
        _await(child, path.exists, "the link process")
        yield child
    finally:
        if child.stdin is not None:
            child.stdin.close()
        _end(child)


def _measure(plan_folder: Path, path: Path, samples: "Sequence[Arrays]", link: Link, rounds: int) -> Measured:
    model = SplitModel(plan_folder, link=path, wait_s=WAIT_S)
    model.timer = Dilated(model.plan.slowdown) if model.plan.slowdown > 1 else Local()
    try:
        if isinstance(model.tail, LinkClient) and not model.tail.wait_up(START_DEADLINE_S):
            raise Unreachable(f"the link process reached no tail within {START_DEADLINE_S:.0f} s")
        chosen = _one_of_each(options(model.plan, link))
        times: dict[str, list[float]] = {name: [] for name in chosen}
        remote = dict.fromkeys(chosen, 0)
        names = list(chosen)
        for at in range(WARMUP + rounds):
            turn = at % len(names)
            for name in names[turn:] + names[:turn]:
                model.use(chosen[name].cut.name, chosen[name].coding)
                model.answer(samples[at % len(samples)])
                if at >= WARMUP:
                    times[name].append(model.last.ms)
                    remote[name] += model.last.where in ("split", "cloud")
    finally:
        model.close()
    rows = tuple(_row(name, choice, times[name], remote[name]) for name, choice in chosen.items())
    fastest = min(row.measured_ms.p50 for row in rows)
    return Measured(link, rows, rows[0].measured_ms.p50 <= fastest * TIE)


def _one_of_each(ranked: Sequence[Choice]) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    for choice in ranked:
        found.setdefault(choice.cut.name if choice.cut.name in ("local", "input") else "split", choice)
    return found


def _row(name: str, choice: Choice, times: Sequence[float], remote: int) -> Row:
    ordered = sorted(times)
    measured = Millis(round(ordered[len(ordered) // 2], 2), round(ordered[round((len(ordered) - 1) * 0.9)], 2))
    coding = choice.coding
    size = coding.bytes_p50 if coding else 0
    return Row(
        name, choice.cut.name, coding.name if coding else "", size, round(choice.ms, 2), measured, remote, len(times)
    )


def _await(child: "subprocess.Popen[bytes]", ready: Callable[[], bool], what: str) -> None:
    import time

    until = time.monotonic() + START_DEADLINE_S
    while not ready():
        if child.poll() is not None or time.monotonic() > until:
            raise Unreachable(f"{what} did not start")
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.02)


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
