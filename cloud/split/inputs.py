"""What the planner is handed: a model for the runtime and as a graph, and arrays that fit its inputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills import ort
from skills.coding import Image
from skills.errors import FormatError, MissingExtra, NotFound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from compress.images import Preprocessing

    Arrays = Mapping[str, NDArray[Any]]


LEAST_SIDE = 8  # of what counts as a picture, here and in `images.recognise`


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """The data as the model's inputs, labels if there are any, and what both are called where they come from."""

    feeds: "dict[str, NDArray[Any]]"
    labels: "NDArray[Any] | None"
    source: str
    named: Mapping[str, str]  # by the model's input: what the data calls the array
    image: Image | None = None  # how pixels became values, where a data.yaml says it


def read_model(model: Path | bytes) -> tuple[bytes | Path, Any]:
    """Return the model for the runtime, and its graph; one newer than the runtime is lowered as `compress` does it.

    External data stays where it is: a graph of a few kB stands for a model of many GB.

    Raises:
        NotFound: there is no such file.
        FormatError: not ONNX, or a file whose weights lie outside and are missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingExtra("splitting a model needs onnx: pip install 'skerry[cloud]'") from None
    try:
        if isinstance(model, bytes):
            return _lowered(model, onnx.load_model_from_string(model), None)
        if not model.is_file():
            raise NotFound(f"there is no model file {model}")
        return _lowered(model, onnx.load(model, load_external_data=False), model.parent)
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        name = model if isinstance(model, Path) else "the model"
        raise FormatError(f"{name} is no ONNX model that can be read: {error}") from None


def _lowered(model: Path | bytes, graph: Any, beside: Path | None) -> tuple[bytes | Path, Any]:
    if graph.functions:  # a cut may lie inside one, and what one hides must not pass for computing
        from onnx import inliner

        graph = inliner.inline_local_functions(graph)
        model = graph.SerializeToString()
    opset = max((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), default=1)
    if opset <= ort.MAX_OPSET and graph.ir_version <= ort.MAX_IR:
        return model, graph
    if opset > ort.MAX_OPSET:
        from onnx import external_data_helper

        from compress.passes.canonicalise import canonicalise

        if beside is not None:
            external_data_helper.load_external_data_for_model(graph, str(beside))
        graph = canonicalise(graph)
    graph.ir_version = min(graph.ir_version, ort.MAX_IR)
    return graph.SerializeToString(), graph


def read_data(data: "Path | Arrays", graph: Any) -> Given:
    """Return the inputs by name, and the labels if there are any; pictures in a folder are read as `skerry compress` does.

    Raises:
        NotFound: there is no such file, or no data.yaml in the folder.
        FormatError: arrays that do not fit the model's inputs, or none at all; a picture that cannot be read.
        MissingExtra: a folder of pictures and no Pillow.
    """
    import numpy as np

    source = str(data) if isinstance(data, Path) else "the data"
    arrays, image = _read(data) if isinstance(data, Path) else (dict(data), None)
    constants = {item.name for item in graph.graph.initializer}
    inputs = [item.name for item in graph.graph.input if item.name not in constants]
    alone = len(inputs) == 1 and inputs[0] not in arrays and "x" in arrays
    named = {name: "x" if alone else name for name in inputs}
    missing = [name for name in inputs if named[name] not in arrays]
    if missing:
        raise FormatError(
            f"{source} has {', '.join(arrays) or 'nothing'}, the model needs {missing[0]!r}"
            + (" (or x)" if len(inputs) == 1 else "")
        )
    feeds = {name: np.asarray(arrays[named[name]]) for name in inputs}
    for name, array in feeds.items():
        _check_numbers(source, named[name], array)
    counts = {len(array) for array in feeds.values()}
    if len(counts) != 1 or 0 in counts:
        raise FormatError(
            f"{source} has arrays of {sorted(counts)} samples, expected the same number, at least one, in each"
        )
    labels, count = arrays.get("y") if "y" not in inputs else None, counts.pop()
    if labels is None:
        return Given(feeds, None, source, named, image)
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) != count or labels.dtype.kind not in "iu":
        found = f"{len(labels)} labels" if labels.ndim == 1 else f"labels of shape {labels.shape}"
        raise FormatError(
            f"{source}: y holds {found} of dtype {labels.dtype}, expected {count} whole-number labels, one for each sample"
        )
    return Given(feeds, labels, source, named, image)


def _read(data: Path) -> "tuple[dict[str, NDArray[Any]], Image | None]":
    import numpy as np

    if data.is_dir():
        from compress.images import read_folder

        found = read_folder(data)
        return {name: found[name] for name in ("x", "y") if name in found}, _image(found["preprocessing"])
    if not data.is_file():
        raise NotFound(f"there is no data file {data}")
    try:
        with np.load(data, allow_pickle=False) as pack:
            return {name: pack[name] for name in pack.files}, None
    except (ValueError, OSError, EOFError) as error:
        raise FormatError(f"{data} is no .npz with arrays: {error}") from None


def _image(rules: "Preprocessing") -> Image | None:
    """Return the way back from values to pixels: (pixel x scale - mean) / std, solved for the pixel."""
    if rules.dtype != "float32" or min(rules.size) < LEAST_SIDE or min(rules.scale, *rules.std) <= 0:
        return None

    def each(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(one / rules.scale for one in (values if len(values) > 1 else values * rules.channels))

    return Image(each(rules.mean), each(rules.std), rules.layout)


def _check_numbers(source: str, name: str, array: "NDArray[Any]") -> None:
    import numpy as np

    if array.dtype.kind not in "fiub" or array.ndim < 1:
        raise FormatError(
            f"{source}: {name} has dtype {array.dtype} and shape {array.shape}, expected numbers, one sample a row"
        )
    if array.dtype.kind == "f" and array.size:
        bad = int(len(array) - np.isfinite(array.reshape(len(array), -1)).all(axis=1).sum())
        if bad:
            raise FormatError(f"{source}: {bad} of {len(array)} samples in {name} hold NaN or infinity")


def check_fit(given: Given, ports: "Sequence[ort.Port]") -> None:
    """Hold the data against what the model takes, a sample at a time.

    Raises:
        FormatError: says what the model takes and what the data has.
    """
    for port in ports:
        array, shape = given.feeds[port.name], ("N", *given.feeds[port.name].shape[1:])
        fits = len(array.shape) == len(port.shape) and all(
            want in (-1, have) for want, have in zip(port.shape[1:], array.shape[1:], strict=True)
        )
        if not fits or str(array.dtype) != port.dtype:
            raise FormatError(
                f"the model's input {port.name!r} takes {port.dtype} {_shape(port.shape)}, "
                f"{given.named[port.name]} in {given.source} is {array.dtype} {_shape(shape)}"
            )
        if port.shape and port.shape[0] > 1:
            raise FormatError(
                f"the model's input {port.name!r} takes batches of exactly {port.shape[0]}, a split runs one sample at a time: "
                "export it with a free batch"
            )


def _shape(shape: "Sequence[int | str]") -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"
