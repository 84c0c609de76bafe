"""How fast a tail is here: the best batch per cut, measured when a plan is loaded, and the fastest run of everything.

On one CPU thread a batch takes as long per item as its items one by one, so the answer is usually one; a machine with
more threads or an accelerator measures something else. Nothing is assumed: sizes are timed interleaved, in bounded time.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skills.codec import DTYPES
from skills.coding import Live
from skills.errors import FormatError
from skills.split_plan import Cut, Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from skills.ort import Chain

    Arrays = Mapping[str, NDArray[Any]]

BATCHES = (1, 2, 4, 8)
LEAST_ROUNDS = 5
MOST_ROUNDS = 15
WORTHWHILE = 0.9  # a batch must take at most this share of the time per item: less is noise
FASTER_STILL = 0.8  # a real input may run faster than any before it: nothing is given up that this share would save
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Batching:
    """How many requests of a cut run as one, the measured milliseconds of a whole batch by its size, and why."""

    max_batch: int = 1
    batch_ms: Mapping[int, float] = dataclasses.field(default_factory=dict)
    why: str = "not measured"


class Pace:
    """What is known of one loaded plan's speed. Written by the thread that measures and the one that computes."""

    def __init__(self, segments: int) -> None:
        self.batching: Mapping[int, Batching] = {}  # by the number of segments on the device; replaced whole
        self._fastest_s = [float("inf")] * segments
        self._fastest_joined_s: dict[int, float] = {}

    def ran(self, segment: int, seconds: float, upto: int) -> None:
        """Remember a run of one request through `segment`, or through all from there on as one: up to before `upto`."""
        if upto == segment + 1:
            self._fastest_s[segment] = min(self._fastest_s[segment], seconds)
        else:
            self._fastest_joined_s[segment] = min(self._fastest_joined_s.get(segment, seconds), seconds)

    def least_s(self, after: int) -> float:
        """Return a time that segments `after`… have never needed less than; nought for what has not run yet."""
        apart = sum(one for one in self._fastest_s[after:] if one != float("inf"))
        return min(apart, self._fastest_joined_s.get(after, apart)) * FASTER_STILL

    def how_many(self, after: int, waiting: int, left_s: float) -> int:
        """Return how many of `waiting` requests to run as one, such that the first, with `left_s` to go, is in time."""
        known = self.batching.get(after, Batching())
        sizes = [size for size in known.batch_ms if size <= min(known.max_batch, waiting)]
        return max((size for size in sizes if known.batch_ms[size] / 1e3 <= left_s), default=1)


def measure(
    plan: Plan,
    chain: "Chain",
    pace: Pace,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
    run: "Callable[[int, Arrays], Arrays] | None" = None,
) -> None:
    """Find the batch size of every cut in about `budget_s`, and how fast each segment is.

    `run` runs all behind so many segments as it is done for requests; without it, one segment after the other.
    """
    import numpy as np

    cuts = {cut.after: cut for cut in plan.cuts if cut.after < len(plan.segments)}
    found: dict[int, Batching] = {}
    until = clock() + budget_s
    for done, (after, cut) in enumerate(sorted(cuts.items())):
        share = max(0.0, until - clock()) / (len(cuts) - done)
        try:
            items = [example(plan, chain, after, np.random.default_rng(seed)) for seed in range(max(BATCHES))]
            _time_segments(chain, pace, items[0], after, clock)
            rest = functools.partial(chain.run, start=after) if run is None else functools.partial(run, after)
            found[after] = _batching(plan, cut, rest, items, share, clock)
        except FormatError as error:
            found[after] = Batching(why=f"not measured: {error}")
    pace.batching = found


def stacked(items: Sequence["Arrays"]) -> "Arrays":
    """Return several requests as one batch, in order."""
    import numpy as np

    return items[0] if len(items) == 1 else {name: np.concatenate([one[name] for one in items]) for name in items[0]}


def may_stack(plan: Plan, tensors: Sequence[Live]) -> bool:
    """Say whether the first size, and no other, of all that goes in and comes out is free: only then can requests run as one.

    With another one free, two requests of one size would prove nothing for those of the next.
    """
    ends = all(live.shape[:1] == (-1,) and -1 not in live.shape[1:] for live in (*tensors, *plan.outputs))
    return ends and all(live.shape[:1] == (-1,) for live in plan.inputs)


def _batching(
    plan: Plan,
    cut: Cut,
    run: "Callable[[Arrays], Arrays]",
    items: Sequence["Arrays"],
    budget_s: float,
    clock: Callable[[], float],
) -> Batching:
    if not may_stack(plan, tuple(plan.inputs) if cut.after == 0 else cut.tensors):
        return Batching(why="the first size of its tensors is fixed, or another one is free")
    if not _same_answers(run, items[:2]):
        return Batching(why="two requests as one do not answer as two alone")
    began = clock()
    run(items[0])
    one_s = clock() - began
    sizes = [size for size in BATCHES if one_s * sum(BATCHES[: BATCHES.index(size) + 1]) * LEAST_ROUNDS <= budget_s]
    if len(sizes) < 2:
        return Batching(why=f"one request takes {one_s * 1e3:.0f} ms, too long to try batches at start-up")
    batches = {size: stacked(items[:size]) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    until = clock() + budget_s
    for at in range(MOST_ROUNDS):
        if at >= LEAST_ROUNDS and clock() > until:
            break
        turn = at % len(sizes)
        for size in sizes[turn:] + sizes[:turn]:
            began = clock()
            run(batches[size])
            times[size].append((clock() - began) * 1e3)
    middle = {size: sorted(taken)[len(taken) // 2] for size, taken in times.items()}
    fastest = {size: min(taken) for size, taken in times.items()}
    best = min(sizes, key=lambda size: middle[size] / size)
    # Both must say so: on a busy machine the middle of a few runs alone finds gains that are none.
    if any(taken[best] / best > WORTHWHILE * taken[1] for taken in (middle, fastest)):
        return Batching(1, middle, "batches save less than a tenth")
    return Batching(best, middle, f"{best} as one save {1 - middle[best] / best / middle[1]:.0%} of the time per item")


def _same_answers(run: "Callable[[Arrays], Arrays]", pair: Sequence["Arrays"]) -> bool:
    import numpy as np

    try:
        both = run(stacked(pair))
    except FormatError:
        return False  # a size is baked into the graph
    ones = [run(one) for one in pair]
    if any(one.keys() != both.keys() for one in ones):
        return False
    if any(array.shape[:1] != (1,) for one in (*pair, *ones) for array in one.values()):
        return False  # what comes first there is no request
    return alike(both, {name: np.concatenate([one[name] for one in ones]) for name in both}, TOLERANCE)


def alike(found: "Arrays", expected: "Arrays", tolerance: float) -> bool:
    """Say whether two answers are the same: floats within a share of their largest value, everything else exactly."""
    import numpy as np

    if found.keys() != expected.keys():
        return False
    for name, array in expected.items():
        if found[name].shape != array.shape:
            return False
        if array.dtype.kind != "f":
            if not np.array_equal(found[name], array):
                return False
            continue
        reach = tolerance * max(1.0, float(np.abs(array.astype(np.float64)).max(initial=0.0)))
        if not np.allclose(found[name], array, rtol=tolerance, atol=reach, equal_nan=True):
            return False
    return True


def _time_segments(chain: "Chain", pace: Pace, values: "Arrays", after: int, clock: Callable[[], float]) -> None:
    for at in range(after, len(chain.sessions)):
        began = clock()
        values = chain.run(values, at, at + 1)
        pace.ran(at, clock() - began, at + 1)


def example(plan: Plan, chain: "Chain", after: int, random: "np.random.Generator") -> "Arrays":
    """Return one made-up request as it is behind `after` segments."""
    import numpy as np

    feeds: dict[str, NDArray[Any]] = {}
    for live in plan.inputs:
        shape, dtype = [1 if size == -1 else size for size in live.shape], np.dtype(DTYPES[live.dtype])
        if dtype.kind == "f":
            feeds[live.name] = random.standard_normal(shape).astype(dtype)
        else:
            feeds[live.name] = random.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    return chain.run(feeds, 0, after) if after else feeds
