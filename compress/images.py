"""A folder of class folders of images, and the `data.yaml` beside them that says how a picture becomes an input."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from compress.data import MAX_INPUT_BYTES
from compress.graph import Array
from skills.errors import FormatError, MissingExtra, NotFound
from skills.files import read_bytes
from skills.wire import Doc, Limits, decode_yaml

MAX_YAML_BYTES = 64 << 10
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HALVES = ("test", "train")
Side = Annotated[int, Limits(min=1, max=8192)]


@dataclasses.dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes an input: resized, cut in the middle, then (pixel x scale - mean) / std with pixels 0..255."""

    size: Annotated[tuple[Side, Side], Doc("height and width that the model takes")]
    resize: Annotated[
        Literal["short_side", "stretch", "none"],
        Doc("short_side keeps the proportions, stretch does not, none only cuts"),
    ] = "short_side"
    crop: Annotated[
        float, Doc("share of the resized sides that is kept, as 224 / 256 = 0.875"), Limits(min=0.05, max=1)
    ] = 1.0
    filter: Annotated[
        Literal["nearest", "box", "bilinear", "bicubic", "lanczos"], Doc("Pillow's resampling, antialiased")
    ] = "bilinear"
    colour: Annotated[Literal["RGB", "BGR", "L"], Doc("order of the channels, L is grey")] = "RGB"
    layout: Annotated[Literal["NCHW", "NHWC"], Doc("where the channels stand")] = "NCHW"
    dtype: Annotated[Literal["float32", "uint8"], Doc("uint8 gives the pixels as they are")] = "float32"
    scale: Annotated[float, Doc("pixels are multiplied by it first; the default is 1 / 255")] = 1 / 255
    mean: Annotated[tuple[float, ...], Doc("then subtracted, one for all channels or one each")] = (0.0,)
    std: Annotated[tuple[float, ...], Doc("then divided by, one for all channels or one each")] = (1.0,)

    def __post_init__(self) -> None:
        """Hold the fields against each other.

        Raises:
            FormatError: a wrong number of channels, a zero to divide by, or a scale where pixels stay as they are.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise FormatError(f"{name} has {len(values)} entries, {self.colour} has {self.channels} channels")
        if not all(self.std):
            raise FormatError("std holds a zero, it is divided by")
        if self.dtype == "uint8" and (self.mean, self.std) != ((0.0,), (1.0,)):
            raise FormatError("dtype uint8 gives the pixels as they are: leave mean and std out")
        if self.resize == "none" and self.crop != 1:
            raise FormatError("resize none cuts out exactly 'size': leave crop out")

    @property
    def channels(self) -> int:
        """Return how many channels a picture has."""
        return 1 if self.colour == "L" else 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of one input."""
        height, width = self.size
        return (self.channels, height, width) if self.layout == "NCHW" else (height, width, self.channels)

    def apply(self, picture: Any) -> Array:
        """Return one input for a picture that Pillow opened.

        Raises:
            FormatError: it is smaller than `size` and may not be resized.
        """
        picture = self._cut(picture.convert("L" if self.colour == "L" else "RGB"))
        pixels: Array = np.asarray(picture, np.uint8).reshape(*self.size, self.channels)
        if self.colour == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.dtype == "float32":
            scaled = pixels.astype(np.float32) * np.float32(self.scale)
            pixels = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.layout == "NCHW" else pixels)

    def _cut(self, picture: Any) -> Any:
        from PIL import Image

        height, width = self.size
        if self.resize != "none":
            # The same roundings as torchvision's Resize and CenterCrop, so that its nets see what they were trained on.
            tall, wide = (math.floor(side / self.crop + 1e-6) for side in self.size)
            if self.resize == "short_side":
                factor = max(tall / picture.height, wide / picture.width)
                tall, wide = (
                    max(tall, int(picture.height * factor + 1e-6)),
                    max(wide, int(picture.width * factor + 1e-6)),
                )
            picture = picture.resize((wide, tall), Image.Resampling[self.filter.upper()])
        if picture.height < height or picture.width < width:
            raise FormatError(
                f"is {picture.height} x {picture.width}, expected at least {height} x {width} without resizing"
            )
        top, left = round((picture.height - height) / 2), round((picture.width - width) / 2)
        return picture.crop((left, top, left + width, top + height))


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFolder(Preprocessing):
    """`data.yaml`: how the pictures beside it become inputs, what their labels are, and what they are judged by."""

    classes: Annotated[
        tuple[str, ...],
        Doc("class folders in the order of the model's outputs; without it numbers name themselves, else by name"),
    ] = ()
    metric: Annotated[str | None, Doc("a shipped metric, in place of the one that fits the labels")] = None
    format: Literal["data/v1"] = "data/v1"

    def preprocessing(self) -> Preprocessing:
        """Return only what makes an input of a picture."""
        return Preprocessing(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Preprocessing)})


def read_folder(folder: Path) -> dict[str, Any]:
    """Read all pictures of a folder, preprocessed, as a mapping with the keys of `compress.data.load`.

    The folder holds `data.yaml` and either class folders, or `train/` and `test/` with class folders each, or pictures
    alone (then there are no labels). They are decoded one after the other into one array.

    Raises:
        NotFound: there is no `data.yaml`.
        FormatError: it is wrong, a class folder is empty, a picture cannot be read, or they need more than 4 GiB.
        MissingExtra: Pillow is not installed.
    """
    path = folder / "data.yaml"
    if not path.is_file():
        raise NotFound(f"{folder} has no data.yaml that says how its images become inputs: it needs at least size")
    rules = decode_yaml(ImageFolder, read_bytes(path, "data.yaml", MAX_YAML_BYTES).decode(errors="replace"), str(path))
    halves = {half: folder / half for half in HALVES} if _folders(folder) == sorted(HALVES) else {"test": folder}
    names = sorted({name for at in halves.values() for name in _folders(at)})
    labels = _labels(names, rules, path)
    files = {half: _files(at, labels) for half, at in halves.items()}
    wanted = sum(map(len, files.values()))
    one = math.prod(rules.shape) * np.dtype(rules.dtype).itemsize
    if wanted * one > MAX_INPUT_BYTES:
        raise FormatError(
            f"{folder} has {wanted} images, {wanted * one / 2**30:.1f} GiB as inputs of {rules.dtype} {list(rules.shape)}: "
            f"the limit is {MAX_INPUT_BYTES >> 30} GiB, {MAX_INPUT_BYTES // one} images of this size"
        )
    found: dict[str, Any] = {"preprocessing": rules.preprocessing(), "metric": rules.metric}
    for half, pairs in files.items():
        suffix = "" if half == "test" else "_train"
        found["x" + suffix] = _decoded([file for file, _ in pairs], rules)
        if labels:
            found["y" + suffix] = np.array([label for _, label in pairs], np.int64)
    return found


def _folders(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        item for item in folder.iterdir() if item.suffix.lower() in SUFFIXES and not item.name.startswith(".")
    )


def _labels(names: Sequence[str], rules: ImageFolder, path: Path) -> dict[str, int]:
    if not rules.classes:
        numbered = all(name.isdecimal() for name in names)
        return {name: int(name) if numbered else at for at, name in enumerate(names)}
    order = {name: at for at, name in enumerate(rules.classes)}
    strange = [name for name in names if name not in order]
    if strange:
        raise FormatError(f"{path}: classes does not list the class folder '{strange[0]}'")
    return {name: order[name] for name in names}


def _files(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """Return the pictures with their labels (-1 without class folders), in the order of labels and names."""
    if labels and (loose := _pictures(folder)):
        raise FormatError(f"{loose[0]} is in no class folder, {folder} has {len(_folders(folder))} of them")
    found = []
    for name, label in sorted(labels.items(), key=lambda item: item[1]) or [("", -1)]:
        at = folder / name
        pictures = _pictures(at) if at.is_dir() else []
        if not pictures:
            inside = f", only folders ({', '.join(_folders(at)[:3])})" if at.is_dir() and _folders(at) else ""
            raise FormatError(
                f"{at} has no image in it{inside}: expected {', '.join(SUFFIXES[:4])} … files of one class"
            )
        found += [(picture, label) for picture in pictures]
    return found


def _decoded(files: Sequence[Path], rules: Preprocessing) -> Array:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("images need Pillow: pip install 'skerry[compress]'") from None
    x = np.empty((len(files), *rules.shape), rules.dtype)
    for at, file in enumerate(files):
        try:
            with Image.open(file) as picture:
                x[at] = rules.apply(picture)
        except FormatError as error:
            raise FormatError(f"the image {file} {error}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise FormatError(f"the image {file} cannot be read: {str(error).splitlines()[0]}") from None
    return x
