import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from compress.packing import pack, padding, unpack
from compress.weights import TERNARY, encode, half, limits

NARROW = (4, 3, 2, TERNARY)
WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=st.floats(-4, 4, width=32))


@st.composite
def narrow_codes(draw: st.DrawFn, least: int = 0) -> tuple[float, np.ndarray]:
    bits = draw(st.sampled_from(NARROW))
    shapes = array_shapes(min_dims=1, max_dims=4, min_side=least, max_side=9)
    return bits, draw(arrays(np.int8, shapes, elements=st.integers(*limits(bits))))


@given(narrow_codes())
def test_codes_written_as_digits_come_back_as_they_were(case: tuple[float, np.ndarray]) -> None:
    bits, codes = case
    back = unpack(pack(codes, bits), bits, codes.shape)
    assert back.dtype == np.int8
    assert (back == codes).all()


@given(narrow_codes())
def test_digits_take_no_more_than_their_bits_and_one_round_of_filling(case: tuple[float, np.ndarray]) -> None:
    bits, codes = case
    taken = sum(plane.nbytes for plane in pack(codes, bits))
    assert taken * 8 == pytest.approx((codes.size + padding(codes.size, bits)) * bits)
    assert padding(codes.size, bits) < 8


@pytest.mark.parametrize("bits", NARROW)
def test_a_code_outside_a_narrow_width_is_refused(bits: float) -> None:
    _, high = limits(bits)
    with pytest.raises(ValueError, match=f"found 0..{high + 1}"):
        pack(np.array([0, high + 1], np.int8), bits)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e5])
def test_codes_are_made_for_the_scales_that_are_stored(scale: float) -> None:
    weight = (np.random.default_rng(0).standard_normal((4, 9)) * scale * 127).astype(np.float32)
    codes = encode(weight, 0, 8)
    again = np.clip(np.rint(weight / codes.scales[:, None]), -127, 127)
    assert (again == codes.values).all()
    with np.errstate(over="ignore"):
        exact = (codes.scales.astype(np.float16).astype(np.float32) == codes.scales).all()
    assert exact == (scale in (1e-3, 1.0))  # what 16 bits cannot hold stays in 32


@given(narrow_codes(least=1), st.floats(1e-4, 10))
def test_what_was_rounded_once_is_found_again_unchanged(case: tuple[float, np.ndarray], scale: float) -> None:
    bits, codes = case
    weight = codes.astype(np.float32) * half(np.full(1, scale, np.float32))
    assert (encode(weight, 0, bits).restore() == weight).all()


def test_a_nearly_dead_channel_does_not_force_its_neighbours_into_32_bits() -> None:
    assert half(np.array([1e-9, 0.01], np.float32)).tolist() == [2**-20, np.float16(0.01)]


@given(WEIGHTS, st.sampled_from([(4, 8), (8, 8), (8, 7), (3, 8), (2, 8), (TERNARY, 8)]))
def test_codes_stay_inside_their_range_and_scales_are_positive(weight: np.ndarray, width: tuple[float, int]) -> None:
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
