"""Data that the user's own code makes: a callable without arguments that returns or yields batches.

    def batches():
        yield {"x": x, "y": y}                     # a batch: x, (x, y), or a mapping with x and, if known, y and groups
        yield {"x": x, "y": y, "split": "train"}   # "test" (reported on) or "train"; without it: test

    batches.metric = "macro_f1"                    # a shipped metric, or a function (outputs, y) -> marks or one number

It may also return one batch, the mapping of whole arrays that an `.npz` would hold, or a pair (any of these, metric).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from compress import references
from compress.data import ARRAYS, MAX_INPUT_BYTES, shape
from compress.graph import Array
from skills.errors import FormatError

SPLITS = ("test", "train")
ROW_KEYS = ("x", "y", "groups")


def collect(reference: str) -> dict[str, Any]:
    """Return the arrays that the named callable gives, and its metric, as a mapping with the keys of `compress.data.load`.

    Raises:
        UsageError, NotFound, MissingExtra: as `references.find`.
        FormatError: it raised, gave something that is no batch, batches that do not fit together, or more than 4 GiB.
    """
    function = references.find(reference, "callable")
    with references.named(reference):
        made = function()
    metric = getattr(made, "metric", None) or getattr(function, "metric", None)
    if isinstance(made, tuple) and len(made) == 2 and (callable(made[1]) or isinstance(made[1], str)):
        made, metric = made
    if isinstance(made, Mapping) and "split" not in made:
        return {str(key): value for key, value in made.items()} | ({} if metric is None else {"metric": metric})
    return _joined(reference, made) | {"metric": metric}


def _joined(reference: str, made: object) -> dict[str, Any]:
    if not isinstance(made, Iterable) or isinstance(made, (str, bytes)):
        raise FormatError(f"{reference} returned {type(made).__name__}, expected batches: x, (x, y) or a mapping")
    whole = isinstance(made, (tuple, Mapping)) or hasattr(made, "__array__")  # one batch and not several
    parts: dict[str, list[Array]] = {}
    taken = 0
    steps = iter([made] if whole else made)
    at = 0
    while True:
        with references.named(reference, f" (batch {at})"):
            batch = next(steps, None)
            if batch is None:
                break
            rows = _rows(batch)
        if "x" not in rows:
            raise FormatError(
                f"{reference}: batch {at} is {type(batch).__name__}, expected x, (x, y) or a mapping with x"
            )
        split = rows.pop("split", "test")
        if split not in SPLITS or set(rows) - set(ROW_KEYS):
            known = f"x, y, groups and split ({' or '.join(SPLITS)})"
            raise FormatError(
                f"{reference}: batch {at} has the keys {', '.join(rows)} and split {split!r}, expected {known}"
            )
        for key, value in rows.items():
            with references.named(reference, f" ({key} of batch {at})"):
                array = np.asarray(value)
            name = key if split == "test" else f"{key}_train"
            _check_alike(f"{reference}: {key} of batch {at}", array, parts.get(name, [array])[0])
            parts.setdefault(name, []).append(array)
            taken += array.nbytes
        if taken > MAX_INPUT_BYTES:
            raise FormatError(
                f"{reference} gave more than {MAX_INPUT_BYTES >> 30} GiB in {at + 1} batches: end it earlier"
            )
        at += 1
    if not parts:
        raise FormatError(f"{reference} gave no batch")
    return {key: np.concatenate(parts[key]) for key in ARRAYS if key in parts}


def _rows(batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items() if value is not None}
    if isinstance(batch, (tuple, list)):
        return dict(zip(("x", "y"), batch, strict=True)) if len(batch) == 2 else {}
    return {"x": batch} if hasattr(batch, "__array__") else {}


def _check_alike(what: str, array: Array, first: Array) -> None:
    if array.ndim < 1 or array.shape[1:] != first.shape[1:] or array.dtype.kind != first.dtype.kind:
        raise FormatError(
            f"{what} is {array.dtype} {shape(array.shape)}, the first one is {first.dtype} {shape(('N', *first.shape[1:]))}"
        )
