"""Weights as small whole numbers: one scale per output channel, chosen for the least squared error."""

import dataclasses

import numpy as np

from compress.graph import Array

TERNARY = 1.6  # bits a weight: three values, five of them in a byte
CANDIDATES = 32
LIMITS = {8: (-127, 127), 7: (-63, 63), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1), TERNARY: (-1, 1)}
LEAST_SHRINK = {8: 0.85, 7: 0.85, 4: 0.45, 3: 0.35, 2: 0.25, TERNARY: 0.2}  # how far a channel may be clipped


@dataclasses.dataclass(frozen=True, slots=True)
class Codes:
    """Whole numbers and their scales: `values * scales` (along `axis`) is what the runtime computes with."""

    values: Array  # int8, in the weight's shape
    scales: Array  # float32, one per channel
    axis: int
    bits: float  # as stored: 8, 4, 3, 2 or TERNARY

    def restore(self) -> Array:
        """Return the float weights that the codes stand for."""
        return np.asarray(self.values.astype(np.float32) * _along(self.scales, self.axis, self.values.ndim))


def limits(bits: float, range_bits: int = 8) -> tuple[int, int]:
    """Return the least and largest code. 8-bit codes are kept symmetric; 7 bits of range keep 16-bit sums whole."""
    return LIMITS[range_bits if bits == 8 else bits]


def encode(weight: Array, axis: int, bits: float, range_bits: int = 8) -> Codes:
    """Return codes for `weight`, each channel's scale the one of `CANDIDATES` with the least squared error.

    A channel of zeros gets scale 1: zero times anything is right, and a scale of 0 would not be.
    """
    low, high = limits(bits, range_bits)
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    biggest = np.abs(rows).max(axis=1)
    reach = (high - low) / 2  # a width with one more code below zero than above cuts the upper end first
    biggest[biggest < reach * np.finfo(np.float32).tiny] = reach  # all zero, or so small that the scale would vanish
    best = np.full(len(rows), np.inf)
    scales = biggest / reach
    for factor in np.linspace(1.0, LEAST_SHRINK[range_bits if bits == 8 else bits], CANDIDATES):
        scale = (biggest * factor / reach)[:, None]
        error = ((np.clip(np.rint(rows / scale), low, high) * scale - rows) ** 2).sum(axis=1)
        better = error < best
        best[better] = error[better]
        scales[better] = scale[better, 0]
    return encode_with(weight, axis, bits, scales.astype(np.float32), range_bits)


def encode_with(weight: Array, axis: int, bits: float, scales: Array, range_bits: int = 8) -> Codes:
    """Return codes for `weight` with these scales, rounded to nearest."""
    low, high = limits(bits, range_bits)
    values = np.clip(np.rint(weight / _along(scales, axis, weight.ndim)), low, high).astype(np.int8)
    return Codes(values, scales.astype(np.float32), axis, bits)


def pack4(values: Array) -> bytes:
    """Pack codes of -8..7 two a byte as ONNX's INT4 stores them: row-major, the first in the low half, zero-padded."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size and not -8 <= int(flat.min()) <= int(flat.max()) <= 7:
        raise ValueError(f"4-bit codes must lie in -8..7, found {flat.min()}..{flat.max()}")
    nibbles = np.zeros(flat.size + flat.size % 2, np.uint8)
    nibbles[: flat.size] = flat.astype(np.int8).view(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


def unpack4(data: bytes, shape: tuple[int, ...]) -> Array:
    """Return the codes that `pack4` packed."""
    raw = np.frombuffer(data, np.uint8)
    nibbles = np.stack([raw & 0x0F, raw >> 4], axis=1).reshape(-1)
    count = int(np.prod(shape, dtype=np.int64))
    return ((nibbles[:count] ^ 8).astype(np.int8) - 8).reshape(shape)


def _along(scales: Array, axis: int, ndim: int) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return scales.reshape(shape)
