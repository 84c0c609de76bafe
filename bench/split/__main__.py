"""Is the planner right on a real link? Every cell measured whole, beside what other planners and fixed choices would do.

    SKERRY_REFERENCE=../shared/data python -P bench/split [--quick] [--row NAME ...] [--wire root|user|proxy]

The link is two network namespaces with a shaper between them, so TCP is the kernel's own; where no namespaces are to be
had it is a TCP proxy, and then nothing cold and no trace is measured. Everything is kept under --work as it finishes and
taken from there the next time, as long as the code that is measured is the same: an interrupted bench goes on where it was.
Prints Markdown.
"""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cells
import cold
import nets
import switching
import table
import throughput
import trace_run
import wire
from store import Store, digest

import cloud.split
import cloud.tail
import edge_agent
import skills
from skills import ort
from skills.errors import SkerryError
from skills.network import Link

REFERENCE = Path(os.environ.get("SKERRY_REFERENCE", Path(__file__).parents[3] / "shared" / "data"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skerry-bench" / "split"
GRIDS = tuple(net.name for net in nets.NETS)
ROWS = (*GRIDS, "bbr", "cold", "trace", "switch", "tail")
MIDDLE = "efficientnet"  # the net of trace, switch and tail
TRACE_SLOWDOWN = 10.0
QUICK_ROWS = (*GRIDS, "cold", "trace", "switch", "tail")
QUICK_LINKS = (Link(1, 5), Link(5, 50), Link(20, 5))
QUICK_RUNS, FULL_RUNS, BBR_RUNS = 6, cells.RUNS, 6
JSON_MBIT, QUICK_JSON_MBIT = 5.0, 20.0
MEASURED = (skills, edge_agent, cloud.split, cloud.tail)  # beside the bench's own files
ONLY_SHOWS = ("table.py",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench/split", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", nargs="+", choices=ROWS, metavar="NAME", help=f"only these, of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="few links, one device, short trace: at most five minutes")
    parser.add_argument(
        "--wire", choices=("auto", *wire.KINDS), default="auto", help="how the link is made (default: the best)"
    )
    parser.add_argument("--work", type=Path, default=CACHE, metavar="DIR", help=f"where all is kept (default: {CACHE})")
    given = parser.parse_args()
    start = time.monotonic()
    os.environ["GRPC_VERBOSITY"] = "NONE"  # an outage is what is measured, not news
    wanted = given.row or (QUICK_ROWS if given.quick else ROWS)
    work = given.work.resolve() / ("quick" if given.quick else "full")
    with wire.wire(given.wire, Link(20, 30)) as on, wire.on_core(0):
        found = _Run(on, work, quick=given.quick).rows(wanted, start)
    text = table.page(found)
    (work / "table.md").write_text(text)
    print(text)


def say(text: str) -> None:
    """Tell on standard error what is being done."""
    print(text, file=sys.stderr, flush=True)


class _Run:
    """One run of the bench over one kind of link."""

    def __init__(self, on: wire.Wire, work: Path, *, quick: bool) -> None:
        self._on, self._work, self._quick = on, work, quick
        measured = [Path(str(package.__file__)).parent for package in MEASURED]
        self._code = digest([*measured, Path(__file__).resolve().parent], ONLY_SHOWS)
        self._store = Store(work / "cells", say, {"code": self._code, "versions": ort.versions()})
        self._plans: dict[str, nets.Planned] = {}

    def rows(self, wanted: Sequence[str], start: float) -> table.Found:
        """Measure the wanted rows, or take them from earlier."""
        links = QUICK_LINKS if self._quick else nets.LINKS
        checks = wire.check(self._on, links)
        missing = [f"the row {name}" for name in ROWS if name not in wanted]
        if self._on.kind == "proxy":
            missing.append("cold requests, the trace and bbr, for which a proxy is no link")
            wanted = [name for name in wanted if name not in ("cold", "trace", "bbr")]
        work: dict[str, Callable[[], Any]] = {name: partial(self._grid, name, "cubic") for name in GRIDS}
        work |= {"bbr": self._bbr, "cold": self._cold, "trace": self._trace}
        work |= {"switch": self._switch, "tail": self._tail}
        done: dict[str, Any] = {}
        for name in ROWS:
            if name in wanted:
                try:
                    done[name] = work[name]()
                except SkerryError as error:  # what was stored stays; the other rows are worth having
                    say(f"{name}: {error}")
                    missing.append(f"the row {name} ({error})")
        grid = [cell for name in GRIDS for cell in done.get(name, ())]
        return table.Found(
            self._about(time.monotonic() - start), wire.KINDS[self._on.kind], checks, grid, done.get("bbr", ()),
            done.get("cold", ()), done.get("trace"), done.get("switch"), done.get("tail"), missing,
        )  # fmt: skip

    def _bbr(self) -> list[dict[str, Any]]:
        return [cell for name in GRIDS for cell in self._grid(name, "bbr")]

    def _planned(self, name: str) -> nets.Planned:
        if name not in self._plans:
            say(f"{name}: plan")
            net = next(one for one in nets.NETS if one.name == name)
            self._plans[name] = nets.planned(net, REFERENCE, self._work, self._code, quick=self._quick)
        return self._plans[name]

    def _grid(self, name: str, control: str) -> list[dict[str, Any]]:
        links: Sequence[Link] = nets.LINKS
        slowdowns: Sequence[float] = nets.SLOWDOWNS
        runs, json_mbit = (BBR_RUNS, math.inf) if control == "bbr" else (FULL_RUNS, JSON_MBIT)
        if self._quick:
            links, slowdowns, runs = QUICK_LINKS, (nets.PLANNED,), QUICK_RUNS
            json_mbit = max(json_mbit, QUICK_JSON_MBIT)
        self._on.control(control)
        try:
            return cells.grid(self._planned(name), slowdowns, links, runs, self._on, self._store, control, json_mbit)
        finally:
            self._on.control("cubic")

    def _cold(self) -> list[dict[str, Any]]:
        found = []
        runs = 5 if self._quick else 20
        for control in ("cubic",) if self._quick else ("cubic", "bbr"):
            for link in cold.LINKS[: 1 if self._quick else None]:
                facts = {"wire": self._on.kind, "control": control, "link": str(link), "runs": runs}

                def measure(link: Link = link, control: str = control) -> dict[str, Any]:
                    return cold.measure(self._on, link, control, runs)

                found.append(self._store.get(f"cold-{control}", facts, measure))
        return found

    def _trace(self) -> dict[str, Any]:
        device = nets.for_device(self._planned(MIDDLE), TRACE_SLOWDOWN)
        phase_s, least, in_outage = (6.0, 1, 1) if self._quick else (12.0, 2000, 200)
        facts = {
            "wire": self._on.kind,
            "x": TRACE_SLOWDOWN,
            "phase_s": phase_s,
            "least": least,
            "plan": (device.plan.cuts, device.plan.replies),
        }
        found: dict[str, Any] = self._store.get(
            "trace", facts, lambda: trace_run.measure(device, self._on, phase_s, least, in_outage)
        )
        return found

    def _switch(self) -> dict[str, Any]:
        planned, switches = self._planned(MIDDLE), 40 if self._quick else 1000
        facts = {"switches": switches, "plan": (planned.plan.cuts, planned.plan.replies)}
        found: dict[str, Any] = self._store.get("switch", facts, lambda: switching.measure(planned, switches))
        return found

    def _tail(self) -> dict[str, Any]:
        planned = self._planned(MIDDLE)
        model = REFERENCE / next(one.model for one in nets.NETS if one.name == MIDDLE)
        seconds, rounds = (2.0, 3) if self._quick else (6.0, 5)
        kinds = ("jpeg q90",) if self._quick else ("jpeg q90", "pixels")
        facts = {
            "seconds": seconds,
            "rounds": rounds,
            "kinds": kinds,
            "plan": (planned.plan.cuts, planned.plan.replies),
        }
        found: dict[str, Any] = self._store.get(
            "tail", facts, lambda: throughput.measure(planned, model, kinds, seconds, rounds)
        )
        return found

    def _about(self, seconds: float) -> str:
        versions = ort.versions()
        load, kept = ", ".join(f"{value:.1f}" for value in os.getloadavg()), self._store.kept()
        return (
            f"{time.strftime('%Y-%m-%d')}, {_processor()}, {os.cpu_count()} cores, Linux {platform.release()}, onnxruntime "
            f"{versions['onnxruntime']}, Python {versions['python']}; `python -P bench/split {' '.join(sys.argv[1:])}`".rstrip()
            + f", {seconds:.0f} s, load average at the end {load}{'; ' + kept if kept else ''}."
        )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
