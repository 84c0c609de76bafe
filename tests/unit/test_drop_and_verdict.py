import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure import Drop, divergence, paired_drop, soft_drop, verdict
from compress.passes.bits import most_that_pass, order
from compress.scheme import Layer, Range
from compress.statistics import BINS, Histogram

MARKS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)


@given(MARKS)
def test_the_interval_contains_the_measured_drop(pairs: list[tuple[bool, bool]]) -> None:
    before, after = np.array(pairs, np.float64).T
    drop = paired_drop(before, after)
    assert drop.lo <= drop.points <= drop.hi
    assert drop.points == pytest.approx((before.mean() - after.mean()) * 100)


def test_no_change_in_few_samples_still_leaves_doubt() -> None:
    same = np.ones(50)
    assert paired_drop(same, same).hi > 1.0
    assert paired_drop(np.ones(2000), np.ones(2000)).hi < 0.2


def test_a_verdict_is_proven_only_when_the_worse_end_is_inside_the_budget() -> None:
    assert verdict(Drop(0.2, -0.3, 0.9, 100), 1.0) == "proven"
    assert verdict(Drop(0.2, -0.3, 1.1, 100), 1.0) == "within_budget_unproven"
    assert verdict(Drop(1.2, 0.3, 2.1, 100), 1.0) == "not_reached"


def test_equal_answers_are_at_no_distance() -> None:
    scores = np.random.default_rng(0).standard_normal((20, 5))
    assert divergence(scores, scores) == pytest.approx(0)
    assert soft_drop(scores, scores) == 0
    assert divergence(scores, scores[::-1]) > 0.1


def test_a_changed_answer_costs_what_the_original_thought_of_it() -> None:
    original = np.log(np.array([[0.9, 0.1], [0.6, 0.4]]))
    changed = original[:, ::-1]
    assert soft_drop(original, changed) == pytest.approx(100 * (0.8 + 0.2) / 2)


@given(st.integers(0, 60), st.integers(0, 60))
def test_bisection_finds_the_last_count_that_passes(count: int, limit: int) -> None:
    assert most_that_pass(count, lambda k: k <= limit) == min(count, limit)


def test_layers_with_little_harm_a_weight_come_first() -> None:
    big, small = Layer("big", "Conv", "w", 0, (64, 64, 3, 3)), Layer("small", "Conv", "v", 0, (4, 4, 1, 1))
    assert order([small, big], {"big": 0.1, "small": 0.1}) == ["big", "small"]


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=30), min_size=1, max_size=8))
def test_a_growing_histogram_counts_every_value_once(batches: list[list[float]]) -> None:
    histogram = Histogram()
    for batch in batches:
        histogram.add(np.array(batch))
    assert histogram.counts.sum() == sum(len(batch) for batch in batches)
    assert len(histogram.counts) == BINS
    assert histogram.lo <= histogram.least <= histogram.most <= histogram.hi


@given(st.floats(-50, 0), st.floats(0, 50))
def test_zero_is_represented_exactly(lo: float, hi: float) -> None:
    scale, zero = Range(lo, hi).quant("u8")
    assert 0 <= zero <= 255
    assert scale > 0
    assert Range(lo, hi).quant("s8")[1] == zero - 128


def test_a_range_without_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must contain zero"):
        Range(1.0, 2.0)
