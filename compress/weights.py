"""Weights as small whole numbers: one scale per output channel, chosen for the least squared error."""

import dataclasses

import numpy as np

from compress.graph import Array

TERNARY = 1.6  # bits a weight: three values, five of them in a byte
CANDIDATES = 32
LIMITS = {8: (-127, 127), 7: (-63, 63), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1), TERNARY: (-1, 1)}
LEAST_SHRINK = {8: 0.85, 7: 0.85, 4: 0.45, 3: 0.35, 2: 0.25, TERNARY: 0.2}  # how far a channel may be clipped
HALF_LEAST, HALF_MOST = 2.0**-20, 65504.0


@dataclasses.dataclass(frozen=True, slots=True)
class Codes:
    """Whole numbers and their scales: `values * scales` (along `axis`) is what the runtime computes with."""

    values: Array  # int8, in the weight's shape
    scales: Array  # float32, one per channel
    axis: int
    bits: float  # as stored: 8, 4, 3, 2 or TERNARY

    def restore(self) -> Array:
        """Return the float weights that the codes stand for."""
        return np.asarray(self.values.astype(np.float32) * self.factors())

    def factors(self) -> Array:
        """Return the scales in the shape that multiplies the codes."""
        return along(self.scales, self.axis, self.values.ndim)


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """4-bit codes of a linear layer with a scale for every `size` inputs of each output: what `MatMulNBits` reads."""

    values: Array  # int8 in -8..7, [outputs, inputs]; `size` divides the inputs
    scales: Array  # float32, [outputs, inputs / size]
    size: int

    def restore(self) -> Array:
        """Return the float weights that the codes stand for, [outputs, inputs]."""
        return np.asarray(self.values.astype(np.float32) * np.repeat(self.scales, self.size, axis=1))

    def packed(self) -> Array:
        """Return two codes a byte, the first one low, zero at 8: uint8 [outputs, blocks, size / 2]."""
        outputs, inputs = self.values.shape
        digits = (self.values + 8).astype(np.uint8).reshape(outputs, inputs // self.size, self.size // 2, 2)
        return np.asarray(digits[..., 0] | digits[..., 1] << 4)


def limits(bits: float, range_bits: int = 8) -> tuple[int, int]:
    """Return the least and largest code. 8-bit codes are kept symmetric; 7 bits of range keep 16-bit sums whole."""
    return LIMITS[range_bits if bits == 8 else bits]


def half(values: Array) -> Array:
    """Return positive float32 `values` rounded to what 16 bits hold, or as they are where those do not reach.

    The least of them become 2**-20, where 16 bits still have five of precision, as long as that is nothing beside the
    largest: a channel with a scale a thousand times smaller than another's says nothing in 8-bit activations.
    """
    most = float(values.max(initial=0.0))
    if most > HALF_MOST or (values.min(initial=1.0) < HALF_LEAST and most < 1024 * HALF_LEAST):
        return values
    return np.maximum(values, HALF_LEAST).astype(np.float16).astype(np.float32)


def encode(weight: Array, axis: int, bits: float, range_bits: int = 8) -> Codes:
    """Return codes for `weight`, each channel's scale the candidate with the least squared error.

    Candidates are `CANDIDATES` cuts and, at few bits, each scale that makes the largest value a code: what was rounded once
    is found again unchanged.
    A channel of zeros gets scale 1: zero times anything is right, and a scale of 0 would not be.
    """
    low, high = limits(bits, range_bits)
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    biggest = np.abs(rows).max(axis=1)
    reach = (high - low) / 2  # a width with one more code below zero than above cuts the upper end first
    biggest[biggest < reach * np.finfo(np.float32).tiny] = reach  # all zero, or so small that the scale would vanish
    best = np.full(len(rows), np.inf)
    scales = biggest / reach
    cuts = np.linspace(1.0, LEAST_SHRINK[range_bits if bits == 8 else bits], CANDIDATES)
    for factor in (*cuts, *(reach / code for code in range(1, -low + 1) if low >= -8)):
        scale = half(biggest * np.float32(factor / reach))[:, None]
        error = ((np.clip(np.rint(rows / scale), low, high) * scale - rows) ** 2).sum(axis=1)
        better = error < best
        best[better] = error[better]
        scales[better] = scale[better, 0]
    return encode_with(weight, axis, bits, scales, range_bits)


def encode_with(weight: Array, axis: int, bits: float, scales: Array, range_bits: int = 8) -> Codes:
    """Return codes for `weight`, rounded to nearest with these scales, themselves rounded first to what is stored."""
    low, high = limits(bits, range_bits)
    scales = half(scales.astype(np.float32))
    values = np.clip(np.rint(weight / along(scales, axis, weight.ndim)), low, high).astype(np.int8)
    return Codes(values, scales, axis, bits)


def along(scales: Array, axis: int, ndim: int) -> Array:
    """Return one number a channel in a shape that multiplies a weight of `ndim` dimensions along `axis`."""
    shape = [1] * ndim
    shape[axis] = -1
    return scales.reshape(shape)
