"""Weights as small whole numbers: one scale per output channel, chosen for the least squared error."""

import dataclasses

import numpy as np

from compress.graph import Array

CANDIDATES = 32
LEAST_SHRINK = {8: 0.85, 7: 0.85, 4: 0.45}  # how far the largest weight of a channel may be clipped
BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Codes:
    """Whole numbers and their scales: `values * scales` (along `axis`) is what the runtime computes with."""

    values: Array  # int8, in the weight's shape
    scales: Array  # float32, one per channel
    axis: int
    bits: int  # as stored: 4 or 8

    def restore(self) -> Array:
        """Return the float weights that the codes stand for."""
        return np.asarray(self.values.astype(np.float32) * _along(self.scales, self.axis, self.values.ndim))


def limits(bits: int, range_bits: int = 8) -> tuple[int, int]:
    """Return the least and largest code. 8-bit codes are kept symmetric; 7 bits of range keep 16-bit sums whole."""
    if bits == 4:
        return -8, 7
    top = 63 if range_bits == 7 else 127
    return -top, top


def encode(weight: Array, axis: int, bits: int, range_bits: int = 8) -> Codes:
    """Return codes for `weight`, each channel's scale the one of `CANDIDATES` with the least squared error.

    A channel of zeros gets scale 1: zero times anything is right, and a scale of 0 would not be.
    """
    low, high = limits(bits, range_bits)
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float32)
    biggest = np.abs(rows).max(axis=1)
    biggest[biggest < high * np.finfo(np.float32).tiny] = high  # all zero, or so small that the scale would vanish
    best = np.full(len(rows), np.inf)
    scales = biggest / high
    shrink = LEAST_SHRINK[bits if bits == 4 else range_bits]
    for factor in np.linspace(1.0, shrink, CANDIDATES):
        scale = (biggest * factor / high)[:, None]
        error = ((np.clip(np.rint(rows / scale), low, high) * scale - rows) ** 2).sum(axis=1)
        better = error < best
        best[better] = error[better]
        scales[better] = scale[better, 0]
    return encode_with(weight, axis, bits, scales.astype(np.float32), range_bits)


def encode_with(weight: Array, axis: int, bits: int, scales: Array, range_bits: int = 8) -> Codes:
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
