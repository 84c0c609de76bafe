"""Round weights so that a layer's answers change least, not its weights: each rounding makes up for those before it.

The squared error of a layer's answers is a quadratic form of the weights' change, with the second moments of what the
layer reads as its matrix. Codes start from optimal brain quantization in its column-wise form (GPTQ, Frantar et al.,
arXiv 2210.17323), for several scales a channel; then scales and codes are improved in turn, each step exact: the best
scale for given codes, and for each code the best value given all others (cyclic coordinate descent, as in QuantEase,
arXiv 2309.01885).
"""

import numpy as np

from compress.graph import Array
from compress.weights import LEAST_SHRINK, encode, half, limits

SCALES = 6  # scales tried for a channel
SWEEPS = 3
BLOCK = 64  # columns whose change is carried to the others at once


def settle(
    wanted: Array, gram: Array, bits: float, range_bits: int = 8, floor: Array | None = None
) -> tuple[Array, Array]:
    """Return codes int8 [groups, outputs, inputs] and scales [groups, outputs] for the weights `wanted`.

    `gram` [groups, inputs, inputs] holds the second moments of what each group of outputs reads, symmetric and positive
    definite (see `damped`). No scale falls below `floor` [groups, outputs].
    """
    low, high = limits(bits, range_bits)
    wanted, gram = wanted.astype(np.float32), gram.astype(np.float32)
    order = np.argsort(-np.diagonal(gram, axis1=1, axis2=2), axis=1, kind="stable")  # largest first: it may err least
    back = np.argsort(order, axis=1)
    rows = np.take_along_axis(wanted, order[:, None], 2)
    gram = np.take_along_axis(np.take_along_axis(gram, order[:, :, None], 1), order[:, None], 2)
    most = np.abs(rows).max(axis=2)
    reach = (high - low) / 2
    most[most < reach * np.finfo(np.float32).tiny] = reach  # all zero: any scale is right but 0
    factors = np.linspace(1.0, LEAST_SHRINK[range_bits if bits == 8 else bits], SCALES, dtype=np.float32)
    tried = np.stack([_stored(most * factor / reach, floor) for factor in factors], axis=1)  # [groups, tried, outputs]
    groups, _, outputs = tried.shape
    many = np.repeat(rows[:, None], SCALES, axis=1).reshape(groups, SCALES * outputs, -1)
    codes = _compensated(many, gram, tried.reshape(groups, -1), low, high).reshape(groups, SCALES, outputs, -1)
    error = np.stack([loss(codes[:, at] * tried[:, at, :, None] - rows, gram) for at in range(SCALES)], axis=1)
    best = error.argmin(axis=1)[:, None]
    scales = np.take_along_axis(tried, best, 1)[:, 0]
    found = np.take_along_axis(codes, best[..., None], 1)[:, 0]
    # Weights rounded to nearest are improved beside them: then what comes out is never worse than those.
    nearest = encode(rows.reshape(groups * outputs, -1), 0, bits, range_bits).scales.reshape(groups, outputs)
    nearest = _stored(nearest, floor)
    found = np.concatenate((found, _rounded(rows, nearest[..., None], low, high)), axis=1)
    scales, twice = np.concatenate((scales, nearest), axis=1), np.concatenate((rows, rows), axis=1)
    floors = None if floor is None else np.concatenate((floor, floor), axis=1)
    for _ in range(SWEEPS):
        scales = _better_scales(twice, gram, found, scales, floors)
        found = _descended(twice, gram, found, scales, low, high)
    error = loss(found * scales[..., None] - twice, gram).reshape(groups, 2, outputs)
    best = error.argmin(axis=1)[:, None]
    scales = np.take_along_axis(scales.reshape(groups, 2, outputs), best, 1)[:, 0]
    found = np.take_along_axis(found.reshape(groups, 2, outputs, -1), best[..., None], 1)[:, 0]
    return np.take_along_axis(found, back[:, None], 2).astype(np.int8), scales


def damped(gram: Array, share: float) -> Array:
    """Return second moments with `share` of their mean added to each: what few samples did not show costs something too."""
    mean = np.maximum(np.diagonal(gram, axis1=1, axis2=2).mean(axis=1), 1e-12)
    return np.asarray(gram + (share * mean)[:, None, None] * np.eye(gram.shape[-1]))


def loss(change: Array, gram: Array) -> Array:
    """Return the squared error [groups, outputs] in the answers that this change of weights makes."""
    return np.asarray(((change @ gram) * change).sum(axis=2))


def _stored(scales: Array, floor: Array | None) -> Array:
    return half((scales if floor is None else np.maximum(scales, floor)).astype(np.float32))


def _rounded(rows: Array, scales: Array, low: int, high: int) -> Array:
    return np.clip(np.rint(rows / scales), low, high)


def _compensated(rows: Array, gram: Array, scales: Array, low: int, high: int) -> Array:
    """Round column after column; what a column loses is given to the columns not yet rounded."""
    inverse = np.linalg.inv(gram.astype(np.float64))
    share = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2).transpose(0, 2, 1).astype(np.float32)
    rows = _columns(rows)
    codes = np.empty_like(rows)
    for start in range(0, rows.shape[1], BLOCK):
        end = min(start + BLOCK, rows.shape[1])
        lost = np.empty((len(rows), end - start, rows.shape[2]), np.float32)
        for at in range(start, end):
            column = rows[:, at]
            codes[:, at] = _rounded(column, scales, low, high)
            lost[:, at - start] = (column - codes[:, at] * scales) / share[:, at, at, None]
            rows[:, at + 1 : end] -= share[:, at, at + 1 : end, None] * lost[:, at - start, None]
        rows[:, end:] -= share[:, start:end, end:].transpose(0, 2, 1) @ lost
    return codes.transpose(0, 2, 1)


def _better_scales(rows: Array, gram: Array, codes: Array, scales: Array, floor: Array | None) -> Array:
    """Return the scale with the least error for the codes as they are."""
    seen = codes @ gram
    own = (seen * codes).sum(axis=2)
    best = (seen * rows).sum(axis=2) / np.maximum(own, 1e-30)
    best = _stored(np.where((own > 0) & (best > 0), best, scales), floor)
    better = loss(codes * best[..., None] - rows, gram) < loss(codes * scales[..., None] - rows, gram)
    return np.where(better, best, scales)


def _descended(rows: Array, gram: Array, codes: Array, scales: Array, low: int, high: int) -> Array:
    """Give each code in turn the value that is best with all others as they are."""
    rows, codes = _columns(rows), _columns(codes)
    change = codes * scales[:, None] - rows
    for start in range(0, rows.shape[1], BLOCK):
        end = min(start + BLOCK, rows.shape[1])
        slope = gram[:, start:end] @ change
        for at in range(start, end):
            centre = codes[:, at] * scales - slope[:, at - start] / gram[:, at, at, None]
            codes[:, at] = _rounded(centre, scales, low, high)
            moved = codes[:, at] * scales - rows[:, at] - change[:, at]
            change[:, at] += moved
            slope[:, at - start + 1 :] += gram[:, at, at + 1 : end, None] * moved[:, None]
    return codes.transpose(0, 2, 1)


def _columns(rows: Array) -> Array:
    """Return a copy of [groups, outputs, inputs] as [groups, inputs, outputs]: what is gone through lies side by side."""
    return rows.transpose(0, 2, 1).copy()
