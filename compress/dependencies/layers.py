"""Rules for operators with weights: they read the channels that come in and make those that go out."""

from typing import Any

import numpy as np

from compress import graph
from compress.dependencies.labels import FROZEN, Dependencies, Label, Rule, barrier
from compress.graph import Array


def incoming(deps: Dependencies, name: str, axis: int, count: int) -> Array:
    """Return the channels of a layer's input on the axis that the layer sums over."""
    label = deps.labels.get(name)
    if label is not None and label.axis == axis:
        return label.ids
    deps.freeze(name)
    return np.full(count, FROZEN)


def conv(deps: Dependencies, node: Any) -> None:
    """Make new channels and read the old ones; with groups, what goes in and out of one group is one."""
    weight, groups = deps.constant(node, 1), graph.attributes(node).get("group", 1)
    if weight is None:
        return barrier(deps, node)
    turned = node.op_type == "ConvTranspose"
    ins = weight.shape[0] if turned else weight.shape[1] * groups
    outs = weight.shape[1] * groups if turned else weight.shape[0]
    old, new = incoming(deps, node.input[0], 1, ins), deps.fresh(outs)
    deps.labels[node.output[0]] = Label(1, new)
    if groups == 1:
        deps.use(1, 0 if turned else 1, old, "reads", node.input[0])
        deps.use(1, 1 if turned else 0, new, "makes", node.output[0])
    else:
        first = new.reshape(groups, -1)[:, 0]
        deps.tie(new, np.repeat(first, outs // groups))
        deps.tie(old, np.repeat(first, ins // groups))
        deps.use(1, 0, old if turned else new, "makes", node.output[0])
        deps.fix_attribute("group", lambda alive: int(alive(first).sum()))
    return bias(deps, node, 0, new)


def bias(deps: Dependencies, node: Any, axis: int, new: Array) -> None:
    """Cut the bias of a layer with what the layer makes."""
    if len(node.input) < 3 or not node.input[2]:
        return
    if node.input[2] in deps.values:
        deps.use(2, axis, new, "makes", node.output[0])
    else:
        deps.freeze(node.input[2], node.output[0])


def gemm(deps: Dependencies, node: Any) -> None:
    """Make new columns and read the old ones."""
    weight, facts = deps.constant(node, 1), graph.attributes(node)
    if weight is None or facts.get("transA", 0):
        return barrier(deps, node)
    turned = int(facts.get("transB", 0))
    old, new = incoming(deps, node.input[0], 1, weight.shape[turned]), deps.fresh(weight.shape[1 - turned])
    deps.labels[node.output[0]] = Label(1, new)
    deps.use(1, turned, old, "reads", node.input[0])
    deps.use(1, 1 - turned, new, "makes", node.output[0])
    offset = deps.constant(node, 2)
    if offset is None or (offset.ndim and offset.shape[-1] == len(new) > 1):
        bias(deps, node, 0 if offset is None else offset.ndim - 1, new)
    return None


def matmul(deps: Dependencies, node: Any) -> None:
    """Make new channels on the last axis from those on the last axis, by a constant matrix."""
    weight, rank = deps.constant(node, 1), deps.rank(node.input[0])
    if weight is None or weight.ndim != 2 or rank is None:
        return barrier(deps, node)
    label = deps.labels.get(node.input[0])
    if label is not None and label.axis != rank - 1:
        deps.labels[node.output[0]] = label
        return None
    old, new = incoming(deps, node.input[0], rank - 1, weight.shape[0]), deps.fresh(weight.shape[1])
    deps.labels[node.output[0]] = Label(rank - 1, new)
    deps.use(1, 0, old, "reads", node.input[0])
    deps.use(1, 1, new, "makes", node.output[0])
    return None


def norm(deps: Dependencies, node: Any) -> None:
    """Scale and shift each channel of axis 1 by constants of its own."""
    ids = incoming(deps, node.input[0], 1, 0)
    if len(node.output) > 1 or any(name not in deps.values for name in node.input[1:]):
        return barrier(deps, node)
    if len(ids):
        deps.labels[node.output[0]] = Label(1, ids)
        for at in range(1, len(node.input)):
            deps.use(at, 0, ids, "shapes", node.output[0])
    return None


def gather(deps: Dependencies, node: Any) -> None:
    """Look up rows of a constant table: its columns are channels. Picking elsewhere passes the channels on."""
    table, axis = deps.constant(node, 0), graph.attributes(node).get("axis", 0)
    label, rank, picked = deps.labels.get(node.input[0]), deps.rank(node.input[0]), deps.constant(node, 1)
    lookups = deps.rank(node.input[1])
    if table is not None and table.ndim == 2 and axis == 0 and lookups is not None and table.dtype.kind == "f":
        deps.freeze(node.input[1])
        new = deps.fresh(table.shape[1])
        deps.labels[node.output[0]] = Label(lookups, new)
        return deps.use(0, 1, new, "makes", node.output[0])
    if label is None or rank is None or picked is None or axis % rank == label.axis:
        return barrier(deps, node)
    shift = picked.ndim - 1 if axis % rank < label.axis else 0
    deps.labels[node.output[0]] = Label(label.axis + shift, label.ids)
    return None


LAYERS: dict[str, Rule] = {
    "Conv": conv, "ConvTranspose": conv, "Gemm": gemm, "MatMul": matmul, "BatchNormalization": norm,
    "InstanceNormalization": norm, "Gather": gather,
}  # fmt: skip
