"""Rounding that makes up for itself: closer in what a layer answers than rounding each weight to nearest."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.rounding import damped, loss, settle
from compress.weights import TERNARY, encode, limits

WIDTHS = (8, 4, 3, 2, TERNARY)


def correlated(seed: int, groups: int, inputs: int) -> Any:
    chance = np.random.default_rng(seed)
    mixed = chance.standard_normal((groups, 4 * inputs + 8, inputs)) @ chance.standard_normal((groups, inputs, inputs))
    return damped(mixed.transpose(0, 2, 1) @ mixed / mixed.shape[1], 0.01)


@given(st.integers(0, 10_000), st.sampled_from(WIDTHS), st.sampled_from([(1, 5, 24), (6, 1, 9), (2, 3, 70)]))
@example(790, 4, (6, 1, 9))  # the search alone ends in a hollow here
@settings(deadline=None, max_examples=25)
def test_answers_change_less_than_with_weights_rounded_to_nearest(
    seed: int, bits: float, sizes: tuple[int, int, int]
) -> None:
    groups, outputs, inputs = sizes
    weights = np.random.default_rng(seed).standard_normal((groups, outputs, inputs)).astype(np.float32)
    gram = correlated(seed, groups, inputs)
    codes, scales = settle(weights, gram, bits)
    nearest = encode(weights.reshape(groups * outputs, inputs), 0, bits).restore().reshape(weights.shape)
    low, high = limits(bits)
    assert low <= codes.min() <= codes.max() <= high
    assert loss(codes * scales[..., None] - weights, gram).sum() < loss(nearest - weights, gram).sum()


def test_no_scale_falls_below_its_floor_and_zeros_stay_zero() -> None:
    weights = np.zeros((1, 3, 8), np.float32)
    weights[0, 1] = 1e-3
    codes, scales = settle(weights, correlated(2, 1, 8), 4, floor=np.array([[0.0, 0.01, 0.0]], np.float32))
    assert scales[0, 1] >= 0.01 * (1 - 2**-10)
    assert (scales > 0).all()
    assert not codes[0, [0, 2]].any()


def test_damping_makes_moments_of_too_few_rows_definite() -> None:
    row = np.ones((1, 1, 4))
    gram = damped(row.transpose(0, 2, 1) @ row, 0.01)
    assert np.linalg.eigvalsh(gram[0]).min() == pytest.approx(0.01)
