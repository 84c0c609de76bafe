"""Whole numbers that change slowly, without loss: a fixed predictor and Rice codes, as FLAC has them (RFC 9639, 9.2).

Unlike there, the unary and the fixed-width halves of the codes lie in two streams, so both ways are a few numpy calls:
about 10 million samples a second. For each row of samples: the first one (u16), the order of the predictor (u8), and for
each block the width of the remainders (u8); then the length of the unary stream (u32), that stream, and the remainders.
"""

import struct
from typing import TYPE_CHECKING, Any

from skills.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.int64]

BLOCK = 512
ORDERS = (0, 1, 2)
MAX_WIDTH = 20  # residuals of order 2 of 16-bit samples have at most 19 bits


def encode(samples: "NDArray[Any]") -> bytes:
    """Return the bytes of samples from 0 to 65535, of shape (rows, time), each row predicted along time."""
    import numpy as np

    rows = np.asarray(samples, np.int64)
    first = rows[:, :1]
    rows = rows - first
    orders = np.empty(len(rows), np.uint8)
    residuals = np.empty_like(rows)
    tried = [_differences(rows, order) for order in ORDERS]
    costs = np.stack([np.abs(one).sum(1) for one in tried])
    for at, order in enumerate(costs.argmin(0)):
        orders[at], residuals[at] = order, tried[order][at]
    folded = np.where(residuals < 0, -2 * residuals - 1, 2 * residuals)
    padded = _blocks(folded)
    means = padded.sum(2) / np.maximum(_lengths(rows.shape[1]), 1)
    widths = np.clip(np.ceil(np.log2(np.maximum(means * 0.7, 0.5))), 0, MAX_WIDTH).astype(np.uint8)
    each = np.repeat(widths, BLOCK, 1)[:, : rows.shape[1]].ravel().astype(np.int64)
    values = folded.ravel()
    quotients = values >> each
    stops = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(stops[-1]) + 1 if len(stops) else 0, np.uint8)
    unary[stops] = 1
    packed = np.packbits(unary).tobytes()
    fixed = _fixed_bits(values & ((1 << each) - 1), each)
    return b"".join(
        (
            first.astype(">u2").tobytes(),
            orders.tobytes(),
            widths.tobytes(),
            struct.pack(">I", len(packed)),
            packed,
            fixed,
        )
    )


def decode(body: bytes | memoryview, rows: int, time: int) -> "Samples":
    """Return the samples, shape (rows, time).

    Raises:
        FormatError: bytes that `encode` does not give for such a shape.
    """
    import numpy as np

    blocks = -(-time // BLOCK)
    head = rows * (3 + blocks)
    if len(body) < head + 4:
        raise FormatError("Rice-coded samples are cut short")
    first = np.frombuffer(body, ">u2", rows)
    orders = np.frombuffer(body, np.uint8, rows, 2 * rows)
    widths = np.frombuffer(body, np.uint8, rows * blocks, 3 * rows).reshape(rows, blocks)
    if orders.max(initial=0) > max(ORDERS) or widths.max(initial=0) > MAX_WIDTH:
        raise FormatError("Rice-coded samples name a predictor or a width that does not exist")
    length = struct.unpack_from(">I", body, head)[0]
    if length > len(body) - head - 4:
        raise FormatError("Rice-coded samples are cut short")
    stops = np.flatnonzero(np.unpackbits(np.frombuffer(body, np.uint8, length, head + 4)))
    if len(stops) != rows * time:
        raise FormatError(f"Rice-coded samples are {len(stops)}, the plan says {rows * time}")
    each = np.repeat(widths, BLOCK, 1)[:, :time].ravel().astype(np.int64)
    rest = bytes(body[head + 4 + length :])
    if len(rest) != (int(each.sum()) + 7) // 8:
        raise FormatError("Rice-coded samples are cut short, or something stands behind them")
    quotients = np.diff(stops, prepend=-1) - 1
    if quotients.max(initial=0) > 1 << 20:
        raise FormatError("Rice-coded samples are out of range")
    folded = (quotients << each) | _read_fixed(rest, each)
    if folded.max(initial=0) > 1 << 20:
        raise FormatError("Rice-coded samples are out of range")
    residuals = np.where(folded & 1, -(folded + 1) // 2, folded // 2).reshape(rows, time)
    samples = np.empty_like(residuals)
    for at, order in enumerate(orders):
        row = residuals[at]
        for _ in range(int(order)):
            row = np.cumsum(row)
        samples[at] = row + int(first[at])
    if samples.min(initial=0) < 0 or samples.max(initial=0) > 65_535:
        raise FormatError("Rice-coded samples are out of range")
    return samples


def _differences(rows: "Samples", order: int) -> "Samples":
    import numpy as np

    for _ in range(order):
        rows = np.diff(rows, axis=1, prepend=0)
    return rows


def _lengths(time: int) -> "Samples":
    import numpy as np

    blocks = -(-time // BLOCK)
    return np.array([min(BLOCK, time - at * BLOCK) for at in range(blocks)], np.int64)


def _blocks(folded: "Samples") -> "Samples":
    import numpy as np

    rows, time = folded.shape
    blocks = -(-time // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.int64)
    padded[:, :time] = folded
    return padded.reshape(rows, blocks, BLOCK)


def _fixed_bits(values: "Samples", widths: "Samples") -> bytes:
    """Pack each value into its own number of bits, the highest first."""
    import numpy as np

    starts = np.cumsum(widths) - widths
    bits = np.zeros(int(widths.sum()), np.uint8)
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        bits[starts[has] + widths[has] - 1 - bit] = (values[has] >> bit) & 1
    return np.packbits(bits).tobytes()


def _read_fixed(data: bytes, widths: "Samples") -> "Samples":
    import numpy as np

    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    starts = np.cumsum(widths) - widths
    values = np.zeros(len(widths), np.int64)
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        values[has] |= bits[starts[has] + widths[has] - 1 - bit].astype(np.int64) << bit
    return values
