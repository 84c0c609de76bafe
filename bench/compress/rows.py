"""The rows of the bench: which model, which data, and how good the result has to be."""

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import data, splits
from compress.data import Splits

Array = NDArray[Any]
SEED = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The goal, and in `least` what a landing must show: ratio of the file, of the package, and speed."""

    goal: tuple[float, float, float]
    least: tuple[float, float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row. `net` and `weights` name the torch form that tools other than ours need."""

    name: str
    title: str
    model: str
    net: str
    weights: str | None
    arrays: Callable[[Any], dict[str, Array]]
    training: str
    wanted: Wanted
    teacher: str | None = None
    trains: bool = False
    whole_set: bool = False  # the accuracy on all of x, as published, is stated too


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A row's data on disk: as a user gives it to us, and cut into our own parts, less report, for the others."""

    given: Path
    parts: Path
    splits: Splits
    x: Array
    y: Array
    key: str


def cifar(load: Any) -> dict[str, Array]:
    """Return the 5,000 test images and the 30,000 training images."""
    (x, y), first, more = load.cifar("test5000"), load.cifar("train10000"), load.cifar("train_more20000")
    return {
        "x": x,
        "y": y,
        "x_train": np.concatenate([first[0], more[0]]),
        "y_train": np.concatenate([first[1], more[1]]),
    }


def plain(x: Array, y: Array) -> dict[str, Array]:
    """Return a set that comes without training data."""
    return {"x": x, "y": y}


def imu(load: Any) -> dict[str, Array]:
    """Return the watch's windows, each with the number of the recording that it was cut from."""
    (x, y), (x_train, y_train) = load.imu(test=True), load.imu(test=False)
    pack = np.load(Path(load.__file__).parent / "watch_imu" / "watch_imu.npz")
    windows = [len(range(0, length - 199, 50)) for length in pack["lengths"]]  # as load.py cuts them
    tested = np.isin(pack["subject"], pack["test_subjects"])
    at = np.arange(len(windows))
    groups, groups_train = (np.repeat(at[part], np.array(windows)[part]) for part in (tested, ~tested))
    return {"x": x, "y": y, "x_train": x_train, "y_train": y_train, "groups": groups, "groups_train": groups_train}


def rows() -> tuple[Row, ...]:
    """Return the six rows, in the order of the table."""
    resnet20 = ("cifar10jpeg/resnet20_cifar10jpeg.onnx", "resnet20", "cifar10jpeg/resnet20_cifar10jpeg.pth")
    resnet56 = ("cifar10jpeg/resnet56_cifar10jpeg.onnx", "resnet56", "cifar10jpeg/resnet56_cifar10jpeg.pth")
    return (
        Row(
            "resnet56", "ResNet-56, CIFAR", *resnet56, cifar, "30,000 images",
            Wanted((16, 20, 3.5), (12, 16, 2.5)), trains=True,
        ),
        Row(
            "resnet20-taught", "ResNet-20, CIFAR, ResNet-56 as teacher", *resnet20, cifar,
            "30,000 images", Wanted((12, 16, 3), (9, 12, 2.3)), teacher=resnet56[0], trains=True,
        ),
        Row(
            "resnet20", "ResNet-20, CIFAR", *resnet20, lambda load: plain(*load.cifar("test5000")), "none, calibration only",
            Wanted((6.5, 8, 2), (5, 6.5, 1.9)),
        ),
        Row(
            "efficientnet", "EfficientNet-Lite0, ImageNet sample", "imagenet/efficientnet_lite0.onnx",
            "efficientnet_lite0", None, lambda load: plain(*load.imagenet()), "none", Wanted((7.5, 9, 2.2), (6, 7, 1.8)),
        ),
        Row(
            "keywords", "DS-CNN, keywords", "mlperf_tiny/kws_dscnn.onnx", "kws", "mlperf_tiny/kws_dscnn.pth",
            lambda load: plain(*load.keywords()), "none", Wanted((4, 6, 1), (3, 4.5, 1)), whole_set=True,
        ),
        Row(
            "imu", "watch IMU CNN", "watch_imu/har_watch_cnn.onnx", "imu", "watch_imu/har_watch_cnn.pth", imu,
            "2,997 windows", Wanted((9, 12, 2.2), (7, 9, 1.9)), trains=True,
        ),
    )  # fmt: skip


def loader(reference: Path) -> Any:
    """Return the reference folder's `load.py` as a module.

    Raises:
        FileNotFoundError: there is none.
    """
    path = reference / "load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no load.py in {reference}: set SKERRY_REFERENCE")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(row: Row, load: Any, work: Path) -> Prepared:
    """Write a row's data under `work`, once for each content, and return it cut as `compress` cuts it."""
    arrays = row.arrays(load)
    cut = splits.split(data.load(arrays), SEED)
    for_others = {name: part for name, part in cut.parts().items() if name != "report"}
    held = {
        f"{name}_{key}": value for name, part in for_others.items() for key, value in (("x", part.x), ("y", part.y))
    }
    key = digest(arrays | dict(cut.hashes()))
    folder = work / "data" / key
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("given", arrays), ("parts", held)):
        if not (folder / f"{name}.npz").is_file():
            with (folder / f"{name}.part").open("wb") as file:
                np.savez(file, **content)
            (folder / f"{name}.part").rename(folder / f"{name}.npz")
    return Prepared(folder / "given.npz", folder / "parts.npz", cut, arrays["x"], arrays["y"], key)


def digest(content: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with any array, file or value in `content`."""
    total = hashlib.sha256()
    for name, value in sorted(content.items()):
        total.update(name.encode())
        if isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{value.shape}".encode())
            total.update(np.ascontiguousarray(value).data)
        elif isinstance(value, Path):
            total.update(value.read_bytes())
        else:
            total.update(json.dumps(value, sort_keys=True).encode())
    return total.hexdigest()[:16]
