"""What a cut gives away: the measure against its reference, and the audit's verdicts where the answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.split.leak import LEAST_INPUTS, Target, audit, rebuild, ridge, shrunk
from cloud.split.ssim import ssim


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), channels=st.sampled_from([1, 3]), side=st.sampled_from([7, 12, 33]))
def test_likeness_is_that_of_scikit_image(seed: int, channels: int, side: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    chance = np.random.default_rng(seed)
    one = chance.random((channels, side, side + 3))
    two = np.clip(one + chance.normal(0, chance.random(), one.shape), 0, 1)
    right = metrics.structural_similarity(one, two, data_range=1.0, channel_axis=0)
    assert ssim(one[None], two[None]) == pytest.approx(right, abs=1e-6)
    assert ssim(one[None], one[None]) == pytest.approx(1)


def test_shrinking_keeps_the_mean_of_what_each_pixel_stands_for() -> None:
    pictures = np.random.default_rng(0).random((2, 3, 64, 48)).astype(np.float32)
    small = shrunk(pictures, 32)
    assert small.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(small[:, :, 0, 0], pictures[:, :, :2, : round(48 / 32)].mean((2, 3)), atol=0.3)
    assert shrunk(pictures, 64).shape == pictures.shape


def signals(count: int = 240) -> tuple[np.ndarray, np.random.Generator]:
    chance = np.random.default_rng(0)
    return chance.normal(0, 1, (count, 3, 8)).astype(np.float32), chance


def test_a_ridge_finds_a_linear_map_and_nothing_in_noise() -> None:
    x, chance = signals()
    rows = x.reshape(len(x), -1)
    train, held = np.arange(180), np.arange(180, 240)
    turned = rows @ chance.normal(0, 1, (24, 30)).astype(np.float32)
    assert np.abs(ridge(turned, rows, train, held) - rows[held]).mean() < 0.1
    noise = chance.normal(0, 1, (240, 30)).astype(np.float32)
    target = Target(rows, "explained variance", 0.0)
    assert rebuild([noise], target, 0, 1.0).value < 0.1


def test_what_can_be_computed_back_is_recoverable_and_what_is_thrown_away_is_private() -> None:
    x, chance = signals()
    rows = x.reshape(len(x), -1)
    cuts = {
        "c1": [rows @ chance.normal(0, 1, (24, 24)).astype(np.float32)],
        "c2": [np.sign(rows.sum(1, keepdims=True))],
    }
    found, facts = audit(x, cuts, [x * 2 + 1], picture=False)
    assert facts["control"] > 0.9
    assert (found["c1"].verdict, found["c2"].verdict) == ("recoverable", "private")
    assert found["c1"].value > 0.7
    assert found["c1"].measure == "explained variance"


def test_too_few_inputs_are_inconclusive_and_nothing_is_trained() -> None:
    x, _ = signals(LEAST_INPUTS - 1)
    found, facts = audit(x, {"c1": [x]}, [x], picture=False)
    assert found["c1"].verdict == "inconclusive"
    assert facts["why"] == "only 199 inputs, an audit needs 200"


def test_a_control_that_fails_makes_everything_inconclusive_but_what_was_recovered() -> None:
    x, chance = signals()
    found, facts = audit(x, {"c1": [chance.normal(0, 1, (240, 5))], "c2": [x]}, [np.zeros((240, 4))], picture=False)
    assert found["c1"].verdict == "inconclusive"
    assert found["c2"].verdict == "recoverable"
    assert "the positive control failed" in facts["why"]


def pictures(count: int = 240) -> np.ndarray:
    """Soft blobs, each at a place of its own."""
    chance = np.random.default_rng(1)
    at = chance.random((count, 2, 1, 1)) * 16
    grid = np.mgrid[:16, :16][None]
    blob = np.exp(-(((grid - at) ** 2).sum(1)) / 12)
    return (0.1 + 0.8 * blob[:, None]).astype(np.float32)


def test_a_convolution_of_a_picture_is_recoverable_and_its_mean_brightness_is_not() -> None:
    x = pictures(200)
    edges = np.concatenate([x, np.roll(x, 1, 2) - x, np.roll(x, 1, 3) - x], axis=1)
    cuts = {"c1": [edges[:, :, ::2, ::2]], "c2": [np.random.default_rng(3).random((200, 4)).astype(np.float32)]}
    found, facts = audit(x, cuts, [edges], picture=True, cut_s=0.3)
    assert facts["control"] >= 0.6
    assert found["c1"].verdict == "recoverable"
    assert found["c2"].verdict in ("private", "inconclusive")
    assert found["c2"].value < found["c1"].value
    assert found["c1"].measure == "ssim"


def test_a_decoder_that_was_stopped_before_its_loss_was_flat_proves_nothing() -> None:
    x = pictures()
    noise = np.random.default_rng(3).random((240, 4)).astype(np.float32)
    found, _ = audit(x, {"c1": [noise]}, [x], picture=True, cut_s=0.0)
    assert not found["c1"].flat
    assert found["c1"].verdict == "inconclusive"


def test_nothing_is_said_of_a_cut_whose_tensors_have_other_sizes_for_some_inputs() -> None:
    x, _ = signals()
    found, facts = audit(x, {"c1": [], "c2": [x]}, [x], picture=False)
    assert (found["c1"].verdict, found["c2"].verdict) == ("inconclusive", "recoverable")
    assert "other sizes for some inputs" in facts["why"]
