"""Which of several candidates is the result, and which are shown beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.conclude import front
from compress.judge import Emitted, Judged, result
from compress.measure import Drop
from compress.pipeline import State

NOTHING: Any = None
BUDGET = 1.0
DROPS = st.lists(st.floats(-5, 5), max_size=5)


def judged(points: float, size: int = 1) -> Judged:
    emitted = Emitted("one", State(None), bytes(size), NOTHING, None, 0.0)
    return Judged(emitted, np.zeros(1), Drop(points, points - 1, points + 1, 10))


def last_before_the_first_over(family: Sequence[Judged]) -> Judged | None:
    within = None
    for one in family:
        if one.drop.points > BUDGET:
            return within
        within = one
    return within


@settings(deadline=None)
@given(st.lists(DROPS, min_size=1, max_size=3).filter(any))
def test_the_result_is_the_last_in_its_family_before_any_went_over_the_budget(drops: list[list[float]]) -> None:
    families = [[judged(points) for points in family] for family in drops]
    found = result(families, BUDGET)
    reached = [one for one in map(last_before_the_first_over, families) if one is not None]
    if reached:
        assert found is reached[-1]
    else:
        assert found.drop.points == min(min(family) for family in drops if family)


@settings(deadline=None)
@given(DROPS.filter(bool), st.floats(-5, 5))
def test_what_follows_a_failure_never_counts(drops: list[float], lucky: float) -> None:
    family = [judged(points) for points in (*drops, BUDGET + 0.1, lucky)]
    assert result([family], BUDGET) is not family[-1] or lucky <= min(drops)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(-3, 3)), min_size=1, max_size=8), st.data())
def test_no_point_of_the_front_is_beaten_and_the_chosen_one_is_always_there(
    points: list[tuple[int, int]], data: st.DataObject
) -> None:
    everyone = [judged(drop, size) for size, drop in points]
    chosen = data.draw(st.sampled_from(everyone))
    shown = front(everyone, chosen)
    assert any(one is chosen for one in shown)
    for one in shown:
        beaten = [
            other
            for other in everyone
            if len(other.emitted.file) <= len(one.emitted.file)
            and other.drop.points <= one.drop.points
            and (len(other.emitted.file) < len(one.emitted.file) or other.drop.points < one.drop.points)
        ]
        assert one is chosen or not beaten
    sizes = [len(one.emitted.file) for one in shown]
    assert sizes == sorted(sizes, reverse=True)
