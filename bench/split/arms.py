"""What is measured beside each other on a link: the plan's own options, and what other planners would do. Pure.

Whatever another planner chooses is run in our runtime, on our segments and through our tail; only its choice and its way of
writing tensors are its own.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from skills.coding import Coding
from skills.network import Link
from skills.split import Choice, Estimate, choose_cut, predict, predict_ms
from skills.split_plan import Cut, Plan

MOST = 10  # options of a plan that are measured on one link
HOPELESS = 4.0  # predicted to be so many times slower than the best: not measured, for it cannot be the oracle
OUR_CHOICE, AGAIN, DADS, AUTO_SPLIT = "planner", "planner again", "DADS-like", "Auto-Split-like"
RIVALS = (("jpeg", 75), ("jpeg", 90), ("png", 0), ("pixels", 0))
Way = Literal["ours", "float", "int4"]


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """A cut and how its tensors travel: in one of our codings, as raw float, or as 4-bit codes that nothing compresses."""

    cut: str
    coding: Coding | None
    way: Way = "ours"
    allowed: bool = True  # accuracy admits it: only then may it be the oracle

    @property
    def name(self) -> str:
        """The word for tables and keys."""
        if self.way != "ours":
            return f"{self.cut} {self.way}"
        return f"{self.cut} {self.coding.name}" if self.coding else "local"


def arms(plan: Plan, link: Link) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the arms of a cell by name, and which of them each planner would take."""
    estimate = Estimate(link.mbit, link.rtt_ms)
    found: dict[str, Arm] = {}
    for choice in _worth_measuring(plan, estimate):
        arm = Arm(choice.cut.name, choice.coding)
        found[arm.name] = arm
    best = choose_cut(plan, estimate)
    takes, bound = {OUR_CHOICE: _name(best)}, HOPELESS * best.ms
    for kind, quality in RIVALS:
        for coding in plan.cut("input").codings:
            if (coding.kind, coding.quality) == (kind, quality):
                arm = Arm("input", coding, allowed=coding.admitted)
                if kind == "jpeg" or predict_ms(plan, plan.cut("input"), coding, estimate) <= bound:
                    found.setdefault(arm.name, arm)
    for label, arm in ((DADS, dads(plan, link)), (AUTO_SPLIT, auto_split(plan, link))):
        found.setdefault(arm.name, arm)
        takes[label] = arm.name
    return found, takes


def dads(plan: Plan, link: Link) -> Arm:
    """Return what DADS (Hu et al., INFOCOM 2019) would do: float tensors or the raw input; work and bytes / rate, nothing else.

    Its minimum cut, over the cuts that the plan has.
    """
    return _least(plan, link, "float", 32)


def auto_split(plan: Plan, link: Link) -> Arm:
    """Return what Auto-Split (Banitalebi-Dehkordi et al., KDD 2021) would do with 4-bit activations and the raw input.

    Only cuts with fewer bytes than the raw input count; no entropy coding, no round trip. Its 8-bit weights, which would speed
    up the device's part, are not modelled: every planner here gets the same network.
    """
    return _least(plan, link, "int4", 4)


def elements(cut: Cut) -> int:
    """Return how many numbers cross a cut, of one input."""
    return sum(math.prod(max(1, size) for size in live.shape) for live in cut.tensors)


def _least(plan: Plan, link: Link, way: Way, bits: int) -> Arm:
    ms_per_byte = 8 / (link.mbit * 1000)
    pixels = next((coding for coding in plan.cut("input").codings if coding.kind == "pixels"), None)
    raw = elements(plan.cut("input"))
    costs: list[tuple[float, Arm]] = []
    for cut in plan.cuts:
        if cut.name == "local":
            costs.append((cut.device_ms.p50, Arm("local", None)))
        elif cut.name == "input":
            costs.append((raw * ms_per_byte + cut.tail_ms.p50, Arm("input", pixels)))
        else:
            size = elements(cut) * bits // 8
            if way == "float" or size < raw:
                costs.append((cut.device_ms.p50 + size * ms_per_byte + cut.tail_ms.p50, Arm(cut.name, None, way)))
    return min(costs, key=lambda one: one[0])[1]


def _worth_measuring(plan: Plan, estimate: Estimate) -> Sequence[Choice]:
    """Return the options that no other one dominates, at most `MOST`, the best predicted first; local is among them."""
    every = list(_admitted(plan, estimate))
    kept = [one for one in every if one.coding is None or not any(_dominates(other, one) for other in every)]
    kept.sort(key=lambda one: one.ms)
    near = [one for one in kept if one.coding is None or one.ms <= HOPELESS * kept[0].ms]
    local = next(one for one in near if one.coding is None)
    return near[:MOST] if local in near[:MOST] else [*near[: MOST - 1], local]


def _admitted(plan: Plan, estimate: Estimate) -> Iterator[Choice]:
    for cut in plan.cuts:
        for coding in cut.codings or (None,):
            if coding is None or coding.admitted:
                yield predict(plan, cut, coding, estimate)


def _dominates(one: Choice, other: Choice) -> bool:
    if one.coding is None or other.coding is None or one is other:
        return False
    if one.reply != other.reply:
        return False
    mine, its = _costs(one.cut, one.coding), _costs(other.cut, other.coding)
    return all(a <= b for a, b in zip(mine, its, strict=True)) and mine != its


def _costs(cut: Cut, coding: Coding) -> tuple[float, float, float]:
    return cut.device_ms.p50 + coding.encode_ms, coding.bytes_p50, coding.decode_ms + cut.tail_ms.p50


def _name(choice: Choice) -> str:
    return Arm(choice.cut.name, choice.coding).name


def chosen(plan: Plan, estimate: Estimate, alpha: float) -> str:
    """Return the name of the arm that the plan's own decision takes for an estimate."""
    return _name(choose_cut(plan, estimate, alpha=alpha))
