"""What the planner is handed: a model for the runtime and as a graph, and arrays that fit its inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills.errors import FormatError, MissingExtra, NotFound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


def read_model(model: Path | bytes) -> tuple[bytes | Path, Any]:
    """Return the model for the runtime, and its graph.

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
            return model, onnx.load_model_from_string(model)
        if not model.is_file():
            raise NotFound(f"there is no model file {model}")
        return model, onnx.load(model)
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        name = model if isinstance(model, Path) else "the model"
        raise FormatError(f"{name} is no ONNX model that can be read: {error}") from None


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
    counts = {len(arrays[name]) for name in inputs}
    labels = arrays.get("y")
    if len(counts) != 1 or 0 in counts or (labels is not None and len(labels) not in counts):
        raise FormatError(
            f"the data's arrays have {sorted(counts)} samples, expected the same number, at least one, in each"
        )
    return {name: arrays[name] for name in inputs}, labels
