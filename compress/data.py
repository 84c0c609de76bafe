"""Data as the workshop uses it: read from where the user keeps it, and checked once against itself and the model's input."""

import dataclasses
import difflib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.graph import Array
from skills.errors import FormatError, NotFound
from skills.files import sha256_hex
from skills.ort import Port

if TYPE_CHECKING:
    from compress.images import Preprocessing

ARRAYS = ("x", "y", "x_train", "y_train", "groups", "groups_train")
MAX_INPUT_BYTES = 4 << 30  # all preprocessed inputs together: they are kept in memory
SYNTHETIC_SAMPLES = 100
EXPECTED = "an .npz with the array x (and y, x_train, y_train, groups), a folder of images with a data.yaml, or FILE.py:FUNCTION"

AskedMetric = str | Callable[[Array, Array], Any]  # a name in `metrics.METRICS`, or (outputs, y) -> marks or one number


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """What the user gave, checked: arrays of matching lengths without NaN, groups that are not in both halves.

    `y` has one row a sample: labels, or whatever the metric holds the outputs against. `groups` says which recording or
    person a sample is from. `synthetic` marks inputs that were made up because there was no data.
    """

    x: Array
    y: Array | None = None
    x_train: Array | None = None
    y_train: Array | None = None
    groups: Array | None = None
    groups_train: Array | None = None
    metric: AskedMetric | None = None
    preprocessing: "Preprocessing | None" = None
    synthetic: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Some samples, with labels and groups where they are known; `rows` says which of the source's rows they are."""

    x: Array
    y: Array | None
    rows: Array
    source: str
    groups: Array | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint: ranges and options come from `calibrate`, `select` says when to stop, the report's figures from `report`.

    Nothing is fitted to `report`; only which of the finished candidates is the result is read off it.

    `train` is what training may learn from; it is there when training data was given.
    """

    calibrate: Part
    select: Part
    report: Part
    train: Part | None = None

    def parts(self) -> Mapping[str, Part]:
        """Return the parts that there are, by name."""
        named = {"calibrate": self.calibrate, "select": self.select, "report": self.report, "train": self.train}
        return {name: part for name, part in named.items() if part is not None}

    def hashes(self) -> Mapping[str, str]:
        """Return for each part the sha256 of its source's name, a zero byte, and its rows as little-endian int64."""
        return {
            name: sha256_hex(part.source.encode() + b"\0" + part.rows.astype("<i8").tobytes())
            for name, part in self.parts().items()
        }


def load(source: object, metric: AskedMetric | None = None) -> Data:
    """Read the data; `metric` goes before the one that the data names.

    `source` is an `.npz` file, a folder of class folders with a `data.yaml` (`compress/images.py`), the text
    `file.py:callable` or `package.module:callable` (`compress/feed.py`), or a mapping with the keys of an `.npz`: `x` and
    optionally `y`, `x_train`, `y_train`, `groups`, `groups_train`, `metric`.

    Raises:
        NotFound: there is no such file, folder, module or function.
        FormatError: an array is missing, not numeric, of the wrong length, or holds NaN; an image cannot be read;
            the callable raised; `data.yaml` is wrong.
        MissingExtra: images and no Pillow.
    """
    if isinstance(source, Data):
        return source if metric is None else dataclasses.replace(source, metric=metric)
    if isinstance(source, (str, Path)):
        name, found = str(source), _read(str(source))
    elif isinstance(source, Mapping):
        name, found = "the data", {str(key): value for key, value in source.items()}
    else:
        raise FormatError(
            f"the data is {type(source).__name__}, expected an .npz file, a folder of images, module:callable, or a mapping"
        )
    _check_keys(name, found)
    try:
        arrays = {key: np.asarray(found[key]) for key in ARRAYS if found.get(key) is not None}
    except ValueError as error:
        raise FormatError(f"{name} holds rows of different sizes: {error}") from None
    for half in ("", "_train"):
        _check(name, half, arrays)
    _check_apart(name, arrays.get("groups"), arrays.get("groups_train"))
    for key in ("y", "y_train"):
        if key in arrays and arrays[key].dtype.kind in "iub":
            arrays[key] = arrays[key].astype(np.int64)
    asked = found.get("metric") if metric is None else metric
    return Data(
        **arrays,  # type: ignore[arg-type]  # its keys are among ARRAYS
        metric=asked if callable(asked) or asked is None else str(asked),
        preprocessing=found.get("preprocessing"),
    )


def synthetic(port: Port, seed: int) -> Data:
    """Return made-up inputs for a model that came without data: enough to check that what is written runs and answers alike.

    Raises:
        FormatError: the model's input has a free size besides the batch, so nothing says how large an input is.
    """
    if any(size < 1 for size in port.shape[1:]):
        raise FormatError(
            f"without data the model's input must have fixed sizes but for the batch, '{port.name}' takes {shape(port.shape)}: "
            "give data"
        )
    order = np.random.default_rng(seed)
    size = (SYNTHETIC_SAMPLES, *port.shape[1:])
    dtype = np.dtype(port.dtype)
    if dtype.kind == "f":
        x = order.standard_normal(size).astype(dtype)
    else:  # of whole numbers only 0 and 1 are safe: they may be positions in a table
        x = order.integers(0, 256 if dtype == np.uint8 else 2, size).astype(dtype)
    return Data(x, synthetic=True)


def check_fit(data: Data, port: Port) -> None:
    """Hold the data against the model's input.

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
            hint = ": see size, layout and dtype in its data.yaml" if data.preprocessing is not None else ""
            raise FormatError(
                f"the model's input '{port.name}' takes {port.dtype} {shape(port.shape)}, "
                f"{name} in the data is {x.dtype} {shape(('N', *x.shape[1:]))}{hint}"
            )


def whole_runs(port: Port, x: Array, most: int = 1) -> Array:
    """Return the first samples, at most `most` but at least one run's: a model of a fixed batch takes only whole ones."""
    batch = max(1, port.shape[0])
    return x[: max(1, most // batch) * batch]


def present(data: Data) -> dict[str, Array]:
    """Return the arrays that are there, by name."""
    found = {key: getattr(data, key) for key in ARRAYS}
    return {key: value for key, value in found.items() if value is not None}


def shape(sizes: tuple[int | str, ...]) -> str:
    """Return a shape as a sentence writes it, N for a free size."""
    return "[" + ", ".join("N" if size == -1 else str(size) for size in sizes) + "]"


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_dir():
        from compress.images import read_folder

        return read_folder(path)
    if ":" in source and not path.exists():
        from compress.feed import collect

        return collect(source)
    if not path.exists():
        raise NotFound(f"there is no data file {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise FormatError(f"{path} is not an .npz file: it {_holds(path)}; expected {EXPECTED}")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            return {key: _array(path, pack, key) if key in (*ARRAYS, "metric") else None for key in pack.files}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path} is not an .npz file that can be read: {str(error).splitlines()[0]}") from None


def _array(path: Path, pack: Mapping[str, Any], key: str) -> Any:
    try:
        return pack[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise FormatError(
            f"{path} is not an .npz file that can be read: {key} holds Python objects, expected an array of numbers"
        ) from None


def _holds(path: Path) -> str:
    """Return what a file that is no archive holds, as a sentence goes on."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty"
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        return "is one array without a name (.npy), which np.savez(FILE, x=ARRAY) makes an .npz of"
    if head.startswith(b"PK"):
        return "is an archive that was cut short"
    said = head.decode("utf-8", "replace")
    text = all(mark.isprintable() or mark.isspace() for mark in said) and "\ufffd" not in said[:-1]
    return "holds text" if text else "is of another kind"


def _check_keys(name: str, found: Mapping[str, Any]) -> None:
    for key in found:
        near = difflib.get_close_matches(key, ARRAYS, 1, 0.8)
        if key not in ARRAYS and near and near[0] not in found:
            raise FormatError(f"{name} has the array {key}, did you mean {near[0]}?")
    if found.get("x") is None:
        raise FormatError(
            f"{name} has the arrays {', '.join(sorted(found)) or 'none'}, expected x (and y, x_train, y_train, groups)"
        )


def _check(name: str, half: str, arrays: Mapping[str, Array]) -> None:
    x_name, y_name, groups_name = f"x{half}", f"y{half}", f"groups{half}"
    x, y, groups = arrays.get(x_name), arrays.get(y_name), arrays.get(groups_name)
    if x is None:
        for other in (y_name, groups_name):
            if other in arrays:
                raise FormatError(f"{name} has {other} without {x_name}")
        return
    if x.dtype.kind not in "fiub" or x.ndim < 1:
        raise FormatError(
            f"{name}: {x_name} has dtype {x.dtype} and shape {x.shape}, expected numbers, one sample a row"
        )
    if x.size == 0:
        raise FormatError(f"{name}: {x_name} has the shape {x.shape}: there is no sample in it")
    _check_finite(name, x_name, x)
    if y is not None:
        if y.dtype.kind not in "fiub" or y.ndim < 1 or len(y) != len(x):
            raise FormatError(
                f"{name}: {y_name} has shape {y.shape} and dtype {y.dtype}, expected {len(x)} rows of numbers, "
                f"one for each sample of {x_name}"
            )
        _check_finite(name, y_name, y)
    if groups is not None and (groups.ndim != 1 or len(groups) != len(x) or groups.dtype.kind not in "iuUS"):
        raise FormatError(
            f"{name}: {groups_name} has shape {groups.shape} and dtype {groups.dtype}, expected {len(x)} whole numbers or "
            f"texts, one for each sample of {x_name}"
        )


def _check_finite(name: str, key: str, values: Array) -> None:
    if values.dtype.kind == "f":
        bad = int(len(values) - np.isfinite(values.reshape(len(values), -1)).all(axis=1).sum())
        if bad:
            raise FormatError(f"{name}: {bad} of {len(values)} samples in {key} hold NaN or infinity")


def _check_apart(name: str, groups: Array | None, train: Array | None) -> None:
    if groups is None or train is None:
        return
    shared = sorted(set(groups.tolist()) & set(train.tolist()), key=str)
    if shared:
        raise FormatError(
            f"{name}: {len(shared)} groups are in both groups and groups_train ({', '.join(map(str, shared[:3]))}): "
            "what is reported on must not share a group with training; number them across both"
        )
