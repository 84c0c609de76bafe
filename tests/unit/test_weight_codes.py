import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from compress.weights import encode, limits, pack4, unpack4

CODES4 = arrays(np.int8, array_shapes(max_dims=4, max_side=9), elements=st.integers(-8, 7))
WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=st.floats(-4, 4, width=32))


@given(CODES4)
def test_packed_codes_come_back_as_they_were(codes: np.ndarray) -> None:
    assert (unpack4(pack4(codes), codes.shape) == codes).all()


@given(CODES4)
def test_two_codes_share_a_byte(codes: np.ndarray) -> None:
    assert len(pack4(codes)) == (codes.size + 1) // 2


@given(CODES4)
def test_our_packing_is_the_one_of_onnx(codes: np.ndarray) -> None:
    import ml_dtypes
    from onnx import numpy_helper

    assert numpy_helper.from_array(codes.astype(ml_dtypes.int4), "w").raw_data == pack4(codes)


def test_a_code_that_four_bits_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="-8..7, found 0..8"):
        pack4(np.array([0, 8], np.int8))


@given(WEIGHTS, st.sampled_from([(4, 8), (8, 8), (8, 7)]))
def test_codes_stay_inside_their_range_and_scales_are_positive(weight: np.ndarray, width: tuple[int, int]) -> None:
    codes = encode(weight, 0, *width)
    low, high = limits(*width)
    assert low <= codes.values.min()
    assert codes.values.max() <= high
    assert (codes.scales > 0).all()


@given(WEIGHTS)
def test_eight_bits_are_never_further_off_than_rounding_the_largest_weight_explains(weight: np.ndarray) -> None:
    codes = encode(weight, 0, 8)
    biggest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    plain = ((biggest / 127 / 2) ** 2 * weight[0].size).sum()
    assert ((codes.restore() - weight) ** 2).sum() <= plain * 1.01 + 1e-12


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[1] = 1
    restored = encode(weight, 0, 4).restore()
    assert (restored[0] == 0).all()
    assert np.allclose(restored[1], 1, atol=0.1)


def test_seven_bits_of_range_keep_the_sum_of_two_products_in_16_bits() -> None:
    _, high = limits(8, 7)
    assert np.iinfo(np.int16).max >= 2 * 255 * high
    assert np.iinfo(np.int16).max >= 2 * 255 * 8  # 4-bit codes are safe anyway
