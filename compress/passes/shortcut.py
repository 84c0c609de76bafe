"""Make a shortcut that leaves out rows and columns and adds empty channels one convolution of ones and zeros.

That is option A of He et al. (2016, arXiv 1512.03385, section 3.3). onnxruntime adds empty channels in float, between a
DequantizeLinear and a QuantizeLinear; its int8 convolution does all of it in less time, and LiteRT's writer knows it too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from compress import graph
from compress.graph import Array
from compress.pipeline import Bench, Pass, State

MOST_WEIGHTS = 4096  # of such a convolution: with more, it computes longer than it saves


def as_convolution(model: Any) -> Any:
    """Return the model with each Slice and Pad that are such a shortcut as a Conv; the same object where there is none."""
    sizes, values, readers = graph.shapes(model), graph.arrays(model), graph.consumers(model)
    ends = graph.outputs(model)
    changed = graph.copy(model)
    kept: list[Any] = []
    waiting: dict[
        str, tuple[Any, tuple[int, ...], Array]
    ] = {}  # what a Slice left out would have made -> it, strides, weight
    for node in changed.graph.node:
        made, after = node.output[0], readers.get(node.output[0], [])
        if node.op_type == "Slice" and len(after) == 1 and made not in ends:
            strides, added = _strides(node, values, sizes.get(node.input[0], ())), _added(after[0], values)
            if strides and added:
                weight = np.pad(np.eye(sizes[node.input[0]][1], dtype=np.float32), (added, (0, 0)))
                if weight.size <= MOST_WEIGHTS:
                    waiting[made] = node, strides, weight.reshape(*weight.shape, *[1] * len(strides))
                    continue
        if node.input and node.input[0] in waiting:
            cut, strides, weight = waiting[node.input[0]]
            name = f"{made}.weight"
            changed.graph.initializer.append(graph.tensor(name, weight))
            kept.append(onnx.helper.make_node("Conv", [cut.input[0], name], [made], node.name, strides=strides))
        else:
            kept.append(node)
    if not waiting:
        return model
    graph.replace(changed.graph.node, kept)
    graph.drop_dead(changed)
    return changed


def _strides(node: Any, values: Mapping[str, Array], size: tuple[int, ...]) -> tuple[int, ...]:
    """Return every how many rows and columns a Slice takes of a picture [N, C, …] from the first on; nothing if it does else."""
    given = [values.get(name) for name in node.input[1:]]
    if len(given) < 4 or any(item is None for item in given) or len(size) < 3 or min(size[1:]) < 1:
        return ()
    strides = [1] * len(size)
    for start, end, axis, step in zip(*(np.asarray(item).tolist() for item in given), strict=True):
        if start != 0 or step < 1 or end < size[axis]:
            return ()
        strides[axis] = step
    return tuple(strides[2:]) if strides[:2] == [1, 1] else ()


def _added(node: Any, values: Mapping[str, Array]) -> tuple[int, int] | None:
    """Return how many empty channels a node adds before and behind; None if it is no Pad or does anything else."""
    if node.op_type != "Pad" or graph.attributes(node).get("mode", b"constant") != b"constant" or any(node.input[3:]):
        return None
    pads = values.get(node.input[1])
    fill = values.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if pads is None or fill is None or fill.any() or pads.min() < 0:
        return None
    sides = pads.reshape(2, -1)
    return None if np.delete(sides, 1, axis=1).any() else (int(sides[0, 1]), int(sides[1, 1]))


def _run(state: State, _bench: Bench) -> State:
    return dataclasses.replace(state, model=as_convolution(state.model))


SHORTCUT = Pass("shortcut", "making shortcuts convolutions", _run)
