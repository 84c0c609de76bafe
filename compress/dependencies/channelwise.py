"""Rules for operators that keep channels apart: element by element, or one channel at a time."""

from typing import Any

import numpy as np

from compress import graph
from compress.dependencies.labels import FROZEN, Dependencies, Label, Rule, barrier


def unary(deps: Dependencies, node: Any) -> None:
    """Pass the channels of the first input on: element by element, or channel by channel without mixing them."""
    deps.freeze(*node.input[1:])
    if node.input[0] in deps.labels:
        deps.labels[node.output[0]] = deps.labels[node.input[0]]


def pool(deps: Dependencies, node: Any) -> None:
    """Pass on the channels of what lies on axis 1, which no pooling mixes."""
    label = deps.labels.get(node.input[0])
    if len(node.output) > 1 or (label is not None and label.axis != 1):
        barrier(deps, node)
    else:
        unary(deps, node)


def elementwise(deps: Dependencies, node: Any) -> None:
    """Tie the channels of all operands, as NumPy broadcasting lines them up."""
    ranks = [deps.rank(name) for name in node.input]
    labels = [deps.labels.get(name) for name in node.input]
    if None in ranks:
        return barrier(deps, node)
    shift = [max(r for r in ranks if r is not None) - (r or 0) for r in ranks]
    axes = {label.axis + by for label, by in zip(labels, shift, strict=True) if label is not None}
    ids = max((label.ids for label in labels if label is not None), key=len, default=np.empty(0, np.int64))
    if len(axes) != 1 or len(ids) < 2:
        return barrier(deps, node)
    axis = axes.pop()
    for at, (name, label) in enumerate(zip(node.input, labels, strict=True)):
        own = axis - shift[at]
        if label is not None and len(label.ids) == len(ids):
            deps.tie(label.ids, ids)
        elif own < 0 or deps.sizes[name][own] == 1:
            deps.freeze(name)
        elif name in deps.values:
            deps.use(at, own, ids, "shapes", node.output[0])
        else:
            deps.tie(ids, np.full(len(ids), FROZEN))
    deps.labels[node.output[0]] = Label(axis, ids)
    return None


def softmax(deps: Dependencies, node: Any) -> None:
    """Pass the channels on where the sum runs over something else."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    if label is None or rank is None or graph.attributes(node).get("axis", -1) % rank == label.axis:
        return barrier(deps, node)
    return unary(deps, node)


UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
ELEMENTWISE = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "PRelu", "Sub", "Sum", "Where")
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
CHANNELWISE: dict[str, Rule] = {
    **dict.fromkeys(UNARY, unary), **dict.fromkeys(ELEMENTWISE, elementwise), **dict.fromkeys(POOLS, pool),
    "Softmax": softmax, "LogSoftmax": softmax,
}  # fmt: skip
