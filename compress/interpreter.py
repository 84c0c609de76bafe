"""A `.tflite` loaded in LiteRT, with the shape of onnxruntime's `Session`.

LiteRT runs one row at a time: a batch is run row by row and the answers are stacked. A file whose ends are int8 codes
(`tflite.lower` with `whole`) takes and gives floats in NCHW here, as the others do.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.flatbuffer import CHANNELS_LAST
from compress.graph import Array
from compress.measure import Runner, answers
from compress.quiet import muted
from skills.errors import FormatError, MissingExtra, SkerryError
from skills.ort import Port

# LiteRT and onnxruntime round differently on the same codes, and that adds up over layers: of a DS-CNN, an autoencoder and
# EfficientNet-Lite0 all numbers are within four steps of each other, of a ResNet-8 that ends in a Softmax 98 %.
NEAR_STEPS = 4  # of 255 from the least to the most that the graph answers, 0 included
LEAST_NEAR = 0.99  # share of the numbers, or, for class scores,
LEAST_AGREEMENT = 0.95  # of equal top answers: a Softmax stretches steps


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A loaded `.tflite` with the shape of onnxruntime's `Session`: batches are run row by row."""

    raw: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    load_ms: float
    moved: bool = False  # its codes lie NHWC where the ONNX model has NCHW

    def run(self, feeds: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        """Run each row of the one input and return the output by name."""
        (source,), (port,) = self.inputs, self.outputs
        (into,), (out,) = self.raw.get_input_details(), self.raw.get_output_details()
        rows = []
        for row in feeds[source.name]:
            self.raw.set_tensor(into["index"], _coded(row[None], into, moved=self.moved))
            self.raw.invoke()
            rows.append(_decoded(self.raw.get_tensor(out["index"]), out)[0])
        del names
        return {port.name: np.stack(rows)}


def session(file: bytes, threads: int = 1) -> Session:
    """Load a `.tflite` in LiteRT.

    Raises:
        MissingExtra: ai-edge-litert is not installed.
        FormatError: LiteRT cannot load it.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise MissingExtra("LiteRT is not installed: pip install 'skerry[tflite]'") from None
    start = time.perf_counter()
    try:
        with muted():  # LiteRT greets
            raw = Interpreter(model_content=file, num_threads=threads)
            raw.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise FormatError(f"LiteRT cannot load the model: {str(error).splitlines()[0]}") from error
    load_ms = (time.perf_counter() - start) * 1e3
    moved = schema.Model.GetRootAs(file, 0).Description() == CHANNELS_LAST.encode()
    inputs, outputs = _ports(raw.get_input_details(), moved=moved), _ports(raw.get_output_details(), moved=True)
    return Session(raw, inputs, outputs, load_ms, moved)


def _ports(details: Sequence[Mapping[str, Any]], *, moved: bool) -> tuple[Port, ...]:
    # The first size is reported as free, since `run` takes any number of rows.
    found = []
    for item in details:
        dtype, sizes = np.dtype(item["dtype"]).name, [int(size) for size in item["shape"][1:]]
        if dtype == "int8":
            dtype, sizes = "float32", [*sizes[-1:], *sizes[:-1]] if moved else sizes
        found.append(Port(str(item["name"]), dtype, (-1, *sizes)))
    return tuple(found)


def _coded(values: Array, end: Mapping[str, Any], *, moved: bool) -> Array:
    """Return what a model is fed."""
    if end["dtype"] is not np.int8:
        return values
    scale, zero = end["quantization"]
    codes = np.clip(np.rint(values / np.float32(scale)) + zero, -128, 127).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(codes, 1, -1)) if moved and codes.ndim > 2 else codes


def _decoded(values: Array, end: Mapping[str, Any]) -> Array:
    if end["dtype"] is not np.int8:
        return values
    scale, zero = end["quantization"]
    floats = (values.astype(np.float32) - zero) * np.float32(scale)
    return np.moveaxis(floats, -1, 1) if floats.ndim > 2 else floats


def check_same(lowered: Runner, original: Runner, x: Array) -> None:
    """Hold the lowered model against the graph it came from: the numbers that both give or, of class scores, the first choice.

    Raises:
        SkerryError: they give other answers than rounding explains.
    """
    got, want = answers(lowered, x), answers(original, x)
    if got.shape != want.shape:
        raise SkerryError(f"the .tflite answers in the shape {got.shape}, the ONNX graph in {want.shape}")
    step = (max(0.0, float(want.max())) - min(0.0, float(want.min()))) / 255
    near = float((np.abs(got - want) <= NEAR_STEPS * step).mean())  # written so that NaN counts as far
    if near >= LEAST_NEAR:
        return
    said = f"{near:.1%} of the .tflite's numbers are within {NEAR_STEPS} steps of the ONNX graph's, expected {LEAST_NEAR:.0%}"
    if want.ndim == 2 and want.shape[1] > 1 and np.isfinite(got).all():
        same = float((got.argmax(axis=1) == want.argmax(axis=1)).mean())
        if same >= LEAST_AGREEMENT:
            return
        said += f", and {same:.1%} of {len(x)} first choices are equal, expected {LEAST_AGREEMENT:.0%}"
    raise SkerryError(
        f"{said}: the lowering of an operator is wrong; please report it, or give a profile of another runtime"
    )
