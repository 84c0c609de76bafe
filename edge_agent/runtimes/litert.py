"""LiteRT (TensorFlow Lite) on the CPU: ai-edge-litert where it is installed, else tflite-runtime."""

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.runtimes import DISTRIBUTIONS, LoadedModel
from skills.errors import FormatError, MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODULES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")


def warm() -> str:
    """Import the interpreter and return its version."""
    module = _interpreter().__name__.partition(".")[0]
    for distribution in DISTRIBUTIONS["litert"]:
        if distribution.replace("-", "_") == module:
            return importlib.metadata.version(distribution)
    return "0"


def load(path: Path) -> LoadedModel:
    """Load a model with one thread."""
    return _Model(path)


class _Model:
    """An interpreter whose tensors go by the names that the file gives to its inputs and outputs."""

    def __init__(self, path: Path) -> None:
        try:
            self._interpreter = _interpreter().Interpreter(model_path=str(path), num_threads=1)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"LiteRT cannot load {path.name}: {' '.join(str(error).split())[:400]}") from error
        self._inputs = {plain(entry["name"]): entry for entry in self._interpreter.get_input_details()}
        self._outputs = {plain(entry["name"]): entry for entry in self._interpreter.get_output_details()}

    def run(self, feeds: Mapping[str, "NDArray[Any]"]) -> dict[str, "NDArray[Any]"]:
        import numpy as np

        if set(feeds) != set(self._inputs):
            raise FormatError(f"the model takes {', '.join(self._inputs)}, not {', '.join(feeds) or 'nothing'}")
        rows = {len(array) if array.ndim else 0 for array in feeds.values()}
        if self._one_row and len(rows) == 1 and rows != {1} and rows != {0}:
            # Made for one row: asking row by row costs the same on one thread, and resizing does not work for every graph.
            parts = [self._once({name: array[at : at + 1] for name, array in feeds.items()}) for at in range(*rows)]
            return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}
        return self._once(feeds)

    @property
    def _one_row(self) -> bool:
        details = [*self._inputs.values(), *self._outputs.values()]
        return all(len(entry["shape"]) and entry["shape"][0] == 1 for entry in details)

    def _once(self, feeds: Mapping[str, "NDArray[Any]"]) -> dict[str, "NDArray[Any]"]:
        try:
            for name, array in feeds.items():
                self._interpreter.set_tensor(self._inputs[name]["index"], array)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"LiteRT refuses the input: {' '.join(str(error).split())[:400]}") from error
        return {name: self._interpreter.get_tensor(entry["index"]) for name, entry in self._outputs.items()}


def plain(name: str) -> str:
    """Return a tensor's name without what converters add: `serving_default_x:0` is `x`."""
    return name.removeprefix("serving_default_").partition(":")[0]


def _interpreter() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtra("no LiteRT is installed: pip install 'skerry[tflite]', or tflite-runtime with numpy<2")
