"""Cut the data into disjoint parts, so that nothing is judged on what chose it and no group is in two of them."""

import numpy as np

from compress.data import Data, Part, Splits
from compress.graph import Array
from skills.errors import FormatError

MAX_CALIBRATE = 512
MAX_SELECT = 2000
LEAST_SAMPLES = 20
LEAST_GROUPS = 3


def split(data: Data, seed: int) -> Splits:
    """Cut the data into its parts; the same seed gives the same rows.

    With training data a fifth of it (at most 512) calibrates, a fifth (at most 2,000) selects, the rest is `train`, and
    all of `x` is reported on. Without, `x` is cut 20 : 20 : 60 with the same limits. Where groups are given, whole groups are
    dealt out, so the shares are as near as groups allow.

    Raises:
        FormatError: too few samples or groups for that.
    """
    order = np.random.default_rng(seed)
    if data.x_train is None:
        calibrate, select, rest = _cut("x", len(data.x), data.groups, order, (len(data.x), len(data.x)))
        return Splits(*(_of_x(data, rows) for rows in (calibrate, select, rest)))
    calibrate, select, rest = _cut("x_train", len(data.x_train), data.groups_train, order, (MAX_CALIBRATE, MAX_SELECT))
    of_train = [
        _take(data.x_train, data.y_train, data.groups_train, rows, "x_train") for rows in (calibrate, select, rest)
    ]
    return Splits(of_train[0], of_train[1], _of_x(data, np.arange(len(data.x))), of_train[2])


def _cut(
    name: str, count: int, groups: Array | None, order: np.random.Generator, most: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Deal rows out, whole groups at a time: each goes to the part in which its middle row falls, none stays empty."""
    if count < LEAST_SAMPLES:
        raise FormatError(
            f"{name} has {count} samples, expected at least {LEAST_SAMPLES} to split into calibrate, select and the rest"
        )
    member = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(member)
    if len(sizes) < LEAST_GROUPS:
        raise FormatError(
            f"{name} has {len(sizes)} groups, expected at least {LEAST_GROUPS}: no part may share a group with another"
        )
    dealt = order.permutation(len(sizes))
    place = np.empty_like(dealt)
    place[dealt] = np.arange(len(dealt))
    rows = np.argsort(place[member], kind="stable")
    ends = np.cumsum(sizes[dealt])
    middles = ends - sizes[dealt] / 2
    fifth = count // 5
    wanted = min(fifth, most[0])
    first = int(np.clip(np.searchsorted(middles, wanted), 1, len(sizes) - 2))
    second = int(np.clip(np.searchsorted(middles, wanted + min(fifth, most[1])), first + 1, len(sizes) - 1))
    calibrate, select, rest = np.split(rows, [ends[first - 1], ends[second - 1]])
    if groups is not None:  # so that a limit takes some of each group, not all of the first ones
        calibrate, select = order.permutation(calibrate), order.permutation(select)
    return calibrate[:MAX_CALIBRATE], select[:MAX_SELECT], rest


def _of_x(data: Data, rows: Array) -> Part:
    return _take(data.x, data.y, data.groups, rows, "x")


def _take(x: Array, y: Array | None, groups: Array | None, rows: Array, source: str) -> Part:
    return Part(
        np.ascontiguousarray(x[rows]),
        None if y is None else y[rows],
        rows,
        source,
        None if groups is None else groups[rows],
    )
