"""Which of several candidates is the result, and which are shown beside it."""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.conclude import _point, front
from compress.data import Part
from compress.judge import Emitted, Judged, doubted, doubts, look, result, verdict, walked
from compress.measure import Drop
from compress.metrics import Metric
from compress.pipeline import State
from skills.ort import Port, Timing

NOTHING: Any = None
BUDGET = 1.0
DROPS = st.lists(st.floats(-5, 5), max_size=5)
CANDIDATES = st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), max_size=5)


def judged(points: float, size: int = 1, doubt: float = 1.0, pooled: float | None = None, inputs: int = 1000) -> Judged:
    emitted = Emitted("one", State(None), bytes(size), NOTHING, None, 0.0)
    together = points if pooled is None else pooled
    return Judged(emitted, np.zeros(1), Drop(points, points - doubt, points + doubt, 10), together, inputs)


def last_before_the_first_clearly_over(family: Sequence[Judged]) -> Judged | None:
    within = None
    for one in family:
        if one.drop.points > 1.5 * BUDGET or one.drop.lo > BUDGET:
            return within
        if one.drop.points <= BUDGET:
            within = one
    return within


@settings(deadline=None)
@given(st.lists(CANDIDATES, min_size=1, max_size=3).filter(any))
def test_the_result_is_the_smallest_of_the_last_in_each_family_before_any_went_clearly_over_the_budget(
    rows: list[list[tuple[float, int]]],
) -> None:
    families = [[judged(points, size) for points, size in family] for family in rows]
    found = result(families, BUDGET)
    reached = [one for one in map(last_before_the_first_clearly_over, families) if one is not None]
    if reached:
        least = min(len(one.emitted.file) for one in reached)
        assert found is [one for one in reached if len(one.emitted.file) == least][-1]
    else:
        assert found.drop.points == min(min(family)[0] for family in rows if family)


@pytest.mark.parametrize(
    ("goal", "milliseconds", "wins"),
    [
        ("size", (9.0, 1.0), 0), ("latency", (9.0, 1.0), 1), ("latency", (1.0, 1.0), 1), ("both", (3.0, 2.0), 1),
        ("both", (1.0, 2.0), 0), ("latency", (), 0), ("both", (), 0),
    ],
)  # fmt: skip
def test_the_goal_decides_between_what_was_trained_and_what_was_not(
    goal: Any, milliseconds: tuple[float, ...], wins: int
) -> None:
    families = [[judged(0.0, 10)], [judged(0.0, 12)]]
    assert result(families, BUDGET, goal, milliseconds) is families[wins][0]


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 3)), max_size=5), min_size=1, max_size=2).filter(any))
def test_proof_stops_at_the_first_candidate_that_is_not_proven(rows: list[list[tuple[float, float]]]) -> None:
    families = [[judged(points, doubt=doubt) for points, doubt in family] for family in rows]
    chosen = result(families, BUDGET)
    before = walked(families, chosen)
    assert before[-1] is chosen
    proven = all(one.drop.hi <= BUDGET for one in before)
    assert (verdict(before, BUDGET) == "proven") is proven
    assert (verdict(before, BUDGET) == "not_reached") is (chosen.drop.points > BUDGET)
    assert verdict([judged(BUDGET, doubt=0.1), *before], BUDGET) != "proven"


@settings(deadline=None)
@given(DROPS.filter(bool), st.floats(-5, 5))
def test_what_follows_a_clear_failure_never_counts(drops: list[float], lucky: float) -> None:
    family = [judged(points) for points in (*drops, BUDGET + 0.6, lucky)]
    assert result([family], BUDGET) is not family[-1] or lucky <= min(drops)


@pytest.mark.parametrize(("pooled", "wins"), [(BUDGET, 2), (BUDGET + 0.1, 1)])
def test_what_only_the_report_part_flatters_is_passed_over_for_the_next_safer_one(pooled: float, wins: int) -> None:
    family = [judged(0.0, 9), judged(0.2, 8, pooled=0.4), judged(0.3, 7, pooled=pooled)]
    assert result([family], BUDGET) is family[wins]
    assert [doubted(one, BUDGET) for one in family] == [False, False, wins == 1]


@pytest.mark.parametrize("taken", [0, 1])
def test_only_what_was_passed_over_is_marked_as_such(taken: int) -> None:
    family = [judged(0.0, 9), judged(0.2, 8, pooled=BUDGET + 0.1)]
    times = {name: Timing(1.0, 1.0, 1.0, 9) for name in ("after", "one")}
    points = [_point(one, family[taken], times, at, BUDGET) for at, one in enumerate(family)]
    assert [point.over for point in points] == [None, None if taken else BUDGET + 0.1]


@pytest.mark.parametrize(("wrong", "wins"), [(1, 1), (2, 0)])
def test_one_wrong_input_on_select_dismisses_nothing_and_two_do(wrong: int, wins: int) -> None:
    family = [judged(0.0, 9, pooled=0.0, inputs=80), judged(0.0, 7, pooled=100 * wrong / 80, inputs=80)]
    assert result([family], BUDGET) is family[wins]


@pytest.mark.parametrize(
    ("rows", "wins"),
    [
        ([(0.0, 9, 2.5), (0.0, 8, 3.75), (0.0, 7, 5.0)], 0), ([(0.0, 9, 2.5), (0.0, 8, 2.5)], 1),
        ([(0.0, 9, 5.0), (2.5, 9, 2.5)], 1), ([(2.5, 9, 5.0), (3.0, 9, 3.0)], 1),
    ],
)  # fmt: skip
def test_where_nothing_keeps_the_budget_on_both_the_worse_of_the_two_drops_decides_and_then_the_size(
    rows: list[tuple[float, int, float]], wins: int
) -> None:
    family = [judged(points, size, doubt=9, pooled=pooled, inputs=80) for points, size, pooled in rows]
    assert result([family], BUDGET) is family[wins]


def test_a_result_over_the_budget_on_all_parts_together_is_said_with_both_numbers() -> None:
    flattered, passed = judged(0.5, 8, pooled=3.75, inputs=80), judged(0.5, 7, pooled=5.0, inputs=80)
    (said,) = doubts([flattered, passed], flattered, BUDGET, "percentage points")
    assert "loses 0.50 percentage points" in said
    assert "loses 3.75, over the budget of 1." in said
    sound = judged(0.5, 9)
    (said,) = doubts([sound, passed], sound, BUDGET, "percentage points")
    assert said.startswith("1 smaller file is within the budget on the report part but not on all parts of the data")
    assert doubts([sound, passed], passed, BUDGET, "points") != doubts([sound], sound, BUDGET, "points") == ()


@pytest.mark.parametrize(("sizes", "pooled"), [((), 10.0), ((10,), 5.0), ((4, 6), 5.0)])
def test_other_parts_count_by_their_inputs_where_they_say_the_same(sizes: tuple[int, ...], pooled: float) -> None:
    y = np.arange(10) % 2
    right = np.eye(2, dtype=np.float32)[y]
    given_x = right.copy()
    given_x[0] = given_x[0, ::-1]  # the file passes its input on, so it is wrong once

    class Passing:
        inputs = outputs = (Port("x", "float32", (-1, 2)),)

        def run(self, feed: Any, _names: Any) -> Any:
            return feed

    metric = Metric("top1", lambda out, part, _: ((out.argmax(axis=1) == part.y).astype(np.float64),))
    original: Any = types.SimpleNamespace(metric=metric, report=right)
    runner: Any = Passing()
    emitted = Emitted("one", State(None), b"", runner, None, 50.0)
    more = [(Part(right[:size], y[:size], np.arange(size), "x"), right[:size]) for size in sizes]
    found = look(emitted, Part(given_x, y, np.arange(10), "x"), original, more)
    assert (found.drop.points, found.pooled) == pytest.approx((10.0, pooled))


@pytest.mark.parametrize(("doubt", "wins"), [(0.8, 2), (0.05, 0)])
def test_one_that_misses_by_chance_ends_no_walk_and_leaves_nothing_proven(doubt: float, wins: int) -> None:
    family = [judged(0.1, doubt=0.1), judged(BUDGET + 0.1, doubt=doubt), judged(0.2, doubt=0.1)]
    chosen = result([family], BUDGET)
    assert chosen is family[wins]
    assert verdict(walked([family], chosen), BUDGET) == ("within_budget_unproven" if wins else "proven")


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
    places = [(len(one.emitted.file), one.drop.points) for one in shown]
    assert len(places) == len(set(places))
    sizes = [len(one.emitted.file) for one in shown]
    assert sizes == sorted(sizes, reverse=True)
