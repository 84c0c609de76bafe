"""Least squares for a layer that lost inputs, and the windows it is fitted on."""

import numpy as np
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from compress import graph
from compress.refit import refit, windows

CHANCE = np.random.default_rng(5)


@pytest.mark.parametrize(
    "facts",
    [
        {"strides": [2, 1], "pads": [1, 0, 2, 1]},
        {"dilations": [2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
)
def test_windows_times_weights_is_the_convolution(facts: dict[str, object]) -> None:
    x, weight = (CHANCE.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 9, 8), (5, 3, 3, 2)))
    node = helper.make_node("Conv", ["x", "w"], ["y"], **facts)
    (want,) = ReferenceEvaluator(node).run(None, {"x": x, "w": weight})
    seen, taken = windows(x, (3, 2), graph.attributes(node))
    rows = np.moveaxis(want, 1, -1).reshape(-1, 5)
    assert np.array_equal(taken, np.arange(len(rows)))
    assert np.allclose(seen @ weight.reshape(5, -1).T, rows, atol=1e-5)


def test_of_many_places_evenly_spread_ones_are_taken_in_every_column() -> None:
    x = np.arange(2 * 16 * 16, dtype=np.float32).reshape(2, 1, 16, 16)
    seen, taken = windows(x, (1, 1), {}, most=64)
    assert np.array_equal(seen[:, 0], taken)
    assert set(taken % 16) == set(range(16))
    assert len(taken) <= 2 * 64


def test_a_layer_that_already_gives_what_is_wanted_stays_exactly_as_it_is() -> None:
    weight, bias, x = np.eye(3, dtype=np.float32), np.zeros(3, np.float32), np.eye(3, dtype=np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    new_weight, new_bias = refit(node, weight, bias, [(x, x)])
    assert np.array_equal(new_weight, weight)
    assert np.array_equal(new_bias, bias)


@pytest.mark.parametrize("turned", [0, 1])
def test_a_channel_that_others_can_stand_in_for_is_not_missed(turned: int) -> None:
    x = CHANCE.standard_normal((50, 4)).astype(np.float32)
    x[:, 3] = x[:, 0] - 2 * x[:, 1] + 0.5
    weight = CHANCE.standard_normal((2, 4)).astype(np.float32)
    want = x @ weight.T + 1
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=turned)
    left = weight[:, :3] if turned else weight[:, :3].T
    found, bias = refit(node, left, None, [(x[:30, :3], want[:30]), (x[30:, :3], want[30:])], ridge=1e-7)
    assert found.shape == left.shape
    assert np.allclose(x[:, :3] @ (found.T if turned else found) + bias, want, atol=1e-3)


def test_every_group_of_a_grouped_convolution_is_fitted_on_its_own_inputs() -> None:
    x, weight = (CHANCE.standard_normal(shape).astype(np.float32) for shape in ((8, 4, 6, 6), (6, 2, 3, 3)))
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=2)
    (want,) = ReferenceEvaluator(node).run(None, {"x": x, "w": weight, "b": np.arange(6, dtype=np.float32)})
    found, bias = refit(node, np.zeros_like(weight), None, [(x, want)], ridge=1e-7)
    assert np.allclose(found, weight, atol=1e-3)
    assert np.allclose(bias, np.arange(6), atol=1e-3)


def test_an_operator_that_cannot_be_refitted_is_named() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up")
    with pytest.raises(ValueError, match=r"up: weights of ConvTranspose cannot be refitted"):
        refit(node, np.zeros((1, 1, 2, 2)), None, [])
