"""Decide which operators compute in int8 and which tensors therefore carry 8-bit codes.

The rules are onnxruntime's: an operator gets its int8 kernel when every activation it reads comes out of a
DequantizeLinear and its result goes into one QuantizeLinear alone (a Gemm may also answer in float). A Relu or Clip
behind a layer is not quantized: the codes' own range cuts there, and the runtime drops the node.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from compress import graph
from compress.graph import Array
from compress.passes.ranges import best_range
from compress.pipeline import Bench, Pass, State
from compress.scheme import HEAVY, Compute, Layer, Range, Scheme
from compress.statistics import Statistics
from skills.profile import Profile

MOVES = (
    "MaxPool",
    "Flatten",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "AveragePool",
    "Slice",
    "Pad",
)  # codes keep their scale
LIGHT = (*MOVES, "Add", "GlobalAveragePool", "Concat")
TABLES = {"Gather": (0,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}  # stored in few bits, computed in float: inputs
LONG_ROW = 32  # a scale for each row of an embedding pays from here on; below, one for each column
PROBABILITY = Range(0.0, 255 / 256)  # the one range that LiteRT's int8 Softmax answers in
FLOAT_RESULT = ("Gemm", "MatMul")  # may answer in float at no cost


def place(
    model: Any, seen: Statistics, profile: Profile, *, depthwise: Compute, others: Compute,
    stay_float: frozenset[str] = frozenset(),
) -> Scheme:  # fmt: skip
    """Return a scheme with every layer stored in 8 bits; the compute type is given per kind of layer, or by its node."""
    values = graph.arrays(model)
    layers = tuple(
        dataclasses.replace(
            layer, compute="float" if layer.node in stay_float else _compute(layer, profile, depthwise, others)
        )
        for layer in find_layers(model)
    )
    region = _Region(model, values, seen, {layer.node for layer in layers if layer.compute == "int8"}, profile)
    return Scheme(layers, region.ranges(), profile)


def _compute(layer: Layer, profile: Profile, depthwise: Compute, others: Compute) -> Compute:
    if layer.op in profile.keep_float or layer.op == "ConvTranspose" or layer.op in TABLES:
        return "float"
    return depthwise if layer.depthwise else others


def find_layers(model: Any) -> list[Layer]:
    """Return the operators with trained weights, in the order in which they run; one with two of them stands twice."""
    values, readers = graph.arrays(model), graph.consumers(model)
    found = []
    for node in model.graph.node:
        for at in TABLES.get(node.op_type, (1,) if node.op_type in HEAVY else ()):
            name = node.input[at] if len(node.input) > at else ""
            weight = values.get(name)
            if weight is None or weight.dtype.name != "float32" or weight.ndim < 2 or len(readers[name]) != 1:
                continue
            facts = graph.attributes(node)
            groups = int(facts.get("group", 1))
            if (node.op_type == "Gemm" and not facts.get("transB", 0)) or (
                node.op_type == "ConvTranspose" and groups != 1
            ):
                continue
            found.append(
                Layer(node.name, node.op_type, name, _channels(node.op_type, weight), tuple(weight.shape), groups)
            )
    return found


def _channels(op: str, weight: Array) -> int:
    """Return the axis along which each place has a scale of its own."""
    match op:
        case "Conv" | "Gemm":
            return 0
        case "ConvTranspose" | "LSTM" | "GRU" | "RNN":
            return 1
        case "Gather" if weight[0].size >= LONG_ROW:
            return 0
    return weight.ndim - 1


class _Region:
    """The int8 part of a graph, grown from the layers, and the tensors on its seams."""

    def __init__(
        self, model: Any, values: Mapping[str, Array], seen: Statistics, layers: set[str], profile: Profile
    ) -> None:
        self.model, self.values, self.seen, self.profile = model, values, seen, profile
        self.readers, self.makers, self.ends = graph.consumers(model), graph.producers(model), graph.outputs(model)
        self.inside: set[str] = set(layers)  # names of nodes
        self.tails: dict[str, str] = {}  # node name -> tensor that carries its result's codes
        self.clips: dict[str, float] = {}  # tensor -> upper bound of the Clip that made it
        self._grow()

    def _grow(self) -> None:
        layers = [node for node in self.model.graph.node if node.name in self.inside]
        coded = {name for node in layers for name in self.activations_of(node)}  # tensors that carry codes anyway
        for node in self.model.graph.node:
            if node.name not in self.inside:
                reads = self.activations_of(node) if self._may_join(node) else []
                if not reads or not set(reads) <= coded or len(node.output) != 1:
                    continue
                self.inside.add(node.name)
            tail = self._tail(node)
            if tail in self.seen and all(name in self.seen for name in self.activations_of(node)):
                self.tails[node.name] = tail
                coded.add(tail)
            else:  # a tensor that calibration did not see (not float, or of unknown shape): leave the node alone
                self.inside.discard(node.name)

    def _may_join(self, node: Any) -> bool:
        if node.op_type == "Softmax":  # an int8 operator of LiteRT's: onnxruntime's is a lookup table that wins nothing
            return self.profile.quantize_outputs and node.op_type not in self.profile.keep_float
        if node.op_type not in LIGHT or node.op_type in self.profile.keep_float:
            return False
        if node.op_type != "Pad":
            return True
        # The runtime pads the codes with 0, which means 0.0 only where the zero point is 0.
        facts, seen = graph.attributes(node), self.seen.get(node.input[0])
        fill = self.values.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        plain = facts.get("mode", b"constant") == b"constant" and fill is not None and not fill.any()
        return plain and self.profile.activation == "u8" and seen is not None and seen.least >= 0

    def activations_of(self, node: Any) -> list[str]:
        """Return the tensors with data that a node reads: not weights, biases, shapes."""
        if node.op_type in ("Add", "Concat"):
            return list(node.input)  # a constant operand has no range, so the node stays float
        return [node.input[0]]

    def _tail(self, node: Any) -> str:
        name: str = node.output[0]
        after = self.readers.get(name, [])
        if node.op_type in MOVES or node.op_type == "Concat" or name in self.ends or len(after) != 1:
            return name
        (last,) = after
        if last.op_type == "Relu":
            return str(last.output[0])
        if last.op_type == "Clip" and len(last.input) == 3 and {last.input[1], last.input[2]} <= self.values.keys():
            low, high = (float(self.values[item].reshape(())) for item in last.input[1:3])
            if low == 0.0 and high > 0:
                self.clips[last.output[0]] = high
                return str(last.output[0])
        return name

    def ranges(self) -> dict[str, Range]:
        nodes = [node for node in self.model.graph.node if node.name in self.inside]
        wanted: dict[str, None] = {}
        for node in nodes:
            wanted.update(dict.fromkeys(self.activations_of(node)))
            if not self._answers_in_float(node):
                wanted[self.tails[node.name]] = None
        found = {name: best_range(self.seen[name]) for name in wanted}
        for name, bound in self.clips.items():
            if name in found:
                found[name] = Range(0.0, min(found[name].hi, bound))
        found.update((self.tails[node.name], PROBABILITY) for node in nodes if node.op_type == "Softmax")
        # Codes that are only moved keep their scale, so both ends of such a node share one range.
        settled = False
        while not settled:
            settled = True
            for node in nodes:
                if node.op_type in MOVES or node.op_type == "Concat":
                    group = [name for name in (*self.activations_of(node), self.tails[node.name]) if name in found]
                    shared = found[group[0]]
                    for name in group[1:]:
                        shared = shared.union(found[name])
                    if any(found[name] != shared for name in group):
                        found.update(dict.fromkeys(group, shared))
                        settled = False
        return found

    def _answers_in_float(self, node: Any) -> bool:
        if node.op_type not in FLOAT_RESULT or self.profile.quantize_outputs:
            return False
        tail = self.tails[node.name]
        if tail != node.output[0]:
            return False
        return not any(reader.name in self.inside for reader in self.readers.get(tail, []))


def _run(state: State, bench: Bench) -> State:
    scheme = place(state.model, state.seen(), bench.profile, depthwise="int8", others="int8")
    notes = state.notes
    if not scheme.layers:
        notes = (*notes, "The model has no Conv, Gemm or MatMul with constant weights: nothing to compress.")
    return dataclasses.replace(state, scheme=scheme, notes=notes)


PLACE = Pass("place", "placing int8 operators", _run)


def _run_float(state: State, bench: Bench) -> State:
    scheme = place(state.model, state.seen(), bench.profile, depthwise="float", others="float")
    return dataclasses.replace(state, scheme=scheme)


PLACE_FLOAT = Pass("place-float", "storing weights as whole numbers", _run_float)
