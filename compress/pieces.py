"""Where the bytes of an ONNX file went: weights by their stored width, scales and biases, and the graph around them."""

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto

from compress.packing import DIGITS, PLANES

SCALES = "scales and biases"
GRAPH = "graph"
WIDTHS = {DIGITS[bases[0]]: bits for bits, bases in PLANES.items() if len(bases) == 1}  # digits a byte -> bits
STEPS = ("Div", "Mod", "Reshape", "Cast", "Neg")  # of `packing.unfold`, before planes come together
BYTES = {  # of an element; half a byte for the narrow ones
    TensorProto.FLOAT: 4.0, TensorProto.DOUBLE: 8.0, TensorProto.FLOAT16: 2.0, TensorProto.BFLOAT16: 2.0,
    TensorProto.INT8: 1.0, TensorProto.UINT8: 1.0, TensorProto.INT16: 2.0, TensorProto.INT32: 4.0,
    TensorProto.INT4: 0.5, TensorProto.UINT4: 0.5,
}  # fmt: skip
WHOLE = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)


def weights(bits: float) -> str:
    """Return the name of the piece that holds weights of this width."""
    return f"weights in {bits:g} bits"


def pieces(file: bytes) -> Mapping[str, int]:
    """Return the bytes of each piece of an ONNX file, widest weights first; they add up to the file's length.

    Weights are initializers with more than one axis that is longer than 1, and packed codes, which are told by the
    operators that unfold them (`compress/packing.py`). Values in one row are scales and biases. Whole numbers that are no
    codes, names, operators and the frame around each initializer are the graph.
    """
    model = onnx.load_model_from_string(file)
    planes = _planes(model.graph)
    found: dict[str, int] = {}
    for item in model.graph.initializer:
        name = _kind(item, planes)
        if name != GRAPH:
            found[name] = found.get(name, 0) + _payload(item)
    ordered = sorted((name for name in found if name != SCALES), key=lambda name: -float(name.split()[2]))
    result = {name: found[name] for name in (*ordered, SCALES) if name in found}
    return {**result, GRAPH: len(file) - sum(result.values())}


def _kind(item: Any, planes: Mapping[str, float]) -> str:
    if item.name in planes:
        return weights(planes[item.name])
    long = sum(size > 1 for size in item.dims)
    if item.data_type in (TensorProto.INT4, TensorProto.UINT4) or (
        item.data_type == TensorProto.UINT8 and len(item.dims) == 3  # codes in blocks, two a byte
    ):
        return weights(4)
    if item.data_type in BYTES and item.data_type not in WHOLE and long > 1:
        return weights(8 * min(BYTES[item.data_type], 4))
    if item.data_type == TensorProto.INT64 or item.data_type not in BYTES or not item.dims:
        return GRAPH
    return SCALES


def _payload(item: Any) -> int:
    if item.HasField("raw_data"):
        return len(bytes(item.raw_data))
    count = 1
    for size in item.dims:
        count *= size
    return int(min(item.ByteSize(), count * BYTES[item.data_type]))


def _planes(graph: Any) -> dict[str, float]:
    """Return the initializers that are planes of digits, with the width of the codes that they are part of."""
    sizes = {item.name: list(item.dims) for item in graph.initializer if item.data_type == TensorProto.UINT8}
    reader = {name: node for node in graph.node for name in node.input}
    found: dict[str, float] = {}
    for node in graph.node:
        if node.op_type == "Div" and all(name in sizes for name in node.input):
            plane, powers = node.input
            last = node
            while last.op_type in STEPS and last.output[0] in reader:
                last = reader[last.output[0]]
            digits = sizes[powers][-1] if sizes[powers] else 0
            found[plane] = 3.0 if last.op_type == "BitwiseXor" else WIDTHS.get(digits, 8.0)
    return found
