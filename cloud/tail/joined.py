"""What is behind a cut as one graph again, where that is faster and soon done.

Segments are there so that late work can be dropped between them, and each costs: the runtime neither fuses nor keeps its
own layout of channels across a cut (EfficientNet-Lite0 in seven segments takes a tenth longer than as one). Measured when
a plan is loaded, in turns, like everything else about a tail.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloud.tail.pace import alike, example
from skills.errors import FormatError
from skills.split_plan import Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from skills.ort import Chain

    Arrays = Mapping[str, NDArray[Any]]

LONGEST_S = 0.05  # what takes longer stays in segments: so long at most late work holds up what is in time
SIZES = 2.0  # times the plan's own bytes that its joined graphs may take together, the shallowest cuts first
MOST_BYTES = 1 << 28  # nothing larger is done in that time
LEAST_ROUNDS, MOST_ROUNDS = 5, 15
GAINED = 0.98  # of the segments' time that a joined graph may take: less is noise
TOLERANCE = 1e-4  # other fusions round otherwise
EXACT_TRIALS = 5  # made-up requests that must come out bit for bit alike where whole numbers cross every cut


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """All that is behind a cut as one graph, and for how many values at once that is known to be soon done."""

    chain: "Chain"
    most_values: float

    def soon(self, values: "Arrays") -> bool:
        """Say whether a request of this size is done in `LONGEST_S`, as its time grows with its size."""
        return sum(array.size for array in values.values()) <= self.most_values


def through(chain: "Chain", whole: Joined | None, after: int, values: "Arrays") -> "Arrays":
    """Run all that is behind `after` segments: as one graph where there is one and it is soon done."""
    return whole.chain.run(values) if whole is not None and whole.soon(values) else chain.run(values, after)


def joined(
    plan: Plan,
    chain: "Chain",
    join: "Callable[[int], Chain]",
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, Joined]:
    """Return the joined graphs to use, by how many segments are on the device.

    `join` makes one, and raises FormatError where that is not to be had. A model that is cut at its codes must come out of it
    bit for bit, as it does of its segments.
    """
    import numpy as np

    found: dict[int, Joined] = {}
    crossing = [live.dtype for cut in plan.cuts if 0 < cut.after < len(plan.segments) for live in cut.tensors]
    exact = bool(crossing) and not any(dtype.startswith("FP") for dtype in crossing)
    room = SIZES * sum(segment.bytes for segment in plan.segments)
    until = clock() + budget_s
    for after in sorted({cut.after for cut in plan.cuts if cut.after < len(plan.segments) - 1}):
        size = sum(segment.bytes for segment in plan.segments[after:])
        if size > min(room, MOST_BYTES):
            continue
        if clock() > until:
            break
        try:
            values = example(plan, chain, after, np.random.default_rng(0))
            began = clock()
            right = chain.run(values, after)
            if clock() - began > 2 * LONGEST_S:
                continue  # not even loaded: it may be very large
            whole = join(after)
            if not alike(whole.run(values), right, 0.0 if exact else TOLERANCE):
                continue
            more = (example(plan, chain, after, np.random.default_rng(seed)) for seed in range(1, EXACT_TRIALS))
            if exact and not all(alike(whole.run(one), chain.run(one, after), 0.0) for one in more):
                continue
            took = _pays(chain, whole, after, values, until, clock)
            if took is not None:
                found[after] = Joined(whole, sum(array.size for array in values.values()) * LONGEST_S / max(took, 1e-6))
                room -= size
        except FormatError:
            continue  # it cannot be joined, or does not take what was made up: it runs in segments
    return found


def _pays(
    chain: "Chain", whole: "Chain", after: int, values: "Arrays", until: float, clock: Callable[[], float]
) -> float | None:
    """Return how long the joined graph takes where that is soon enough and less than its segments do, else None."""
    apart, together = [], []
    for at in range(MOST_ROUNDS):
        if at >= LEAST_ROUNDS and clock() > until:
            break
        began = clock()
        chain.run(values, after)
        between = clock()
        whole.run(values)
        apart.append(between - began)
        together.append(clock() - between)
    one, all_of_it = (sorted(taken) for taken in (together, apart))
    middle = len(one) // 2
    pays = one[middle] <= LONGEST_S and one[middle] <= GAINED * all_of_it[middle] and one[0] <= GAINED * all_of_it[0]
    return one[middle] if pays else None  # both, as one of them alone finds gains on a busy machine that are none
