"""The only door to activation coding: the tensors of a cut to one packed frame, and back.

A frame is `SK`, version, number of tensors; then per tensor its free sizes (u32 each) and the length of its bytes (u32);
then the bytes. Kinds, scales, zero points and fixed sizes stand in the split plan, never on the wire, and a frame that
does not fit the plan to the byte is a FormatError. numpy, Pillow and zstd come in with the first call.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skills import rice, zstd
from skills.coding import CODED_KINDS, TOP, Coding, Image, Live
from skills.errors import FormatError, MissingExtra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

MAGIC = b"SK"
VERSION = 1
ZSTD_LEVEL = 1  # higher levels gain about one percent on activations and cost twice the time
MAX_DECODED_BYTES = 64 << 20
PCM_TOP, PCM_ZERO = 65_535, 32_768
PCM_STEPS = (1, 32_768, 32_767)  # counts as they are; sound from -1 to 1 as most libraries read 16 bits; as some do
PCM_TOLERANCE = 1e-3
DTYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip


def encode(coding: Coding, tensors: Sequence[Live], arrays: Mapping[str, "Array"]) -> bytes:
    """Return one frame with the arrays of `tensors`, in that order.

    Raises:
        FormatError: an array is missing, has another type or shape than the plan says, or cannot travel (`obstacle`).
    """
    if why := obstacle(tensors, arrays):
        raise FormatError(why)
    parts, bodies = [struct.pack(">2sBB", MAGIC, VERSION, len(tensors))], []
    for at, live in enumerate(tensors):
        array = fitting(live, arrays)
        body = _encode_one(coding, at, live, array)
        free = [size for size, said in zip(array.shape, live.shape, strict=True) if said == -1]
        parts.append(struct.pack(f">{len(free) + 1}I", *free, len(body)))
        bodies.append(body)
    return b"".join(parts + bodies)


def obstacle(tensors: Sequence[Live], arrays: Mapping[str, "Array"]) -> str:
    """Return why arrays that fit the plan cannot travel (empty, not finite, too large), in a sentence; empty where they can.

    Raises:
        FormatError: an array is missing, or has another type or shape than the plan says.
    """
    total = 0
    for live in tensors:
        array = _checked_type(live, arrays)
        if array.size == 0:
            return f"the tensor {live.name!r} is empty {array.shape}: there is nothing to send"
        if not _finite(array):
            return f"the tensor {live.name!r} holds NaN or infinity"
        total += array.nbytes
    return f"the tensors have {total} bytes, a frame at most {MAX_DECODED_BYTES}" if total > MAX_DECODED_BYTES else ""


def decode(
    coding: Coding, tensors: Sequence[Live], frame: bytes | memoryview, max_bytes: int = MAX_DECODED_BYTES
) -> dict[str, "Array"]:
    """Return the arrays of a frame by name, which may be written to; never produces more than `max_bytes`.

    Raises:
        FormatError: anything about the frame that does not fit `coding` and `tensors`.
    """
    view = memoryview(frame)
    at, heads = _heads(tensors, view)
    decoded = _total(tensors, heads)
    if decoded > max_bytes or any(size == 0 for shape, _ in heads for size in shape):
        raise FormatError(f"an activation frame unpacks to {decoded} bytes, allowed are 1 to {max_bytes}")
    arrays = {}
    for index, (live, (shape, length)) in enumerate(zip(tensors, heads, strict=True)):
        arrays[live.name] = _decode_one(coding, index, live, shape, view[at : at + length])
        at += length
    return arrays


def decoded_bytes(tensors: Sequence[Live], frame: bytes | memoryview) -> int:
    """Return how many bytes a frame says that it unpacks to, before any of it is unpacked.

    Raises:
        FormatError: its header does not fit `tensors`.
    """
    return _total(tensors, _heads(tensors, memoryview(frame))[1])


def _heads(tensors: Sequence[Live], view: memoryview) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    """Return where a frame's bodies begin, and the shape and the body's length of each tensor."""
    if len(view) < 4 or bytes(view[:2]) != MAGIC or view[2] != VERSION or view[3] != len(tensors):
        raise FormatError(f"not an activation frame of version {VERSION} with {len(tensors)} tensors")
    at, heads = 4, []
    for live in tensors:
        free = live.shape.count(-1)
        if len(view) < at + 4 * (free + 1):
            raise FormatError("an activation frame is cut short")
        *sizes, length = struct.unpack_from(f">{free + 1}I", view, at)
        at += 4 * (free + 1)
        heads.append((_filled(live, sizes), length))
    if len(view) != at + sum(length for _, length in heads):
        raise FormatError(
            f"an activation frame has {len(view)} bytes, its header says {at + sum(length for _, length in heads)}"
        )
    return at, heads


def _total(tensors: Sequence[Live], heads: Sequence[tuple[tuple[int, ...], int]]) -> int:
    return sum(math.prod(shape) * itemsize(live) for live, (shape, _) in zip(tensors, heads, strict=True))


def whole(tensors: Sequence[Live], arrays: Mapping[str, "Array"]) -> "dict[str, Array]":
    """Return the arrays of `tensors`, which may travel as they are: what a server of the open protocol takes.

    Raises:
        FormatError: as `encode`.
    """
    return {live.name: _checked(live, arrays) for live in tensors}


def encode_reply(
    codings: Sequence[Coding], tensors: Sequence[Live], name: str, arrays: Mapping[str, "Array"]
) -> bytes | None:
    """Return an answer as a frame in the coding called `name`, None where it goes back raw.

    Raw goes what asks for no coding of `codings`, is empty or not finite, lies beyond the range that the coding was
    calibrated for (a clipped score would be a wrong answer), or becomes no smaller.
    """
    coding = next((one for one in codings if one.name == name), None)
    if coding is None:
        return None
    try:
        checked = {live.name: _checked(live, arrays) for live in tensors}
        if not all(array.size for array in checked.values()):
            return None
        if not all(_in_range(coding, at, checked[live.name]) for at, live in enumerate(tensors)):
            return None
        frame = encode(coding, tensors, checked)
    except FormatError:
        return None
    return frame if len(frame) < sum(array.nbytes for array in checked.values()) else None


def decode_reply(coding: Coding, tensors: Sequence[Live], arrays: Mapping[str, "Array"]) -> dict[str, "Array"]:
    """Return the outputs of an answer that came as one UINT8 tensor [n], the frame.

    Raises:
        FormatError: it is something else, or its frame does not fit `coding` and `tensors`.
    """
    (frame,) = arrays.values() if len(arrays) == 1 else (None,)
    if frame is None or frame.ndim != 1 or frame.dtype != "uint8":
        raise FormatError("a coded answer is one UINT8 tensor of one dimension, the packed frame")
    return decode(coding, tensors, frame.data)


def calibrated(kind: str, samples: "Array") -> tuple[float, int]:
    """Return (scale, zero point) of an affine coding: the whole range, for u4 all but the outermost 0.1 %.

    Zero is exactly representable, so what a ReLU has cleared stays clear. Sound that was recorded in 16 bits, and raw
    counts of a sensor, are recognised, and 16-bit codes carry them without any loss.
    """
    import numpy as np

    values = np.asarray(samples, np.float32).ravel()
    top = TOP[kind]
    if top == PCM_TOP:
        for step in PCM_STEPS:
            codes = values.astype(np.float64) * step
            whole = np.abs(codes - np.rint(codes)).max(initial=0.0) < PCM_TOLERANCE
            if whole and codes.min(initial=0.0) >= -PCM_ZERO and codes.max(initial=0.0) < PCM_ZERO:
                return float(np.float32(1 / step)), PCM_ZERO
    if kind == "u4":
        low, high = (float(value) for value in np.percentile(values, (0.1, 99.9)))
    else:
        low, high = float(values.min()), float(values.max())
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / top or 1.0
    return float(np.float32(scale)), round(-low / scale)


def pixels(image: Image, array: "Array") -> "NDArray[np.uint8]":
    """Return the pictures behind a normalised float input, as uint8 in (N, H, W, C)."""
    import numpy as np

    mean, std = _per_channel(image)
    values = array * std
    values += mean
    codes = np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)
    return np.ascontiguousarray(codes.transpose(0, 2, 3, 1) if image.layout == "NCHW" else codes)


def normalised(image: Image, picture: "NDArray[np.uint8]", dtype: str) -> "Array":
    """Return the model's input for pictures in (N, H, W, C): the inverse of `pixels`."""
    import numpy as np

    mean, std = _per_channel(image)
    turned = np.ascontiguousarray(picture.transpose(0, 3, 1, 2)) if image.layout == "NCHW" else picture
    values = turned.astype(np.float32)
    values -= mean
    values /= std
    return values.astype(DTYPES[dtype], copy=False)


def _encode_one(coding: Coding, at: int, live: Live, array: "Array") -> bytes:
    import numpy as np

    if coding.kind == "native" or (coding.kind in CODED_KINDS and array.dtype.kind != "f"):
        return zstd.compress(np.ascontiguousarray(array).tobytes(), ZSTD_LEVEL)
    if coding.kind in CODED_KINDS:
        codes = _codes(coding, at, array)
        if coding.kind == "rice":
            return rice.encode(_rows(codes))
        if coding.kind == "u16":
            return zstd.compress(_planes(codes), ZSTD_LEVEL)
        if coding.kind == "u4":
            even = np.append(codes, np.uint8(0)) if codes.size % 2 else codes
            return zstd.compress((even[0::2] | even[1::2] << 4).tobytes(), ZSTD_LEVEL)
        return zstd.compress(codes.tobytes(), ZSTD_LEVEL)
    picture = pixels(_image(live), array)
    if coding.kind == "pixels":
        return picture.tobytes()
    return b"".join(struct.pack(">I", len(file)) + file for file in (_picture_file(coding, one) for one in picture))


def _decode_one(coding: Coding, at: int, live: Live, shape: tuple[int, ...], body: memoryview) -> "Array":
    import numpy as np

    count, dtype = math.prod(shape), np.dtype(DTYPES[live.dtype])
    codes: Array
    if coding.kind == "native" or (coding.kind in CODED_KINDS and dtype.kind != "f"):
        raw = bytearray(_exactly(zstd.decompress(body, count * dtype.itemsize), count * dtype.itemsize))
        array = np.frombuffer(raw, dtype).reshape(shape)
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise FormatError(f"the tensor {live.name!r} holds NaN or infinity")
        if dtype.kind == "b" and (np.frombuffer(raw, np.uint8) > 1).any():
            raise FormatError(f"the tensor {live.name!r} is BOOL and holds other values than 0 and 1")
        return array
    if coding.kind == "u8":
        codes = np.frombuffer(_exactly(zstd.decompress(body, count), count), np.uint8)
    elif coding.kind == "u16":
        planes = np.frombuffer(_exactly(zstd.decompress(body, 2 * count), 2 * count), np.uint8).reshape(2, count)
        codes = planes[0].astype(np.uint16) | planes[1].astype(np.uint16) << 8
    elif coding.kind == "rice":
        axis, time = _time(shape)
        rows = rice.decode(body, count // time, time)
        turned = rows.reshape([*(size for at_, size in enumerate(shape) if at_ != axis), time])
        codes = np.ascontiguousarray(np.moveaxis(turned, -1, axis)).ravel()
    elif coding.kind == "u4":
        packed = np.frombuffer(_exactly(zstd.decompress(body, (count + 1) // 2), (count + 1) // 2), np.uint8)
        codes = np.stack((packed & 15, packed >> 4), 1).ravel()[:count]
    else:
        return normalised(_image(live), _read_pictures(coding, live, shape, body), live.dtype)
    with np.errstate(over="ignore"):
        values = (codes.astype(np.float32) - np.float32(coding.zeros[at])) * np.float32(coding.scales[at])
    if not np.isfinite(values).all():
        raise FormatError(f"the tensor {live.name!r} does not fit its scale of {coding.scales[at]:g}")
    return values.reshape(shape).astype(dtype, copy=False)


def _codes(coding: Coding, at: int, array: "Array") -> "Array":
    """Return the codes of an affine coding; those of `rice` keep their shape (rank 0 becomes 1), the others lie in a row."""
    import numpy as np

    top = TOP[coding.kind]
    values = np.atleast_1d(array) * np.float32(1 / coding.scales[at])
    values += np.float32(coding.zeros[at])
    codes = np.clip(np.rint(values, out=values), 0, top, out=values).astype(np.uint8 if top < 256 else np.uint16)
    return codes if coding.kind == "rice" else codes.ravel()


def _in_range(coding: Coding, at: int, array: "Array") -> bool:
    """Say whether an affine coding is off by a step at most, because no value has to be clipped further."""
    if coding.kind not in CODED_KINDS or array.dtype.kind != "f":
        return True
    low, high = (code * coding.scales[at] for code in (-1 - coding.zeros[at], TOP[coding.kind] + 1 - coding.zeros[at]))
    return low <= float(array.min()) and float(array.max()) <= high


def _planes(codes: "Array") -> bytes:
    """Return the low bytes, then the high ones: the high ones hardly change, and zstd sees that."""
    import numpy as np

    return bytes((codes & 255).astype(np.uint8).tobytes() + (codes >> 8).astype(np.uint8).tobytes())


def _time(shape: Sequence[int]) -> tuple[int, int]:
    """Return which axis samples follow each other on, and its length: the longest but the batch; the last one wins a tie."""
    if len(shape) < 2:
        return 0, shape[0] if shape else 1
    axis = max(range(1, len(shape)), key=lambda at: (shape[at], at))
    return axis, shape[axis]


def _rows(codes: "Array") -> "Array":
    import numpy as np

    axis, time = _time(codes.shape)
    return np.moveaxis(codes, axis, -1).reshape(-1, time)


def _read_pictures(coding: Coding, live: Live, shape: tuple[int, ...], body: memoryview) -> "NDArray[np.uint8]":
    import numpy as np

    image = _image(live)
    count, height, width, channels = (shape[0], *shape[2:], shape[1]) if image.layout == "NCHW" else shape
    if coding.kind == "pixels":
        return np.frombuffer(_exactly(bytes(body), math.prod(shape)), np.uint8).reshape(count, height, width, channels)
    found, at = np.empty((count, height, width, channels), np.uint8), 0
    for index in range(count):
        length = struct.unpack_from(">I", body, at)[0] if len(body) >= at + 4 else 0
        if not 0 < length <= len(body) - at - 4:
            raise FormatError("an activation frame's pictures are cut short")
        found[index] = _read_picture(coding, body[at + 4 : at + 4 + length], (height, width, channels))
        at += 4 + length
    if at != len(body):
        raise FormatError("an activation frame has something behind its pictures")
    return found


def _picture_file(coding: Coding, picture: "NDArray[np.uint8]") -> bytes:
    import io

    file = io.BytesIO()
    image = _pillow().fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    if coding.kind == "jpeg":
        # From 95 on colour keeps its full resolution, as people who ask for that quality expect; below, 4:2:0 is what all send.
        image.save(file, "JPEG", quality=coding.quality, subsampling=0 if coding.quality >= 95 else 2)
    else:
        image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _read_picture(coding: Coding, file: memoryview, shape: tuple[int, int, int]) -> "NDArray[np.uint8]":
    import io
    import zlib

    import numpy as np

    height, width, channels = shape
    # Pillow answers damaged files with any of these; the size is checked before a pixel is decoded.
    damaged = (
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        zlib.error,
        Warning,
    )
    try:
        pillow = _pillow()
        with pillow.open(io.BytesIO(file), formats=["JPEG" if coding.kind == "jpeg" else "PNG"]) as image:
            mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
            if image.size != (width, height) or image.mode != mode or image.info.get("progressive"):
                raise FormatError(
                    f"a picture of {image.size[0]}x{image.size[1]} {image.mode} came, the plan says {width}x{height} {mode}"
                )
            array = np.asarray(image, np.uint8)
    except damaged as error:
        raise FormatError(f"a {coding.kind} picture is damaged: {error}") from None
    except pillow.DecompressionBombError as error:
        raise FormatError(f"a {coding.kind} picture is too large: {error}") from None
    return array.reshape(shape)


def fitting(live: Live, arrays: Mapping[str, "Array"]) -> "Array":
    """Return the array of a tensor, which has the type, rank and sizes that the plan says; its values may be any.

    Raises:
        FormatError: it is missing, or has not.
    """
    import numpy as np

    if live.name not in arrays:
        raise FormatError(f"the tensor {live.name!r} is missing, there are {', '.join(arrays) or 'none'}")
    array = np.asarray(arrays[live.name])
    fits = len(array.shape) == len(live.shape) and all(
        said in (-1, size) for size, said in zip(array.shape, live.shape, strict=True)
    )
    if not fits or str(array.dtype) != DTYPES.get(live.dtype, "object"):
        raise FormatError(
            f"the tensor {live.name!r} is {array.dtype} {array.shape}, the plan says {live.dtype} {live.shape}"
        )
    return array


def _checked(live: Live, arrays: Mapping[str, "Array"]) -> "Array":
    array = _checked_type(live, arrays)
    if not _finite(array):
        raise FormatError(f"the tensor {live.name!r} holds NaN or infinity")
    return array


def _checked_type(live: Live, arrays: Mapping[str, "Array"]) -> "Array":
    array = fitting(live, arrays)
    itemsize(live)
    return array


def _finite(array: "Array") -> bool:
    import numpy as np

    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _filled(live: Live, sizes: Sequence[int]) -> tuple[int, ...]:
    free = iter(sizes)
    return tuple(next(free) if said == -1 else said for said in live.shape)


def itemsize(live: Live) -> int:
    """Return how many bytes one value of a tensor has.

    Raises:
        FormatError: values of its type have no fixed size, so no coding carries them.
    """
    import numpy as np

    if live.dtype not in DTYPES:
        raise FormatError(f"the tensor {live.name!r} is {live.dtype}, which no coding carries")
    return np.dtype(DTYPES[live.dtype]).itemsize


def _exactly(raw: bytes, size: int) -> bytes:
    if len(raw) != size:
        raise FormatError(f"a tensor has {len(raw)} bytes, the plan says {size}")
    return raw


def _image(live: Live) -> Image:
    if live.image is None or len(live.shape) != 4:
        raise FormatError(f"the tensor {live.name!r} is no image of four dimensions")
    return live.image


def _per_channel(image: Image) -> tuple["Array", "Array"]:
    import numpy as np

    shape = (-1, 1, 1) if image.layout == "NCHW" else (-1,)
    return np.asarray(image.mean, np.float32).reshape(shape), np.asarray(image.std, np.float32).reshape(shape)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError:
        raise MissingExtra("Pillow is not installed: pip install 'skerry[edge]'") from None
    return PIL.Image
