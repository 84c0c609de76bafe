"""Which networks are trained, in which order and for how long. Pure.

Each rung keeps less of the network and stores it in fewer bits than the one before, and starts from its weights, so
training is never thrown away. A longer time budget buys more steps on each rung, and rungs that failed are trained again
before smaller ones are tried.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

BATCH = 128
LEAST_STEPS = 60  # fewer teach nothing
MOST_EPOCHS = 150  # more than that on one rung has not been seen to help
SPENT = 0.92  # of the time that is left goes into training, the rest into measuring


@dataclasses.dataclass(frozen=True, slots=True)
class Rung:
    """How much of the network's cost is kept, and how many bits a weight takes on average."""

    kept: float
    bits: float


Onward = Literal["smaller", "again", "stop"]

RUNGS = (Rung(0.78, 3.2), Rung(0.68, 3.0), Rung(0.58, 2.85), Rung(0.48, 2.7))
SHARES = (0.35, 0.30, 0.20, 0.15)  # of the time, for one training after the other, whichever rung it is of
# Times the budget lost on select. Select is cut out of what the original was trained on, which it knows by heart: ResNets on
# CIFAR lost 2.8 to 3.5 points there and 0.2 to 0.5 on unseen images, 4.2 to 4.7 and 0.8 to 1.4, 5.0 to 6.1 and 1.3 to 2.9.
HOPEFUL = 4.5  # up to here the next rung may be within the budget
HOPELESS = 8.0  # beyond it, nothing behind this rung will be
IMPROVED = 0.85  # training again must lose at most this share of what was lost before to be done once more


def rungs(goal: str, widths: tuple[float, ...]) -> tuple[Rung, ...]:
    """Return the rungs to climb: with `latency` as goal, or a target without narrow widths, weights stay in 8 bits."""
    narrow = goal != "latency" and min(widths) < 8
    return tuple(rung if narrow else dataclasses.replace(rung, bits=8.0) for rung in RUNGS)


def onward(lost: Sequence[float], budget: float) -> Onward:
    """Return what to train next; `lost` has the points that each training of the present rung so far lost on select.

    What training again does not improve is as good as this rung gets, and how much of it is only that the original knows
    select by heart cannot be told: then the next rung is tried, unless too much is lost for that.
    """
    if not lost or lost[-1] <= HOPEFUL * budget:
        return "smaller"
    if len(lost) == 1 or lost[-1] < IMPROVED * lost[-2]:
        return "again"
    return "smaller" if lost[-1] <= HOPELESS * budget else "stop"


def batch(samples: int) -> int:
    """Return how many samples one step sees: fewer where there are few."""
    return max(16, min(BATCH, samples // 16))


def steps(at: int, left_s: float, step_s: float, samples: int) -> int:
    """Return how many steps training number `at` takes, 0 if the time is too short to be of use.

    `left_s` is what is left for it and those behind it; the count is
    rounded down to two leading binary digits: two runs whose steps take about as long then make the same plan.
    """
    share = SHARES[at] / sum(SHARES[at:])
    each = max(1, samples // batch(samples))
    count = int(min(SPENT * share * left_s / max(step_s, 1e-6), MOST_EPOCHS * each))
    if count < LEAST_STEPS:
        return 0
    grain = 1 << max(0, count.bit_length() - 2)
    return count // grain * grain


def assign(
    weights: Mapping[str, int], harm: Mapping[str, Mapping[float, float]], widths: tuple[float, ...], bits: float
) -> dict[str, float]:
    """Return a width for each layer so that a weight takes at most `bits` on average and the harm's sum is small.

    `weights` counts each layer's weights; `harm` says what a width alone costs a layer (8 bits cost nothing; a width that
    was not measured is not used). From 8 bits down, the step that does least harm for the bits it saves goes first.
    """
    now = dict.fromkeys(weights, 8.0)
    total = sum(weights.values())
    used = 8.0 * total
    while used > bits * total:
        best: tuple[float, str, float] | None = None
        for name, width in now.items():
            known = harm.get(name, {})
            for lower in widths:
                if lower >= width or lower not in known:
                    continue
                worse = max(known[lower] - (known.get(width, 0.0) if width < 8 else 0.0), 1e-9)
                rate = worse / ((width - lower) * weights[name])
                if best is None or (rate, name, lower) < best:
                    best = rate, name, lower
        if best is None:
            break
        _, name, lower = best
        used -= (now[name] - lower) * weights[name]
        now[name] = lower
    return now
