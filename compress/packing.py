"""Codes of 4, 3, 2 and 1.6 bits as bytes, and the operators that unfold them again when the model is loaded.

Four bits are ONNX's own INT4. Narrower codes are digits: a byte holds four in base 4, eight in base 2, or five in base
3, the first one lowest, and `byte / powers % base` in uint8 brings them back. Three bits are two planes, the lower two
bits of all codes and then the upper one: 3.0 bits a code, where eight codes in three bytes would take more operators
and five in a 16-bit word 3.2 bits.
"""

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from compress.graph import Array
from compress.weights import TERNARY, limits

DIGITS = {4: 4, 3: 5, 2: 8}  # base -> how many digits a byte holds
PLANES: dict[float, tuple[int, ...]] = {3: (4, 2), 2: (4,), TERNARY: (3,)}  # bits -> base of each plane, lowest first
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
    flat = _checked(values, bits).astype(np.int64) - limits(bits)[0]
    bases = PLANES[bits]
    flat = np.pad(flat, (0, padding(flat.size, bits)), constant_values=-limits(bits)[0])
    planes = []
    for base in bases:
        digits = (flat % base).reshape(-1, DIGITS[base])
        planes.append((digits @ base ** np.arange(DIGITS[base])).astype(np.uint8))
        flat //= base
    return tuple(planes)


def unpack(planes: Sequence[Array], bits: float, shape: tuple[int, ...]) -> Array:
    """Return the codes that `pack` packed, as int8."""
    total, weight = np.zeros(1, np.int64), 1
    for base, plane in zip(PLANES[bits], planes, strict=True):
        total = total + weight * (plane[:, None].astype(np.int64) // _powers(base) % base).reshape(-1)
        weight *= base
    count = int(np.prod(shape, dtype=np.int64))
    return (total[:count] + limits(bits)[0]).astype(np.int8).reshape(shape)


def padding(count: int, bits: float) -> int:
    """Return how many codes are added so that every plane ends with a full byte."""
    return -count % max(DIGITS[base] for base in PLANES[bits])


def unfold(planes: Sequence[Array], bits: float, make: Make, constant: Constant) -> str:
    """Write the operators that turn the planes into one row of int8 codes; return the row's name."""
    row, weight = "", 1
    for base, plane in zip(PLANES[bits], planes, strict=True):
        shifted = make("Div", [constant(plane[:, None]), constant(_powers(base).astype(np.uint8))])
        digits = make("Mod", [shifted, constant(np.asarray([base], np.uint8))])
        flat = make("Reshape", [digits, constant(np.asarray([-1], np.int64))])
        if weight > 1:
            flat = make("Mul", [flat, constant(np.asarray([weight], np.uint8))])
        row = make("Add", [row, flat]) if row else flat
        weight *= base
    return make("Add", [make("Cast", [row], to=TensorProto.INT8), constant(np.asarray([limits(bits)[0]], np.int8))])


def _powers(base: int) -> Array:
    return np.asarray(base ** np.arange(DIGITS[base]))


def _checked(values: Array, bits: float) -> Array:
    flat = np.ascontiguousarray(values).reshape(-1)
    low, high = limits(bits)
    if flat.size and not low <= int(flat.min()) <= int(flat.max()) <= high:
        raise ValueError(f"{bits:g}-bit codes must lie in {low}..{high}, found {flat.min()}..{flat.max()}")
    return flat
