"""Choose one option for each layer so that their sizes sum to the least for what they harm in sum: a front, solved once.

This is the multiple-choice knapsack. Layers are added one after the other and only the choices that no other one beats in
both size and harm are kept (Nemhauser and Ullmann 1969), at most one for each step in size.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from compress.graph import Array

STEPS = 4096  # distinct sizes that are told apart


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One way to store a layer."""

    size: int
    harm: float


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A number of an option for every layer, and their sums."""

    size: int
    harm: float
    picks: tuple[int, ...]


def front(layers: Sequence[Sequence[Option]], steps: int = STEPS) -> tuple[Choice, ...]:
    """Return the choices that no other choice beats, the largest with the least harm first. Pure.

    Exact where the sizes span no more than `steps`; else sums are held apart by a `steps`-th of the span, and of those
    nearer together the least harmful is kept.
    """
    span = sum(max(o.size for o in options) - min(o.size for o in options) for options in layers)
    unit = max(1, span // steps)
    sizes, harms = np.zeros(1, np.int64), np.zeros(1)
    origins: list[tuple[Array, Array]] = []
    for options in layers:
        more, worse = np.array([o.size for o in options], np.int64), np.array([o.harm for o in options])
        all_sizes, all_harms = (sizes[:, None] + more).ravel(), (harms[:, None] + worse).ravel()
        rank = np.lexsort((all_sizes, all_harms, all_sizes // unit))
        first = np.ones(len(rank), bool)
        first[1:] = np.diff(all_sizes[rank] // unit) > 0
        rank = rank[first]
        lowest = np.minimum.accumulate(all_harms[rank])
        better = np.ones(len(rank), bool)
        better[1:] = all_harms[rank][1:] < lowest[:-1]
        rank = rank[better]
        sizes, harms = all_sizes[rank], all_harms[rank]
        origins.append((rank // len(options), rank % len(options)))
    return tuple(Choice(int(sizes[at]), float(harms[at]), _picks(origins, at)) for at in reversed(range(len(sizes))))


def _picks(origins: Sequence[tuple[Array, Array]], at: int) -> tuple[int, ...]:
    picks = []
    for parents, choices in reversed(origins):
        picks.append(int(choices[at]))
        at = int(parents[at])
    return tuple(reversed(picks))
