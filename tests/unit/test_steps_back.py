"""What the search for stored bits offers to fall back to, between all in 8 bits and the smallest that is foreseen to do."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from compress.knapsack import Choice, Option
from compress.passes.bits import Search, on_the_way, steps_back
from compress.scheme import Candidate

PLAIN = 32_000
BEST = 8_000


def one(size: int, drop: float = 0.1) -> Candidate:
    return Candidate(size, 0.0, drop, size)  # type: ignore[arg-type]  # what stands for the scheme is its size


@pytest.mark.parametrize(
    ("between", "offered"),
    [
        ([], ()),
        ([16_000], (16_000,)),
        ([30_000, 17_000, 9_000, 8_500], (17_000, 8_500)),
        (
            [PLAIN, 40_000, BEST, 7_000],
            (),
        ),  # a file may be larger than all in 8 bits: its forms of packing have a size, too
    ],
)
def test_the_middle_and_the_next_to_the_best_are_offered(between: list[int], offered: tuple[int, ...]) -> None:
    assert steps_back([one(size) for size in between], one(BEST), one(PLAIN)) == offered


def test_the_way_is_measured_by_the_logarithm_of_the_size() -> None:
    assert on_the_way(one(16_000), one(BEST), one(PLAIN)) == pytest.approx(0.5)
    assert on_the_way(one(BEST), one(BEST), one(BEST)) == 0


class Scripted(Search):
    """A search whose choices, the largest first, come out as told: (bytes, foreseen drop). It looks near the 28th first."""

    def __init__(self, told: list[tuple[int, float]], left: float = math.inf) -> None:
        self.told, self.start, self.tried, self.took, self.cut_short = told, None, [], 1.0, False  # type: ignore[assignment]
        self.bench: Any = SimpleNamespace(max_drop=1.0, left=lambda: left)

    def measure(self) -> bool:
        return True

    def judge(self, scheme: Any) -> Candidate:
        return one(*self.told[0])

    def options(self) -> list[list[Option]]:
        return [[Option(size, 0.0006 * at) for at, (size, _) in enumerate(self.told)]]

    def rebuilt(self, choice: Choice, at: float) -> Candidate:
        self.tried.append(one(*self.told[choice.picks[0]]))
        return self.tried[-1]


def told(fits: int, drop_of_the_middle: float = 0.2) -> list[tuple[int, float]]:
    """Forty choices, each 5 % smaller; the first `fits` are foreseen to do, but for some of those in the middle."""
    sizes = [round(PLAIN * 0.95**at) for at in range(40)]
    middle = range(fits // 4, fits * 3 // 4)
    return [(size, 9.0 if at >= fits else drop_of_the_middle if at in middle else 0.2) for at, size in enumerate(sizes)]


def test_one_in_the_middle_is_built_where_the_search_tried_none() -> None:
    search = Scripted(told(30))
    best, safer, _ = search.run()
    assert best == told(30)[29][0]
    assert any(0.25 <= on_the_way(one(size), one(best), one(PLAIN)) <= 0.75 for size in safer)  # type: ignore[arg-type]
    assert list(safer) == sorted(safer, reverse=True)  # type: ignore[type-var]


def test_one_in_the_middle_that_is_not_foreseen_to_do_is_not_offered() -> None:
    _, safer, _ = Scripted(told(30, drop_of_the_middle=0.7)).run()
    assert not [size for size in safer if dict(told(30, 0.7))[size] > 0.5]  # type: ignore[index]


def test_nothing_is_built_where_all_in_8_bits_is_the_best_or_the_time_is_spent() -> None:
    best, safer, bolder = Scripted(told(1)).run()
    assert (best, safer, bolder) == (PLAIN, (), ())
    search = Scripted(told(30), left=0.5)
    assert search.run()[1] == ()
    assert (search.tried, search.cut_short) == ([one(PLAIN, 0.2)], True)
