import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compress.measure import Drop, divergence, foretold, paired_drop, verdict
from compress.passes.bits import score_noise, temperature
from compress.scheme import Range
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
    assert divergence(scores, scores, classes=True) == pytest.approx(0)
    assert not foretold(scores, scores).any()
    assert divergence(scores, scores[::-1], classes=True) > 0.1


def test_numbers_that_are_no_class_scores_are_apart_where_all_of_a_row_moved_alike() -> None:
    boxes = np.random.default_rng(0).standard_normal((20, 4))
    assert divergence(boxes, boxes + 1, classes=True) == pytest.approx(0)
    assert divergence(boxes, boxes + 1, classes=False) == pytest.approx(1 / boxes.var())


def test_a_changed_answer_costs_what_the_original_thought_of_it() -> None:
    original = np.log(np.array([[0.9, 0.1], [0.6, 0.4]]))
    changed = original[:, ::-1]
    assert foretold(original, changed) == pytest.approx([80, 20])


def test_an_original_that_is_surer_than_right_is_cooled_and_one_too_unsure_is_heated() -> None:
    chance = np.random.default_rng(0)
    log_odds = chance.standard_normal((4000, 5)) * 2
    odds = np.exp(log_odds) / np.exp(log_odds).sum(axis=1, keepdims=True)
    labels = (odds.cumsum(axis=1) < chance.random((4000, 1))).sum(axis=1)
    assert temperature(log_odds, labels) == pytest.approx(1, abs=0.1)
    assert temperature(3 * log_odds, labels) == pytest.approx(3, abs=0.3)
    assert temperature(log_odds / 2, labels) == pytest.approx(0.5, abs=0.05)


def test_noise_on_the_scores_is_measured_against_their_variance() -> None:
    scores = np.random.default_rng(0).standard_normal((2000, 10))
    noise = np.random.default_rng(1).standard_normal((2000, 10))
    assert score_noise(scores, scores + 7) == pytest.approx(0)
    assert score_noise(scores, scores + 0.1 * noise) == pytest.approx(0.01, rel=0.1)


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=30), min_size=1, max_size=8))
def test_a_growing_histogram_counts_every_value_once(batches: list[list[float]]) -> None:
    histogram = Histogram()
    for batch in batches:
        histogram.add(np.array(batch))
    assert histogram.counts.sum() == sum(len(batch) for batch in batches)
    assert len(histogram.counts) == BINS
    assert histogram.lo <= histogram.least <= histogram.most <= histogram.hi


@given(st.floats(-50, 0), st.floats(0, 50))
@example(-0.0010667870456574577, 0.0)  # its scale is one that 16 bits hold with few digits
def test_zero_is_represented_exactly(lo: float, hi: float) -> None:
    scale, zero = Range(lo, hi).quant("u8")
    assert 0 <= zero <= 255
    assert scale > 0
    assert Range(lo, hi).quant("s8")[1] == zero - 128


def test_a_range_without_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must contain zero"):
        Range(1.0, 2.0)
