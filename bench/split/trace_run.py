"""A link that changes under a running device, beside a device that stays local and one that knows what is best.

Three devices take turns with the same inputs: ours, which chooses and learns by itself; a control that stays local; and an
oracle with a link process of its own, pinned in each phase to what a race of all options found fastest there. What counts
as missed is longer than 1.1 times the 99th percentile of the control in the same run; ours is told that of the control's
first answers.
"""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wire
from arms import Arm, arms
from device import Device
from figures import share_at
from nets import Planned

from cloud.tail.store import install
from edge_agent.infer import Ran, SplitModel
from skills import codec, ort
from skills.errors import Unreachable
from skills.network import Link
from skills.split import Choice
from skills.timer import Dilated

OUTAGE_S = 10.0
WAIT_S = 2.0
DEADLINE = 1.1
FIRST = 200  # answers of the control before the trace begins
RACE_ROUNDS = 5
RACED = 5
REPLY_STEPS = 0.02  # of the answer's range: a coded reply rounds to a 255th, and sums differ between kernels


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A while with one link; None is the outage, behind which the link is as before."""

    link: Link | None
    seconds: float


def phases(seconds: float) -> tuple[Phase, ...]:
    """Return the trace: 100, 5, 1 and 20 Mbit/s, round trips of 5 and 50 ms in turn, an outage before the last."""
    links = (Link(100, 5), Link(5, 50), Link(1, 5), Link(20, 50))
    first = [Phase(link, seconds) for link in links]
    return (*first, Phase(None, OUTAGE_S), Phase(Link(20, 5), seconds))


class Watched(SplitModel):
    """The product's model, which also says how long each decision took."""

    choice_us = 0.0

    def _choose(self, now_s: float) -> tuple[Choice, str]:
        start = time.perf_counter()
        found = super()._choose(now_s)
        self.choice_us = (time.perf_counter() - start) * 1e6
        return found


class Answers:
    """What each way of answering comes to, computed without a link."""

    def __init__(self, planned: Planned) -> None:
        plan = self._plan = planned.plan
        self._chain = ort.chain(
            [planned.folder / one.file for one in plan.segments], [live.name for live in plan.outputs]
        )
        self._known: dict[tuple[int, str, str], Mapping[str, Any]] = {}

    def fits(self, at: int, sample: Mapping[str, Any], ran: Ran, found: Mapping[str, Any]) -> bool:
        """Return whether an answer is what this way of answering gives, within what a coded reply may be off."""
        remote = ran.where in ("cloud", "split")
        key = (at, ran.cut if remote else "local", ran.coding if remote else "")
        if key not in self._known:
            self._known[key] = self._computed(sample, *key[1:])
        return all(
            name in found and bool(np.abs(found[name] - values).max() <= REPLY_STEPS * np.ptp(values))
            for name, values in self._known[key].items()
        )

    def _computed(self, sample: Mapping[str, Any], cut_name: str, coding: str) -> Mapping[str, Any]:
        cut, last = self._plan.cut(cut_name), len(self._plan.segments)
        if not coding:
            return self._chain.run(sample, 0, last)
        values = self._chain.run(sample, 0, cut.after) if cut.after else sample
        how = next(one for one in cut.codings if one.name == coding)
        return self._chain.run(codec.decode(how, cut.tensors, codec.encode(how, cut.tensors, values)), cut.after, last)


def measure(planned: Planned, on: wire.Wire, phase_s: float, least: int, least_in_outage: int) -> dict[str, Any]:
    """Run the trace over and over until so many requests were asked, and so many of them during an outage."""
    rows: list[dict[str, Any]] = []
    on.change(Link(100, 5))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skbench-")))
        install(planned.folder, folder / "tails")
        target = stack.enter_context(on.reach(stack.enter_context(wire.running_tail(on, folder / "tails", folder))))
        for name in ("ours", "oracle"):
            stack.enter_context(wire.running_link(on, folder / name, target))
        oracle = Device(planned.folder, folder / "oracle")
        stack.callback(oracle.close)
        answers = Answers(planned)
        ours = Watched(planned.folder, link=folder / "ours", wait_s=WAIT_S)
        stack.callback(ours.close)
        control = SplitModel(planned.folder)
        ours.timer = control.timer = Dilated(planned.plan.slowdown)
        best = {
            str(phase.link): _race(planned, oracle, on, phase.link) for phase in phases(1) if phase.link is not None
        }
        first: list[float] = []
        for at in range(FIRST):
            control.answer(planned.samples[at % len(planned.samples)])
            first.append(control.last.ms)
        told_ms = DEADLINE * share_at(first, 0.99)
        outages = 0
        while len(rows) < least or outages < least_in_outage:
            before = len(rows)
            for phase in phases(phase_s):
                if phase.link is not None:
                    on.change(phase.link)
                else:
                    on.cut(phase.seconds)
                arm = best[str(phase.link)] if phase.link is not None else Arm("local", None)
                _phase(phase, planned, (ours, control, oracle), answers, arm, told_ms, rows)
            outages += sum(row["phase"] == "outage" for row in rows[before:])
    return {"rows": rows, "told_ms": told_ms, "best": {link: arm.name for link, arm in best.items()}, "net": planned.net.name,
            "slowdown": planned.plan.slowdown, "wire": on.kind}  # fmt: skip


def _race(planned: Planned, oracle: Device, on: wire.Wire, link: Link) -> Arm:
    """Find what is fastest on a link by measuring, for the device that is told."""
    on.change(link)
    time.sleep(wire.SETTLE_S)
    measured = {name: arm for name, arm in arms(planned.plan, link)[0].items() if arm.way == "ours" and arm.allowed}
    few = dict(itertools.islice(measured.items(), RACED)) | {"local": Arm("local", None)}
    ms: dict[str, list[float]] = {name: [] for name in few}
    for at in range(RACE_ROUNDS + 1):
        for name, arm in few.items():
            took = oracle.run(arm, planned.samples[at % len(planned.samples)]).ms
            if at:
                ms[name].append(took)
    return few[min(ms, key=lambda name: statistics.median(ms[name]))]


def _phase(
    phase: Phase,
    planned: Planned,
    devices: tuple[Watched, SplitModel, Device],
    answers: Answers,
    best: Arm,
    told_ms: float,
    rows: list[dict[str, Any]],
) -> None:
    ours, control, oracle = devices
    until, at = time.monotonic() + phase.seconds, 0
    while time.monotonic() < until:
        which = at % len(planned.samples)
        sample = planned.samples[which]
        row: dict[str, Any] = {"phase": str(phase.link) if phase.link is not None else "outage", "at": at}
        for name in itertools.islice(itertools.cycle(("ours", "control", "oracle")), at % 3, at % 3 + 3):
            if name == "ours":
                answer, ran = ours.answer(sample, told_ms / 1e3), ours.last
                row |= {"ours": ran.ms, "where": ran.where, "cut": ran.cut, "coding": ran.coding, "choice_us": ours.choice_us,
                        "answered": answers.fits(which, sample, ran, answer)}  # fmt: skip
            elif name == "control":
                control.answer(sample)
                row["control"] = control.last.ms
            elif best.coding is not None:
                with contextlib.suppress(Unreachable):  # just behind an outage: then what the control took counts
                    row["oracle"] = oracle.run(best, sample).ms
        rows.append(row)
        at += 1


def judge(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a trace. The oracle of a phase is the faster of the pinned device and the control there."""
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    limit = DEADLINE * share_at([row["control"] for row in rows], 0.99)
    ideal = 0.0
    for phase in {row["phase"] for row in rows}:
        some = [row for row in rows if row["phase"] == phase]
        pinned = [row["oracle"] for row in some if "oracle" in row]
        local = statistics.fmean(row["control"] for row in some)
        # Means on both sides, or a hiccup of the machine would count against one of them only.
        ideal += len(some) * min(local, statistics.fmean(pinned) if pinned else local)
    outage = [row for row in rows if row["phase"] == "outage"]
    ways = [(row["cut"], row["coding"]) for row in rows]

    def missed(some: Sequence[Mapping[str, Any]], name: str) -> float:
        return 100.0 * sum(float(row[name]) > limit for row in some) / max(len(some), 1)

    return {
        "requests": len(rows), "in_outage": len(outage), "unanswered": sum(not row["answered"] for row in rows),
        "share": ideal / sum(row["ours"] for row in rows), "limit_ms": limit,
        "missed": missed(rows, "ours"), "missed_control": missed(rows, "control"),
        "missed_outage": missed(outage, "ours"), "missed_outage_control": missed(outage, "control"),
        "switches": sum(one != other for one, other in itertools.pairwise(ways)),
        "continued": sum(row["where"] == "continued" for row in rows),
        "choice_p99_ms": share_at([row["choice_us"] for row in rows], 0.99) / 1e3,
    }  # fmt: skip
