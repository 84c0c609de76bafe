"""Codes of 4, 3, 2 and 1.6 bits as bytes, and the operators that unfold them again when the model is loaded.

Codes are digits: a byte holds two in base 16, four in base 4, eight in base 2 or five in base 3, the first one lowest,
and `byte / powers % base` in uint8 brings them back. (ONNX's own INT4 takes as many bytes, and a runtime two versions
newer.) Three bits are two planes: what remains
of a code when negative ones are turned over, -1 → 0 … -4 → 3, and whether it was turned. Trained weights gather around
zero, so zstd makes a sixth less of that than of the upper and lower bits as they are (ResNet-56: 266 kB, 304 kB, and
295 kB for eight codes in three bytes), nearly what it makes of a code per byte.
"""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from compress.graph import Array
from compress.weights import TERNARY, limits

DIGITS = {16: 2, 4: 4, 3: 5, 2: 8}  # base -> how many digits a byte holds
PLANES: dict[float, tuple[int, ...]] = {4: (16,), 3: (4, 2), 2: (4,), TERNARY: (3,)}  # bits -> base of each plane
DIGITS_RUNTIME = (1, 21)  # the first onnxruntime with Div for uint8 (tried: 1.18 to 1.31)

Make = Callable[..., str]  # (operator, inputs, **attributes) -> name of the result
Constant = Callable[[Array], str]


def pack(values: Array, bits: float) -> tuple[Array, ...]:
    """Return the planes of codes of 4, 3, 2 or 1.6 bits, each uint8 [bytes]; the last bytes are filled up with code 0."""
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
