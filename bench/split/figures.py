"""The figures that the bench is about, from measured cells. Pure: all times are medians of interleaved runs."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from arms import AGAIN, AUTO_SPLIT, DADS, OUR_CHOICE

Cell = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """One cell: what each planner's choice takes, the oracle's, and the best of what needs no planner."""

    cell: Cell
    ours: str
    ours_ms: float
    oracle: str
    oracle_ms: float
    static_ms: float
    rivals_ms: Mapping[str, float]
    noise: float
    learnt_ms: float | None

    @property
    def regret(self) -> float:
        """How much slower the planner's choice is than the best measured option, as a share of it."""
        return self.ours_ms / self.oracle_ms - 1

    @property
    def behind_static(self) -> float:
        """How much slower it is than the best of staying local and sending a JPEG."""
        return self.ours_ms / self.static_ms - 1


def judge(cell: Cell) -> Judged:
    """Hold a cell's choices against what was measured."""
    middle = {name: statistics.median(values) for name, values in cell["ms"].items() if values}
    ours = cell["takes"][OUR_CHOICE]
    again = middle.pop(AGAIN, middle[ours])
    # The choice was run twice as often as the rest, as two arms; both count, and their difference is the noise.
    ours_ms = statistics.median([*cell["ms"][ours], *cell["ms"].get(AGAIN, [])])
    options = {name: middle[name] for name in cell["allowed"]} | {ours: ours_ms}
    oracle = min(options, key=lambda name: options[name])
    static = [value for name, value in options.items() if name == "local" or name.startswith("input jpeg")]
    rivals = {label: (ours_ms if cell["takes"][label] == ours else middle[cell["takes"][label]])
              for label in (DADS, AUTO_SPLIT) if cell["takes"][label] in middle}  # fmt: skip
    learnt = [options.get(one["takes"]) for one in cell["learnt"]]
    known = [value for value in learnt if value is not None]
    return Judged(
        cell, ours, ours_ms, oracle, options[oracle], min(static), rivals, abs(again / middle[ours] - 1),
        statistics.fmean(known) if len(known) == len(learnt) and known else None,
    )  # fmt: skip


def share_at(values: Sequence[float], share: float) -> float:
    """Return the value that a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1 if share else 0)]


def geomean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def middle_ms(cell: Cell, wanted: Callable[[str], bool]) -> float | None:
    """Return the fastest median among the arms whose name is wanted."""
    found = [statistics.median(values) for name, values in cell["ms"].items() if values and wanted(name)]
    return min(found, default=None)


def json_slower(cell: Cell) -> float | None:
    """Return how many times longer than our choice the input takes as JSON lists, both ways; None where it was not sent so."""
    return statistics.median(cell["json_ms"]) / judge(cell).ours_ms if cell["json_ms"] else None


def json_ratio(cell: Cell) -> float | None:
    """Return how many times more bytes the input takes as JSON lists than what our choice sends; None where it sends nothing."""
    sent = cell["bytes"].get(cell["takes"][OUR_CHOICE], 0)
    return cell["json_bytes"] / sent if sent else None
