"""Turn what a global pooling gives so that its channels come last, in front of what flattens it: one step less at run time.

onnxruntime pools 8-bit codes with the channels last and turns the result back with a Transpose of its own. Ours in front of the
Flatten, where all other sizes are one and the function stays exactly the same, cancels it. Only for onnxruntime.
"""

import dataclasses
from typing import Any

import onnx

from compress import graph
from compress.pipeline import Bench, Pass, State

FLATTENS = ("Flatten", "Reshape", "Squeeze")


def turn(model: Any) -> Any:
    """Return the model with each pooled [N, C, 1, …] that becomes [N, C] turned before; the same object where there is none."""
    sizes, makers, readers = graph.shapes(model), graph.producers(model), graph.consumers(model)
    ends = graph.outputs(model)
    turned = graph.copy(model)
    kept: list[Any] = []
    for node in turned.graph.node:
        pooled = node.input[0] if node.op_type in FLATTENS else ""
        maker, size = makers.get(pooled), sizes.get(pooled, ())
        if (
            maker is None or maker.op_type != "GlobalAveragePool" or len(readers[pooled]) > 1 or pooled in ends
            or len(size) < 3 or size[1] < 1 or sizes.get(node.output[0], ())[1:] != (size[1],)
        ):  # fmt: skip
            kept.append(node)
            continue
        last = f"{pooled}.turned"
        perm = [0, *range(2, len(size)), 1]
        kept.append(onnx.helper.make_node("Transpose", [pooled], [last], last, perm=perm))
        kept.append(onnx.helper.make_node("Flatten", [last], [node.output[0]], node.name, axis=1))
    if len(kept) == len(model.graph.node):
        return model
    graph.replace(turned.graph.node, kept)
    del turned.graph.value_info[:]
    graph.drop_dead(turned)
    return turned


def _run(state: State, bench: Bench) -> State:
    if bench.profile.runtime != "onnxruntime":
        return state
    return dataclasses.replace(state, model=turn(state.model))


TURN = Pass("turn", "turning what is pooled", _run)
