"""What the numbers say: whether our result beats the others by the rules that the table is read by. Pure."""

import dataclasses
from collections.abc import Sequence

BUDGET = 1.0  # points
ROUNDING = 1e-9
LEVEL_UNPRUNED, LEVEL_PRUNED = 0.97, 1.2  # of onnxruntime's tuned int8's speed
TUNED = "onnxruntime-tuned"


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A drop in points, positive is worse, with its paired 95 % interval."""

    points: float
    lo: float
    hi: float


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One measured file. `lost` is against the original; `beside_ours` against our result; `speed` is times the original's."""

    name: str
    title: str
    file: int
    package: int
    accuracy: float
    lost: Interval
    beside_ours: Interval | None = None
    speed: float | None = None
    p50_ms: float | None = None
    load_ms: float | None = None
    whole: float = 0.0
    notes: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Yes or no, and the numbers behind it; None where there is nothing to compare."""

    holds: bool | None
    because: str


def smallest(ours: Entry, baselines: Sequence[Entry]) -> Answer:
    """Say whether our file is smaller than each baseline that keeps the budget."""
    rivals = [item for item in baselines if item.lost.points <= BUDGET + ROUNDING]
    if not rivals:
        return Answer(None, f"no baseline stays within {BUDGET:g} point")
    best = min(rivals, key=lambda item: item.file)
    because = f"{ours.file:,} B against {best.file:,} B of {best.title}"
    if ours.lost.points > BUDGET + ROUNDING:
        return Answer(False, f"{because}, but ours loses {ours.lost.points:.2f} points")
    return Answer(ours.file < best.file, because)


def covered(beside: Sequence[tuple[Entry, Sequence[tuple[int, Interval]]]]) -> Answer:
    """Say whether our Pareto set holds, for each baseline, a point that is smaller and not significantly less accurate.

    `beside` gives for each baseline our points' bytes and how much worse than that baseline each point is.
    """
    if not beside:
        return Answer(None, "there is no baseline")
    said, every = [], True
    for baseline, points in beside:
        fitting = [(size, lost) for size, lost in points if size < baseline.file and lost.lo <= 0]
        every = every and bool(fitting)
        if fitting:
            size, lost = min(fitting, key=lambda item: item[0])
            said.append(
                f"{baseline.title}: {size:,} < {baseline.file:,} B, {lost.points:+.2f} ({lost.lo:+.2f} … {lost.hi:+.2f})"
            )
        else:
            said.append(f"{baseline.title} ({baseline.file:,} B): **none**")
    return Answer(every, "; ".join(said))


def fast_enough(ours: Entry, baselines: Sequence[Entry], *, pruned: bool) -> Answer:
    """Say whether our result keeps up with onnxruntime's tuned int8, and leads where pruning is allowed; never below float."""
    tuned = next((item for item in baselines if item.name == TUNED), None)
    if tuned is None or not tuned.speed or not ours.speed:
        return Answer(None, "onnxruntime's tuned int8 was not timed beside it")
    level = LEVEL_PRUNED if pruned else LEVEL_UNPRUNED
    ratio = ours.speed / tuned.speed
    return Answer(ratio >= level and ours.speed >= 1, f"{ratio:.2f}×, {ours.speed:.2f}× the float original's")
