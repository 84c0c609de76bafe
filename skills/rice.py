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
MAX_FOLDED = 1 << MAX_WIDTH
SPARE = 0.7  # of a block's mean, rounded up to a power of two, is what its remainders count to
UNARY_BITS = 1 + 1 / SPARE  # a sample on average at most: a block's quotients add up to at most 1 / SPARE each
STEP = 1 << 14  # how many remainders are unpacked at a time: a bit takes a byte meanwhile
PEAK_BYTES = 24  # for each sample, that `decode` takes at most on its way, and 1 MiB


def encode(samples: "NDArray[Any]") -> bytes:
    """Return the bytes of samples from 0 to 65535, of shape (rows, time), each row predicted along time."""
    import numpy as np

    rows = np.asarray(samples, np.int64)
    first = rows[:, :1]
    rows = rows - first
    tried = [_differences(rows, order) for order in ORDERS]
    orders = np.stack([np.abs(one).sum(1) for one in tried]).argmin(0).astype(np.uint8)
    residuals = np.empty_like(rows)
    for order in ORDERS:
        these = orders == order
        residuals[these] = tried[order][these]
    folded = np.where(residuals < 0, -2 * residuals - 1, 2 * residuals)
    lengths = _lengths(rows.shape[1])
    means = np.add.reduceat(folded, np.cumsum(lengths) - lengths, 1) / lengths
    widths = np.clip(np.ceil(np.log2(np.maximum(means * SPARE, 0.5))), 0, MAX_WIDTH).astype(np.uint8)
    each = np.repeat(widths, lengths, 1).ravel().astype(np.int64)
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


def decode(body: bytes | memoryview, rows: int, time: int) -> "NDArray[np.uint16]":
    """Return the samples, shape (rows, time); takes at most `PEAK_BYTES` for each and 1 MiB, whatever the bytes are.

    Raises:
        FormatError: bytes that `encode` does not give for such a shape.
    """
    import numpy as np

    count, blocks = rows * time, -(-time // BLOCK)
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
    if length > UNARY_BITS * count / 8 + 1:
        raise FormatError(f"Rice-coded samples have {length} bytes of unary codes, too many for {count} samples")
    each = np.repeat(widths, _lengths(time), 1).ravel()
    rest = memoryview(body)[head + 4 + length :]
    if len(rest) != (int(each.sum(dtype=np.int64)) + 7) // 8:
        raise FormatError("Rice-coded samples are cut short, or something stands behind them")
    folded = _read_unary(np.frombuffer(body, np.uint8, length, head + 4), count)
    if (folded > MAX_FOLDED >> each.astype(np.int32)).any():
        raise FormatError("Rice-coded samples are out of range")
    folded <<= each
    _add_fixed(folded, rest, each)
    if folded.max(initial=0) > MAX_FOLDED:
        raise FormatError("Rice-coded samples are out of range")
    folded = (folded >> 1 ^ -(folded & 1)).reshape(rows, time)
    samples = np.empty((rows, time), np.uint16)
    step = max(1, STEP // max(time, 1))
    for at in range(0, rows, step):
        for order in ORDERS:
            these = at + np.flatnonzero(orders[at : at + step] == order)
            values = folded[these].astype(np.int64)
            for _ in range(order):
                np.cumsum(values, 1, out=values)
            values += first[these, None]
            if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
                raise FormatError("Rice-coded samples are out of range")
            samples[these] = values
    return samples


def _read_unary(packed: "NDArray[np.uint8]", count: int) -> "NDArray[np.int32]":
    """Return how many zeros stand before each of the `count` ones."""
    import numpy as np

    bits = np.unpackbits(packed)
    ones = int(np.count_nonzero(bits))
    if ones != count:
        raise FormatError(f"Rice-coded samples are {ones}, the plan says {count}")
    stops = np.flatnonzero(bits).astype(np.int32)
    stops[1:] -= stops[:-1] + 1
    return stops


def _differences(rows: "Samples", order: int) -> "Samples":
    import numpy as np

    for _ in range(order):
        rows = np.diff(rows, axis=1, prepend=0)
    return rows


def _lengths(time: int) -> "Samples":
    import numpy as np

    blocks = -(-time // BLOCK)
    return np.array([min(BLOCK, time - at * BLOCK) for at in range(blocks)], np.int64)


def _fixed_bits(values: "Samples", widths: "Samples") -> bytes:
    """Pack each value into its own number of bits, the highest first."""
    import numpy as np

    starts = np.cumsum(widths) - widths
    bits = np.zeros(int(widths.sum()), np.uint8)
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        bits[starts[has] + widths[has] - 1 - bit] = (values[has] >> bit) & 1
    return np.packbits(bits).tobytes()


def _add_fixed(values: "NDArray[np.int32]", data: memoryview, widths: "NDArray[np.uint8]") -> None:
    """Fill in the lowest bits of each value, as many as it is wide."""
    import numpy as np

    begin = 0
    for at in range(0, len(values), STEP):
        some, into = widths[at : at + STEP].astype(np.int64), values[at : at + STEP]
        ends = begin + np.cumsum(some)
        bits = np.unpackbits(np.frombuffer(data[begin // 8 : -(-int(ends[-1]) // 8)], np.uint8))
        lowest = ends - 1 - begin // 8 * 8
        for bit in range(int(some.max())):
            has = some > bit
            into[has] |= bits[lowest[has] - bit].astype(np.int32) << bit
        begin = int(ends[-1])
