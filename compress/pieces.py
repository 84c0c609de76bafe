"""Where the bytes of an ONNX file went: weights by their stored width, scales and biases, and the graph around them."""

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto

SCALES = "scales and biases"
GRAPH = "graph"
DIGITS = {4: 2.0, 5: 1.6, 8: 1.0}  # digits a byte (`packing.DIGITS`) -> bits of one, for planes that stand alone
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
    if item.data_type in (TensorProto.INT4, TensorProto.UINT4):
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
    sizes = {item.name: item.dims for item in graph.initializer if item.data_type == TensorProto.UINT8}
    readers: dict[str, list[Any]] = {}
    makers: dict[str, Any] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        for name in node.output:
            makers[name] = node
    found: dict[str, float] = {}
    for node in graph.node:
        if node.op_type != "Div" or not all(name in sizes for name in node.input):
            continue
        plane, powers = node.input
        digits = int(sizes[powers][-1]) if sizes[powers] else 0
        if len(sizes[plane]) == 2 and digits in DIGITS:
            found[plane] = DIGITS[digits]
    for upper in [plane for plane, bits in found.items() if bits == 1.0]:
        for plane in _joined(upper, readers, makers):
            found[plane] = 3.0
    return found


def _joined(upper: str, readers: Mapping[str, list[Any]], makers: Mapping[str, Any]) -> list[str]:
    """Return the planes that are added up with this upper one, itself among them."""
    at = upper
    while at in readers and readers[at][0].op_type != "Add":
        at = readers[at][0].output[0]
    if at not in readers:
        return [upper]
    ends, found = list(readers[at][0].input), []
    while ends:
        name = ends.pop()
        if name in makers:
            ends.append(makers[name].input[0])
        else:
            found.append(name)
    return found
