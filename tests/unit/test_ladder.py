"""The plan of training: pure arithmetic on time, samples and widths."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import ladder
from compress.ladder import (
    HOPELESS,
    LEAST_STEPS,
    MOST_EPOCHS,
    RUNGS,
    SHARES,
    assign,
    batch,
    rungs,
    steps,
    worthwhile,
)

WIDTHS = (4, 3, 2)
LAYERS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10_000), min_size=1)
HARM = st.fixed_dictionaries({width: st.floats(0, 10) for width in WIDTHS})


def test_the_trainings_take_all_of_the_time_and_the_rungs_get_smaller() -> None:
    assert sum(SHARES) == pytest.approx(1)
    assert len(SHARES) >= len(RUNGS)
    for upper, lower in itertools.pairwise(RUNGS):
        assert lower.kept < upper.kept
        assert lower.bits <= upper.bits


def test_without_narrow_widths_or_for_latency_alone_weights_stay_in_8_bits() -> None:
    assert {rung.bits for rung in rungs("latency", (8, 4))} == {8}
    assert {rung.bits for rung in rungs("size", (8,))} == {8}
    assert rungs("both", (8, 4)) == RUNGS


def test_a_smaller_network_is_trained_until_one_lost_hopelessly_much() -> None:
    assert worthwhile(None, 1.0)  # its runtime refused it: nothing is known
    assert worthwhile(HOPELESS, 1.0)
    assert not worthwhile(HOPELESS + 0.1, 1.0)
    assert worthwhile(HOPELESS + 0.1, 2.0)


@settings(deadline=None)
@given(st.floats(0, 10_000), st.floats(1e-4, 100), st.integers(16, 100_000))
def test_the_steps_of_all_rungs_fit_into_the_time_that_is_left(left: float, step: float, samples: int) -> None:
    spent = 0.0
    for at in range(len(SHARES)):
        spent += steps(at, left - spent, step, samples) * step
    assert spent <= left


@settings(deadline=None)
@given(st.integers(0, len(SHARES) - 1), st.floats(0, 100_000), st.floats(1e-4, 10), st.integers(16, 100_000))
def test_steps_are_none_or_enough_with_two_leading_binary_digits(
    at: int, left: float, step: float, samples: int
) -> None:
    count = steps(at, left, step, samples)
    if count:
        assert LEAST_STEPS / 1.5 < count <= MOST_EPOCHS * max(1, samples // batch(samples))
        assert count % (1 << (count.bit_length() - 2)) == 0


@settings(deadline=None)
@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(1e-3, 1), st.integers(16, 5000))
def test_more_time_never_gives_fewer_steps(one: float, other: float, step: float, samples: int) -> None:
    few, many = (steps(0, left, step, samples) for left in sorted((one, other)))
    assert few <= many


@settings(deadline=None)
@given(st.integers(1, 10**6))
def test_a_batch_is_never_larger_than_usual_and_grows_with_the_samples(samples: int) -> None:
    assert 16 <= batch(samples) <= batch(samples + 1) <= ladder.BATCH


@settings(deadline=None)
@given(LAYERS, st.data(), st.floats(2, 8))
def test_widths_take_no_more_bits_than_asked_for(weights: dict[str, int], data: st.DataObject, bits: float) -> None:
    harm = {name: data.draw(HARM) for name in weights}
    chosen = assign(weights, harm, WIDTHS, bits)
    assert chosen.keys() == weights.keys()
    used = sum(chosen[name] * count for name, count in weights.items())
    assert used <= bits * sum(weights.values()) * (1 + 1e-9)


@settings(deadline=None)
@given(LAYERS, st.data(), st.floats(2, 8), st.floats(2, 8))
def test_fewer_bits_asked_for_never_widen_a_layer(
    weights: dict[str, int], data: st.DataObject, one: float, other: float
) -> None:
    harm = {name: data.draw(HARM) for name in weights}
    narrow, wide = (assign(weights, harm, WIDTHS, bits) for bits in sorted((one, other)))
    assert all(narrow[name] <= wide[name] for name in weights)


def test_a_width_whose_harm_is_not_known_is_not_used_and_the_rest_does_what_it_can() -> None:
    assert assign({"a": 10, "b": 10}, {"a": {4: 0.1}}, WIDTHS, 2) == {"a": 4, "b": 8}


def test_the_layer_that_is_harmed_least_goes_first() -> None:
    harm = {"a": {4: 1.0, 3: 2.0, 2: 3.0}, "b": {4: 0.1, 3: 0.2, 2: 0.3}}
    chosen = assign({"a": 100, "b": 100}, harm, WIDTHS, 6)
    assert chosen["a"] == 8
    assert chosen["b"] <= 4
