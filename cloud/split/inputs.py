"""What the planner is handed: a model for the runtime and as a graph, and arrays that fit its inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills import ort
from skills.errors import FormatError, MissingExtra, NotFound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


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


def read_data(data: "Path | Arrays", graph: Any) -> "tuple[dict[str, NDArray[Any]], NDArray[Any] | None]":
    """Return the inputs by name, and the labels if there are any.

    Raises:
        NotFound: there is no such file.
        FormatError: arrays that do not fit the model's inputs, or none at all.
    """
    import numpy as np

    if isinstance(data, Path):
        if not data.is_file():
            raise NotFound(f"there is no data file {data}")
        try:
            with np.load(data, allow_pickle=False) as pack:
                data = {name: pack[name] for name in pack.files}
        except (ValueError, OSError, EOFError) as error:
            raise FormatError(f"{data} is no .npz with arrays: {error}") from None
    constants = {item.name for item in graph.graph.initializer}
    inputs = [item.name for item in graph.graph.input if item.name not in constants]
    arrays = dict(data)
    if len(inputs) == 1 and inputs[0] not in arrays and "x" in arrays:
        arrays[inputs[0]] = arrays["x"]
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise FormatError(
            f"the data has {', '.join(data) or 'nothing'}, the model needs {missing[0]!r}"
            + (" (or x)" if len(inputs) == 1 else "")
        )
    feeds = {name: np.asarray(arrays[name]) for name in inputs}
    for name, array in feeds.items():
        _check_numbers(name, array)
    counts = {len(array) for array in feeds.values()}
    if len(counts) != 1 or 0 in counts:
        raise FormatError(
            f"the data's arrays have {sorted(counts)} samples, expected the same number, at least one, in each"
        )
    labels, count = arrays.get("y") if "y" not in inputs else None, counts.pop()
    if labels is None:
        return feeds, None
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) != count or labels.dtype.kind not in "iu":
        found = f"{len(labels)} labels" if labels.ndim == 1 else f"labels of shape {labels.shape}"
        raise FormatError(
            f"the data's y holds {found} of dtype {labels.dtype}, expected {count} whole-number labels, one for each sample"
        )
    return feeds, labels


def _check_numbers(name: str, array: "NDArray[Any]") -> None:
    import numpy as np

    if array.dtype.kind not in "fiub" or array.ndim < 1:
        raise FormatError(
            f"the data's {name} has dtype {array.dtype} and shape {array.shape}, expected numbers, one sample a row"
        )
    if array.dtype.kind == "f" and array.size:
        bad = int(len(array) - np.isfinite(array.reshape(len(array), -1)).all(axis=1).sum())
        if bad:
            raise FormatError(f"the data: {bad} of {len(array)} samples in {name} hold NaN or infinity")


def check_fit(feeds: "Arrays", ports: "Sequence[ort.Port]") -> None:
    """Hold the data against what the model takes, a sample at a time.

    Raises:
        FormatError: says what the model takes and what the data has.
    """
    for port in ports:
        array = feeds[port.name]
        fits = len(array.shape) == len(port.shape) and all(
            want in (-1, have) for want, have in zip(port.shape[1:], array.shape[1:], strict=True)
        )
        if not fits or str(array.dtype) != port.dtype:
            raise FormatError(
                f"the model's input {port.name!r} takes {port.dtype} {_shape(port.shape)}, "
                f"{port.name} in the data is {array.dtype} {_shape(('N', *array.shape[1:]))}"
            )
        if port.shape and port.shape[0] > 1:
            raise FormatError(
                f"the model's input {port.name!r} takes batches of exactly {port.shape[0]}, a split runs one sample at a time: "
                "export it with a free batch"
            )


def _shape(shape: "Sequence[int | str]") -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"
