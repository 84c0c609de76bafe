"""Compute what is known before any input comes: constants made of constants, and sizes that are fixed."""

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from compress import graph
from compress.graph import Array

SMALL_BYTES = 1024  # a result may be this large, or as large as what it is made of: folding must not grow the file
Sizes = tuple[int | str, ...]
CHANCE = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")


def fold_constants(model: Any) -> None:
    """Replace, in place, nodes whose result is known by that result, and sizes counted at run time by fixed ones.

    Exporters write the sizes of a Reshape as a little program over Shape; where only the batch is free, 0 ("as in the
    input") says the same.
    """
    values, dims, makers = graph.arrays(model), _dims(model), graph.producers(model)
    kept = []
    for node in model.graph.node:
        found = _known(node, values, dims, graph.opset(model))
        if found is not None:
            values[node.output[0]] = found
            model.graph.initializer.append(graph.tensor(node.output[0], found))
            continue
        if node.op_type == "Reshape" and node.input[1] not in values and not graph.attributes(node).get("allowzero", 0):
            sizes = _after_the_batch(node, values, dims, makers)
            if sizes is not None:
                node.input[1] = node.output[0] + ".sizes"
                model.graph.initializer.append(graph.tensor(node.input[1], sizes))
        kept.append(node)
    graph.replace(model.graph.node, kept)


def _dims(model: Any) -> dict[str, Sizes]:
    """Return the inferred sizes of each tensor; a free one is its name, empty if it has none."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        item.name: tuple(size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim)
        for item in (*inferred.value_info, *inferred.input, *inferred.output)
        if (kind := item.type.tensor_type).HasField("shape")
    }


def _known(node: Any, values: dict[str, Array], dims: dict[str, Sizes], opset: int) -> Array | None:
    """Return the only result of a node that can be computed now."""
    if len(node.output) != 1 or node.domain or node.op_type in CHANCE:
        return None
    if node.op_type == "Shape" and not node.attribute and node.input[0] in dims:
        sizes = dims[node.input[0]]
        return np.array(sizes, np.int64) if all(isinstance(size, int) for size in sizes) else None
    inputs = {name: values[name] for name in node.input if name in values}
    if not inputs or any(name and name not in values for name in node.input):
        return None
    if any(item.HasField("g") or item.graphs for item in node.attribute):
        return None
    try:
        (found,) = ReferenceEvaluator(node, opsets={"": opset}).run(None, inputs)
    except Exception:  # noqa: BLE001 - an operator that the reference lacks stays in the graph
        return None
    large = sum(value.nbytes for value in inputs.values())
    return found if isinstance(found, np.ndarray) and found.nbytes <= max(large, SMALL_BYTES) else None


def _after_the_batch(
    node: Any, values: dict[str, Array], dims: dict[str, Sizes], makers: dict[str, Any]
) -> Array | None:
    """Return the sizes of a Reshape as constants, where all but the first are and the first is that of its input."""
    joined = makers.get(node.input[1])
    if joined is None or joined.op_type != "Concat" or any(name not in values for name in joined.input[1:]):
        return None
    rest = [size for name in joined.input[1:] for size in values[name].reshape(-1).tolist()]
    counted = _batch_of(joined.input[0], values, makers)
    if not rest or 0 in rest or not counted:
        return None
    batch, own = ((dims.get(name) or ("",))[0] for name in (counted, node.input[0]))
    same = counted == node.input[0] or (batch == own != "" and isinstance(own, str))
    return np.array([0, *rest], np.int64) if same else None


def _batch_of(name: str, values: dict[str, Array], makers: dict[str, Any]) -> str:
    """Return the tensor whose first size this is, empty if it is anything else."""
    node = makers.get(name)
    while node is not None and node.op_type in ("Unsqueeze", "Squeeze", "Cast"):
        node = makers.get(node.input[0])
    if node is None or node.op_type != "Gather" or node.input[1] not in values:
        return ""
    counted = makers.get(node.input[0])
    first = values[node.input[1]].tolist() in (0, [0])
    return (
        str(counted.input[0])
        if first and counted is not None and counted.op_type == "Shape" and not counted.attribute
        else ""
    )
