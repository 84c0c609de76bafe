"""Questions to a skill on a device: arrays from a file, checked against what the skill takes, and the answer as JSON."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills.errors import FormatError, MissingExtra, NotFound, UsageError
from skills.manifest import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from skills.oip import Answer, Call

    Array = NDArray[Any]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_FILE_BYTES = 64 << 20


def read_question(file: Path, inputs: Sequence[Tensor]) -> "Call":
    """Read arrays for a skill's inputs from an .npz (by name), an .npy (its only input) or an image.

    An example without the batch's dimension is taken as a batch of one; numbers of another type are refused, as the device
    does: a cast could change them.

    Raises:
        NotFound, UsageError: no such file, or one of another kind.
        FormatError: what it holds is not what the skill takes.
    """
    import numpy as np

    from skills.oip import DTYPES, Call

    if not file.is_file():
        raise NotFound(f"{file} does not exist")
    suffix = file.suffix.lower()
    try:
        if suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        elif suffix == ".npy":
            found = {_only(inputs, file).name: np.load(file, allow_pickle=False)}
        elif suffix in IMAGES:
            tensor = _only(inputs, file)
            found = {tensor.name: _picture(file, tensor)}
        else:
            raise UsageError(f"{file} is of an unknown kind: give an .npz, an .npy or an image ({', '.join(IMAGES)})")
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file} cannot be read: {error}") from None
    if len(found) == 1 and len(inputs) == 1:
        found = {inputs[0].name: next(iter(found.values()))}
    if absent := [tensor.name for tensor in inputs if tensor.name not in found]:
        raise FormatError(f"{file} lacks the input {absent[0]}, it has {', '.join(found) or 'nothing'}")
    return Call({tensor.name: _fitted(found[tensor.name], tensor, np.dtype(DTYPES[tensor.dtype])) for tensor in inputs})


def answer_json(answer: "Answer") -> dict[str, Any]:
    """Return the outputs as plain lists."""
    return {name: {"shape": list(array.shape), "data": array.tolist()} for name, array in answer.arrays.items()}


def _only(inputs: Sequence[Tensor], file: Path) -> Tensor:
    if len(inputs) != 1:
        names = ", ".join(tensor.name for tensor in inputs)
        raise UsageError(
            f"the skill takes {len(inputs)} inputs ({names}): give an .npz with all of them, not {file.name}"
        )
    return inputs[0]


def _fitted(array: "Array", tensor: Tensor, dtype: Any) -> "Array":
    import numpy as np

    from skills.oip import datatype

    if tensor.shape[:1] == (-1,) and _fits(array.shape, tensor.shape[1:]):
        array = array[None]
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if (kind := datatype(array)) != tensor.dtype or not _fits(array.shape, tensor.shape):
        save = "" if kind == tensor.dtype else f" (if those numbers are meant: save them .astype('{dtype}'))"
        raise FormatError(
            f"input '{tensor.name}' is {kind} {list(array.shape)}, "
            f"the skill takes {tensor.dtype} {list(tensor.shape)}{save}"
        )
    return np.ascontiguousarray(array, dtype)


def _fits(shape: Sequence[int], pattern: Sequence[int]) -> bool:
    return len(shape) == len(pattern) and all(want in (-1, have) for want, have in zip(pattern, shape, strict=True))


def _picture(file: Path, tensor: Tensor) -> "Array":
    """Return an image in the size and layout of an input of pixels (UINT8), the middle of it when the sides do not fit."""
    import numpy as np

    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtra("Pillow is not installed: pip install 'skerry[cloud]'") from None
    if tensor.dtype != "UINT8" or len(tensor.shape) != 4:
        raise UsageError(
            f"the skill takes {tensor.name} as {tensor.dtype} numbers, not as pixels: give them in an .npy or .npz"
        )
    first = tensor.shape[1] in (1, 3)
    channels = tensor.shape[1] if first else tensor.shape[3]
    height, width = (tensor.shape[2], tensor.shape[3]) if first else (tensor.shape[1], tensor.shape[2])
    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(ImageOps.fit(upright, (width, height)), np.uint8).reshape(height, width, channels)
    return pixels.transpose(2, 0, 1) if first else pixels
