"""Make up for removed channels before training: least squares hands what a layer lost to the inputs that it still has.

Layer after layer, each fed by those already made up for, the smaller network's weights move to where its answers are nearest to
those of the network before (He, Zhang and Sun, ICCV 2017, arXiv 1707.06168). It is what `passes.reconstruct` does for
codes, without rounding.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from compress import graph
from compress.graph import Array
from compress.moments import Moments, measurable, moments, rows_of, weight_of
from compress.passes.place import find_layers
from compress.passes.reconstruct import held_batches
from compress.rounding import damped
from compress.scheme import HEAVY, Layer
from compress.to_torch import Twin

RIDGE = 0.01  # of the mean second moment: how strongly weights are held where they are
HELD_BY_FEW = 4.0  # so much more where there are few rows for the inputs

Tensor = Any
Stay = Mapping[str, tuple[int, Array]]  # tensor -> its channel axis and the channels that are left


def compensated(before: Any, after: Any, stay: Stay, x: Array) -> Any:
    """Return `after`, which is `before` with fewer channels, with weights whose answers on `x` are as near to its as can be.

    `stay` names the tensors that lost channels; the nodes of `after` make tensors of the same names.

    Raises:
        FormatError: an operator of the graph has no torch counterpart.
    """
    pair = _Pair(before, after, stay, x)
    with torch.no_grad():
        for at, node in enumerate(before.graph.node):
            pair.step(at, node)
    return pair.after.to_onnx()


class _Pair:
    """Both networks, and the tensors of both that are still needed, batch by batch."""

    def __init__(self, before: Any, after: Any, stay: Stay, x: Array) -> None:
        self.before, self.after, self.stay = Twin(before), Twin(after), stay
        self.nodes = {node.output[0]: node for node in after.graph.node}
        readers = graph.consumers(after)
        self.layers = {
            layer.node: layer
            for layer in find_layers(after)
            if layer.op in HEAVY and len(readers.get(layer.weight, ())) == 1 and layer.weight in self.after.weights
        }
        self.readers = readers
        self.needed = [_last_read(before), _last_read(after)]
        name = before.graph.input[0].name
        self.flows: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [
            ({name: value}, {name: value})
            for value in (torch.from_numpy(np.array(part)) for part in held_batches(before, x))
        ]

    def step(self, at: int, node: Any) -> None:
        """Run node number `at` of the larger network, make up for what the smaller one lost there, and run it."""
        for first, _ in self.flows:
            first.update(_outputs(self.before, node, first, self.needed[0]))
        mine = self.nodes.get(node.output[0])
        if mine is not None:
            layer = self.layers.get(mine.name)
            if layer is not None and measurable(layer, mine):
                self._fit(layer, mine)
            for _, second in self.flows:
                second.update(_outputs(self.after, mine, second, self.needed[1]))
        for flows in self.flows:
            for flow, needed, one in zip(flows, self.needed, (node, mine), strict=True):
                for name in one.input if one is not None else ():
                    if needed.get(name) == one.output[0]:
                        flow.pop(name, None)

    def _fit(self, layer: Layer, node: Any) -> None:
        weights = self.after.weights
        weight = weights[layer.weight].detach().numpy()
        pairs = [(second[node.input[0]], self._wanted(node, first, second)) for first, second in self.flows]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in weights else None
        rows, shift = _solved(rows_of(layer, weight), moments(layer, node, weight, pairs), with_bias=bias is not None)
        weights[layer.weight].copy_(torch.from_numpy(weight_of(layer, rows).astype(np.float32)))
        if bias is not None:
            weights[bias].copy_(torch.from_numpy(shift.astype(np.float32)).reshape(weights[bias].shape))

    def _wanted(self, node: Any, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return what a layer should answer; where only an addition reads it, also what the other term is off by."""
        name = node.output[0]
        after = self.readers.get(name, [])
        target = self._left(name, first[name])
        for other in after[0].input if len(after) == 1 and after[0].op_type == "Add" else ():
            if other != name and other in first and other in second:
                there = self._left(other, first[other])
                if there.shape == second[other].shape == target.shape:
                    return target + (there - second[other])
        return target

    def _left(self, name: str, value: Tensor) -> Tensor:
        if name not in self.stay:
            return value
        axis, channels = self.stay[name]
        return value.index_select(axis, torch.from_numpy(np.asarray(channels, np.int64)))


def _solved(rows: Array, seen: Moments, *, with_bias: bool) -> tuple[Array, Array]:
    """Return weights [groups, outputs, inputs] and a bias that come nearest to the wanted answers. Pure."""
    gram, cross = seen.about(takes_bias=with_bias)
    few = min(1.0, gram.shape[-1] / seen.count)
    change = np.linalg.solve(damped(gram, RIDGE + HELD_BY_FEW * few), cross).transpose(0, 2, 1)
    return rows + change, (seen.missing - (change @ seen.inputs[..., None])[..., 0]).reshape(-1)


def _last_read(model: Any) -> dict[str, str]:
    """Return for every tensor which node, by its first output, reads it last; of the graph's outputs none does."""
    last = {name: node.output[0] for node in model.graph.node for name in node.input}
    return last | dict.fromkeys(graph.outputs(model), "")


def _outputs(twin: Twin, node: Any, flow: Mapping[str, Tensor], needed: Mapping[str, str]) -> dict[str, Tensor]:
    feeds = {name: flow[name] for name in node.input if name in flow}
    wanted = [name for name in node.output if name in needed]
    return twin.run(feeds, wanted) if feeds and wanted else {}
