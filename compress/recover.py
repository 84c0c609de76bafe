"""Bring a pruned network back without training: layer after layer gets the weights that best give the old outputs.

Each layer is fitted on what the pruned network really feeds it, with all layers before it already refitted, so errors
do not add up. Where a residual addition follows, the sum is fitted: the branch also makes up for what the shortcut lost.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx

from compress import graph
from compress.channels import Keep, survivors
from compress.graph import Array
from compress.measure import batches
from compress.refit import refit
from skills import ort


def recover(
    model: Any, smaller: Any, keep: Keep, x: Array, say: Callable[[float], None], threads: int = 1, ridge: float = 1e-3
) -> Any:
    """Return `smaller`, which is shrink(model, keep, …), with every dense layer behind a change refitted on `x`.

    `x` are inputs of the model, [n, ...]; labels are not needed. Depthwise and grouped convolutions stay as they are.
    """
    kept = survivors(model, keep)
    better = graph.copy(smaller)
    layers = _behind_a_change(model, better)
    for done, node in enumerate(layers):
        say(done / len(layers))
        values, made, beside = graph.arrays(better), node.output[0], ""
        after = graph.consumers(better).get(made, [])
        if len(after) == 1 and after[0].op_type == "Add" and made not in graph.outputs(better):
            other = next((name for name in after[0].input if name != made), "")
            if other in graph.producers(better):
                made, beside = after[0].output[0], other
        pairs = _pairs(_only(model, [made]), _only(better, [node.input[0], beside]), x, kept.get(made), threads)
        bias = values[node.input[2]] if len(node.input) > 2 else None
        new_weight, new_bias = refit(node, values[node.input[1]], bias, pairs, ridge)
        if bias is None:
            node.input.append(node.output[0] + ".bias")
        found = {node.input[1]: new_weight, node.input[2]: new_bias}
        rest = [item for item in better.graph.initializer if item.name not in found]
        graph.replace(better.graph.initializer, [*rest, *(graph.tensor(name, value) for name, value in found.items())])
    say(1.0)
    return better


def _behind_a_change(model: Any, smaller: Any) -> list[Any]:
    """Return the dense layers with weights of their own whose input is no longer what it was."""
    before, old = {node.name: node for node in model.graph.node}, graph.arrays(model)
    now, readers = graph.arrays(smaller), graph.consumers(smaller)
    touched: set[str] = set()
    found = []
    for node in smaller.graph.node:
        behind = not touched.isdisjoint(node.input) or list(before[node.name].input) != list(node.input)
        if behind or any(not np.array_equal(now[name], old[name]) for name in node.input if name in now):
            touched.update(node.output)
        facts = graph.attributes(node)
        dense = node.op_type == "Conv" or (node.op_type == "Gemm" and not facts.get("transA", 0))
        own = all(name in now and len(readers[name]) == 1 for name in node.input[1:3])
        if behind and dense and own and facts.get("group", 1) == 1 and len(now[node.input[1]]) > 0:
            found.append(node)
    return found


def _only(model: Any, names: list[str]) -> Any:
    """Return the part of a model that makes these tensors."""
    part = graph.copy(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {item.name: item for item in (*inferred.value_info, *inferred.output)}
    wanted = [name for name in dict.fromkeys(names) if name]
    unknown = onnx.TensorProto.FLOAT
    ends = [types.get(name) or onnx.helper.make_tensor_value_info(name, unknown, None) for name in wanted]
    graph.replace(part.graph.output, ends)
    graph.drop_dead(part)
    return part


def _pairs(
    original: Any, pruned: Any, x: Array, kept: tuple[int, Array] | None, threads: int
) -> Iterator[tuple[Array, Array]]:
    """Yield batch by batch what a layer reads and what it should give: the original's, less what is added to it."""
    first, second = (ort.session(part.SerializeToString(), threads) for part in (original, pruned))
    for batch in batches(first.inputs[0], x):
        (target,) = first.run({first.inputs[0].name: batch}).values()
        inputs, *beside = second.run({first.inputs[0].name: batch}).values()
        yield inputs, (target if kept is None else target.take(kept[1], axis=kept[0])) - sum(beside)
