"""Make up for removed channels before training: least squares hands what a layer lost to the inputs that it still has.

Layer after layer, each fed by those already made up for, the smaller network's weights move to where its answers are nearest to
those of the network before (He, Zhang and Sun, ICCV 2017, arXiv 1707.06168). It is what `passes.reconstruct` does for
codes, without rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compress import graph
from compress.beside import Beside
from compress.graph import Array
from compress.moments import measurable, moments, rows_of, weight_of
from compress.passes.place import find_layers
from compress.scheme import HEAVY, Layer

RIDGE = 0.01  # of the mean second moment: how strongly weights are held where they are
MADE_UP_ON = 512  # inputs are enough

Tensor = Any
Stay = Mapping[str, tuple[int, Array]]  # tensor -> its channel axis and the channels that are left


def compensated(before: Any, after: Any, stay: Stay, x: Array) -> Any:
    """Return `after`, which is `before` with fewer channels, with weights whose answers on `x` are as near to its as can be.

    `stay` names the tensors that lost channels; the nodes of `after` make tensors of the same names.

    Raises:
        FormatError: an operator of the graph has no torch counterpart.
    """

    def left(name: str, value: Tensor) -> Tensor:
        if name not in stay:
            return value
        axis, channels = stay[name]
        return value.index_select(axis, torch.from_numpy(np.asarray(channels, np.int64)))

    pair = Beside(before, after, x, wanted=left)
    readers, weights = graph.consumers(after), pair.changed.weights
    layers = {layer.node: layer for layer in find_layers(after) if layer.op in HEAVY and layer.weight in weights}
    with torch.no_grad():
        for node in pair.nodes():
            layer = layers.get(node.name)
            if layer is not None and len(readers[layer.weight]) == 1 and measurable(layer, node):
                _fit(weights, layer, node, pair.pairs(node))
    return pair.changed.to_onnx()


def _fit(weights: Mapping[str, Tensor], layer: Layer, node: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    weight = weights[layer.weight].detach().numpy().copy()  # what it was: the tensor changes below
    bias = node.input[2] if len(node.input) > 2 and node.input[2] in weights else None
    old, seen = rows_of(layer, weight), moments(layer, node, weight, pairs)
    rows = seen.nearest(old, RIDGE, takes_bias=bias is not None)
    weights[layer.weight].copy_(torch.from_numpy(weight_of(layer, rows).astype(np.float32)))
    if bias is not None:
        weights[bias].copy_(torch.from_numpy(seen.shift(rows - old).astype(np.float32)).reshape(weights[bias].shape))
