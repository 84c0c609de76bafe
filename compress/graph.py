"""Small views of an ONNX graph that every pass needs; nothing here changes one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]


def copy(model: Any) -> Any:
    """Return an independent copy, so that a pass can build its answer without touching its input."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


def arrays(model: Any) -> dict[str, Array]:
    """Return every initializer as an array."""
    return {item.name: array(item) for item in model.graph.initializer}


def array(item: Any) -> Array:
    """Return one initializer as an array."""
    return np.asarray(numpy_helper.to_array(item))


def producers(model: Any) -> dict[str, Any]:
    """Return which node makes each tensor."""
    return {name: node for node in model.graph.node for name in node.output if name}


def consumers(model: Any) -> dict[str, list[Any]]:
    """Return which nodes read each tensor (a node that reads it twice stands there twice)."""
    found: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            if name:
                found.setdefault(name, []).append(node)
    return found


def attributes(node: Any) -> dict[str, Any]:
    """Return a node's attributes as plain values."""
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def outputs(model: Any) -> set[str]:
    """Return the names of the graph's outputs."""
    return {item.name for item in model.graph.output}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the inferred shape of every tensor that has one; -1 is a free size."""
    inferred = onnx.shape_inference.infer_shapes(model)
    found: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    for item in inferred.graph.initializer:
        found[item.name] = tuple(item.dims)
    return found


def opset(model: Any) -> int:
    """Return the version of the standard operator set."""
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def tensor(name: str, value: Array) -> Any:
    """Return an initializer; raw bytes, because the typed fields of ONNX store small integers five times larger."""
    return numpy_helper.from_array(np.asarray(value, order="C"), name)


def with_biases(
    model: Any, wanted: Callable[[Any], bool] = lambda node: node.op_type in ("Conv", "ConvTranspose")
) -> Any:
    """Return the graph with a bias of its own, one number a channel, at every convolution: what is fitted behind it ends there.

    Or at each Conv, ConvTranspose and Gemm that is `wanted`. A bias that is computed stays as it is.
    """
    changed = copy(model)
    values, readers = arrays(model), consumers(model)
    for node in changed.graph.node:
        if not wanted(node) or node.input[1] not in values:
            continue
        weight, given = values[node.input[1]], node.input[2] if len(node.input) > 2 else ""
        said = attributes(node)
        made_first = node.op_type == "Conv" or (node.op_type == "Gemm" and said.get("transB"))
        width = weight.shape[0] if made_first else weight.shape[1] * int(said.get("group", 1))
        old = values.get(given, np.zeros(width, np.float32))
        if given and (given not in values or (old.shape == (width,) and len(readers[given]) == 1)):
            continue
        name = f"{node.output[0]}.own bias" if given else f"{node.output[0]}.bias"
        changed.graph.initializer.append(tensor(name, np.broadcast_to(old.reshape(-1), (width,)).astype(np.float32)))
        del node.input[2:]
        node.input.append(name)
    drop_dead(changed)
    return changed


def drop_dead(model: Any) -> None:
    """Remove, in place, nodes whose results nobody reads and initializers that no node reads."""
    graph = model.graph
    needed = outputs(model)
    kept = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(name for name in node.input if name)
            for attribute in node.attribute:
                needed.update(outer_names(attribute))
    kept.reverse()
    replace(graph.node, kept)
    replace(graph.initializer, [item for item in graph.initializer if item.name in needed])
    replace(graph.sparse_initializer, [item for item in graph.sparse_initializer if item.values.name in needed])


def replace(field: Any, items: list[Any]) -> None:
    """Replace the content of a repeated protobuf field."""
    saved = [type(item)() for item in items]
    for into, item in zip(saved, items, strict=True):
        into.CopyFrom(item)
    del field[:]
    field.extend(saved)


def outer_names(attribute: Any) -> set[str]:
    """Return every name that a subgraph (of If, Loop, Scan) may read from outside."""
    found: set[str] = set()
    for graph in (attribute.g, *attribute.graphs):
        found.update(item.name for item in graph.output)
        for node in graph.node:
            found.update(node.input)
            for inner in node.attribute:
                found.update(outer_names(inner))
    return found
