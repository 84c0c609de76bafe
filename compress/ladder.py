"""Which networks are trained, in which order and for how long. Pure.

Each rung keeps less of the network and stores it in fewer bits than the one before, and starts from its weights, so
training is never thrown away. A longer time budget buys more steps on each rung.
"""

import dataclasses
from collections.abc import Mapping

BATCH = 128
LEAST_STEPS = 60  # fewer teach nothing
MOST_EPOCHS = 150  # more than that on one rung has not been seen to help
SPENT = 0.92  # of the time that is left goes into training, the rest into measuring


@dataclasses.dataclass(frozen=True, slots=True)
class Rung:
    """How much of the network's cost is kept, and how many bits a weight takes on average."""

    kept: float
    bits: float


RUNGS = (Rung(0.78, 2.9), Rung(0.7, 2.8), Rung(0.6, 2.7), Rung(0.5, 2.6))
SHARES = (0.35, 0.30, 0.20, 0.15)  # of the time, for one rung after the other
# Times the budget lost on select. Select is cut out of what the original was trained on, which it knows by heart: ResNets on
# CIFAR lost 2.8 to 4.5 points there and 0.2 to 0.5 on unseen images, 4.2 to 5.2 and 0.8 to 1.4, 5.0 to 6.1 and 1.3 to 2.9.
HOPEFUL = 4.5  # up to here a network may be within the budget
HOPELESS = 8.0  # beyond it, nothing behind this rung will be


def rungs(goal: str, widths: tuple[float, ...]) -> tuple[Rung, ...]:
    """Return the rungs to climb: with `latency` as goal, or a target without narrow widths, weights stay in 8 bits."""
    narrow = goal != "latency" and min(widths) < 8
    return tuple(rung if narrow else dataclasses.replace(rung, bits=8.0) for rung in RUNGS)


def worthwhile(lost: float | None, budget: float) -> bool:
    """Say whether a smaller network is worth training; `lost` is what the last one lost on select, if that is known."""
    return lost is None or lost <= HOPELESS * budget


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
