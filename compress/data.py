"""Data as the workshop uses it: checked against the model's input, then split so that nothing is judged on what chose it."""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.graph import Array
from skills.errors import FormatError, NotFound
from skills.ort import Port

MAX_CALIBRATE = 512
MAX_SELECT = 2000
LEAST_SAMPLES = 20
KEYS = ("x", "y", "x_train", "y_train")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Some samples, with labels where they are known; `rows` says which of the source's rows they are."""

    x: Array
    y: Array | None
    rows: Array
    source: str

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint: ranges come from `calibrate`, choices from `select`, the figures of the report from `report` only."""

    calibrate: Part
    select: Part
    report: Part


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """What the user gave, checked to be arrays of matching lengths without NaN."""

    x: Array
    y: Array | None = None
    x_train: Array | None = None
    y_train: Array | None = None


def load(source: object) -> Data:
    """Read an `.npz` file or take a mapping with `x` and optionally `y`, `x_train`, `y_train`.

    Raises:
        NotFound: there is no such file.
        FormatError: not an `.npz`, an array is missing, not numeric, of the wrong length, or holds NaN.
    """
    if isinstance(source, (str, Path)):
        name, arrays = str(source), _read(Path(source))
    elif isinstance(source, Mapping):
        name, arrays = "the data", {str(key): np.asarray(value) for key, value in source.items()}
    elif isinstance(source, Data):
        return source
    else:
        raise FormatError(f"the data is {type(source).__name__}, expected an .npz file or a mapping with x and y")
    if "x" not in arrays:
        raise FormatError(
            f"{name} has the arrays {', '.join(sorted(arrays)) or 'none'}, expected x (and y, x_train, y_train)"
        )
    for x_name, y_name in (("x", "y"), ("x_train", "y_train")):
        _check(name, x_name, y_name, arrays)
    return Data(*(arrays.get(key) for key in KEYS))  # type: ignore[arg-type]  # x was checked above


def _read(path: Path) -> dict[str, Array]:
    if not path.exists():
        raise NotFound(f"there is no data file {path}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            return {key: pack[key] for key in KEYS if key in pack.files} or dict.fromkeys(pack.files, np.empty(0))
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path} is not an .npz file that can be read: {str(error).splitlines()[0]}") from None


def _check(name: str, x_name: str, y_name: str, arrays: Mapping[str, Array]) -> None:
    x, y = arrays.get(x_name), arrays.get(y_name)
    if x is None:
        if y is not None:
            raise FormatError(f"{name} has {y_name} without {x_name}")
        return
    if x.dtype.kind not in "fiub" or x.ndim < 1:
        raise FormatError(
            f"{name}: {x_name} has dtype {x.dtype} and shape {x.shape}, expected numbers, one sample a row"
        )
    if x.size == 0:
        raise FormatError(f"{name}: {x_name} has the shape {x.shape}: there is no sample in it")
    if x.dtype.kind == "f":
        bad = int(len(x) - np.isfinite(x.reshape(len(x), -1)).all(axis=1).sum())
        if bad:
            raise FormatError(f"{name}: {bad} of {len(x)} samples in {x_name} hold NaN or infinity")
    if y is not None and (y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu"):
        raise FormatError(
            f"{name}: {y_name} has shape {y.shape} and dtype {y.dtype}, expected {len(x)} whole-number labels for {x_name}"
        )


def check_fit(data: Data, port: Port, classes: int | None) -> None:
    """Hold the data against the model's input and its number of classes.

    Raises:
        FormatError: says what the model takes and what the data has.
    """
    for name, x in (("x", data.x), ("x_train", data.x_train)):
        if x is None:
            continue
        fits = len(x.shape) == len(port.shape) and all(
            want in (-1, have) for want, have in zip(port.shape[1:], x.shape[1:], strict=True)
        )
        if not fits or str(x.dtype) != port.dtype:
            raise FormatError(
                f"the model's input '{port.name}' takes {port.dtype} {_shape(port.shape)}, "
                f"{name} in the data is {x.dtype} {_shape(('N', *x.shape[1:]))}"
            )
    for name, y in (("y", data.y), ("y_train", data.y_train)):
        if y is not None and classes is not None and len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise FormatError(
                f"labels in {name} run from {y.min()} to {y.max()}, the model's output has {classes} classes (0 to {classes - 1})"
            )


def split(data: Data, seed: int) -> Splits:
    """Return disjoint calibrate, select and report parts.

    With training data the first two come from it and all of `x` is reported on; without, `x` is shuffled by `seed`
    and cut 20 : 20 : 60.

    Raises:
        FormatError: too few samples for that.
    """
    order = np.random.default_rng(seed)
    if data.x_train is not None:
        if len(data.x) < 1 or len(data.x_train) < LEAST_SAMPLES:
            raise FormatError(
                f"x_train has {len(data.x_train)} samples and x {len(data.x)}, expected at least {LEAST_SAMPLES} and 1"
            )
        rows = order.permutation(len(data.x_train))
        cut = min(MAX_CALIBRATE, len(rows) // 2)
        return Splits(
            _take(data.x_train, data.y_train, rows[:cut], "x_train"),
            _take(data.x_train, data.y_train, rows[cut : cut + MAX_SELECT], "x_train"),
            _take(data.x, data.y, np.arange(len(data.x)), "x"),
        )
    if len(data.x) < LEAST_SAMPLES:
        raise FormatError(
            f"x has {len(data.x)} samples, expected at least {LEAST_SAMPLES} to split into calibrate, select and report"
        )
    rows = order.permutation(len(data.x))
    fifth = len(rows) // 5
    calibrate = rows[: min(fifth, MAX_CALIBRATE)]
    select = rows[fifth : fifth + min(fifth, MAX_SELECT)]
    return Splits(*(_take(data.x, data.y, part, "x") for part in (calibrate, select, rows[2 * fifth :])))


def _take(x: Array, y: Array | None, rows: Array, source: str) -> Part:
    return Part(np.ascontiguousarray(x[rows]), None if y is None else y[rows].astype(np.int64), rows, source)


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"


def present(data: Data) -> dict[str, Array]:
    """Return the arrays that are there, by name."""
    found = {key: getattr(data, key) for key in KEYS}
    return {key: value for key, value in found.items() if value is not None}
