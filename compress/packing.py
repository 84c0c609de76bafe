"""Codes of 4, 3, 2 and 1.6 bits as bytes, and the operators that unfold them again when the model is loaded.

Four bits are ONNX's own INT4. Narrower codes are digits: a byte holds four in base 4, eight in base 2, or five in base
3, the first one lowest, and `byte / powers % base` in uint8 brings them back. Three bits are two planes: what remains
of a code when negative ones are turned over, -1 → 0 … -4 → 3, and whether it was turned. Trained weights gather around
zero, so zstd makes a sixth less of that than of the upper and lower bits as they are (ResNet-56: 266 kB, 304 kB, and
295 kB for eight codes in three bytes), nearly what it makes of a code per byte.
"""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from compress.graph import Array
from compress.weights import TERNARY, limits

DIGITS = {4: 4, 3: 5, 2: 8}  # base -> how many digits a byte holds
PLANES: dict[float, tuple[int, ...]] = {3: (4, 2), 2: (4,), TERNARY: (3,)}  # bits -> base of each plane
INT4_RUNTIME = (1, 23)  # 1.20 to 1.22 have no Cast from INT4 (tried); 1.23 to 1.31 fold it
DIGITS_RUNTIME = (1, 22)  # before 1.22 there is no Div for uint8 (tried)

Make = Callable[..., str]  # (operator, inputs, **attributes) -> name of the result
Constant = Callable[[Array], str]


def pack4(values: Array) -> bytes:
    """Pack codes of -8..7 two a byte as ONNX's INT4 stores them: row-major, the first in the low half, zero-padded."""
    flat = _checked(values, 4)
    nibbles = np.zeros(flat.size + flat.size % 2, np.uint8)
    nibbles[: flat.size] = flat.astype(np.int8).view(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


def unpack4(data: bytes, shape: tuple[int, ...]) -> Array:
    """Return the codes that `pack4` packed."""
    raw = np.frombuffer(data, np.uint8)
    nibbles = np.stack([raw & 0x0F, raw >> 4], axis=1).reshape(-1)
    count = int(np.prod(shape, dtype=np.int64))
    return ((nibbles[:count] ^ 8).astype(np.int8) - 8).reshape(shape)


def pack(values: Array, bits: float) -> tuple[Array, ...]:
    """Return the planes of codes of 3, 2 or 1.6 bits, each uint8 [bytes]; the last bytes are filled up with code 0."""
    flat = np.pad(_checked(values, bits).astype(np.int64), (0, padding(values.size, bits)))
    if bits == 3:
        return _digits(flat ^ (flat >> 63), 4), _digits(flat < 0, 2)
    (base,) = PLANES[bits]
    return (_digits(flat - limits(bits)[0], base),)


def unpack(planes: Sequence[Array], bits: float, shape: tuple[int, ...]) -> Array:
    """Return the codes that `pack` packed, as int8."""
    rows = [
        (plane[:, None] // _powers(base) % base).astype(np.int8).reshape(-1)
        for plane, base in zip(planes, PLANES[bits], strict=True)
    ]
    flat = rows[0] ^ -rows[1] if bits == 3 else rows[0] + np.int8(limits(bits)[0])
    return np.asarray(flat[: int(np.prod(shape, dtype=np.int64))].reshape(shape))


def padding(count: int, bits: float) -> int:
    """Return how many codes are added so that every plane ends with a full byte."""
    return -count % max(DIGITS[base] for base in PLANES[bits])


def unfold(planes: Sequence[Array], bits: float, make: Make, constant: Constant) -> str:
    """Write the operators that turn the planes into one row of int8 codes; return the row's name."""
    rows = []
    for plane, base in zip(planes, PLANES[bits], strict=True):
        shifted = make("Div", [constant(plane[:, None]), constant(_powers(base))])
        digits = make("Mod", [shifted, constant(np.asarray([base], np.uint8))])
        flat = make("Reshape", [digits, constant(np.asarray([-1], np.int64))])
        rows.append(make("Cast", [flat], to=TensorProto.INT8))
    if bits == 3:
        return make("BitwiseXor", [rows[0], make("Neg", [rows[1]])])
    return make("Add", [rows[0], constant(np.asarray([limits(bits)[0]], np.int8))])


def _digits(values: Array, base: int) -> Array:
    return np.asarray(values.reshape(-1, DIGITS[base]).astype(np.uint8) @ _powers(base))


def _powers(base: int) -> Array:
    return np.asarray(base ** np.arange(DIGITS[base]), np.uint8)


def _checked(values: Array, bits: float) -> Array:
    flat = np.ascontiguousarray(values).reshape(-1)
    low, high = limits(bits)
    if flat.size and not low <= int(flat.min()) <= int(flat.max()) <= high:
        raise ValueError(f"{bits:g}-bit codes must lie in {low}..{high}, found {flat.min()}..{flat.max()}")
    return flat
