"""Find low-bit codes layer after layer, each fed by the layers already rounded, and made to answer as the original does.

What earlier layers get wrong is thus seen by later ones, which make up for it as far as their weights allow: the target
of each layer is what the float model gives there (asymmetric calibration, as in BRECQ, arXiv 2102.05426, and GPTAQ, arXiv
2504.02692). What remains of the mean goes into the bias (sequential bias correction, Nagel et al., arXiv 1906.04721).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from compress import graph
from compress.beside import Beside
from compress.emit import BIAS_LIMIT, layer_codes
from compress.graph import Array
from compress.moments import Moments, measurable, moments, rows_of, weight_of
from compress.rounding import damped, loss, settle
from compress.scheme import Layer, Scheme
from compress.weights import Codes
from skills.errors import DeadlineExceeded

DAMPING = 0.01  # of the mean second moment, and more where there are few rows for the inputs
RIDGE = 0.1  # how strongly weights are held where they are, likewise

Tensor = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """A layer's new codes, its float bias (None where the operator takes none), and the squared error of its answers,
    up to a number that is the same for all fits of a layer."""

    codes: Codes
    bias: Array | None
    error: float


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One layer with what it reads and should answer: rounds its weights to any width."""

    layer: Layer
    weight: Array
    moments: Moments
    takes_bias: bool
    range_bits: int
    floor: Array

    def fit(self, bits: float) -> Fit:
        """Return codes of this width whose answers come nearest to the wanted ones, and the bias that goes with them."""
        seen, rows = self.moments, rows_of(self.layer, self.weight).astype(np.float64)
        gram, cross = seen.about(takes_bias=self.takes_bias)
        wanted = seen.nearest(rows, RIDGE, takes_bias=self.takes_bias)
        codes, scales = settle(wanted, damped(gram, DAMPING + seen.few()), bits, self.range_bits, self.floor)
        change = codes * scales[..., None].astype(np.float64) - rows
        error = float(loss(change, gram).sum() - 2 * (change * cross.transpose(0, 2, 1)).sum())
        bias = None
        if self.takes_bias:
            bias = seen.shift(change).astype(np.float32)
        stored = Codes(weight_of(self.layer, codes), scales.reshape(-1).astype(np.float32), self.layer.axis, bits)
        return Fit(stored, bias, error)


Choose = Callable[[Problem], Fit | None]


def walk(
    model: Any, scheme: Scheme, x: Array, choose: Choose, say: Callable[[float], None],
    left: Callable[[], float] = lambda: math.inf,
) -> bool:  # fmt: skip
    """Run the float model and its rounded form side by side over `x`, and let `choose` fit each layer as it is reached.

    Where it answers None the layer's float weights stay. Returns whether all were reached: the walk ends before a layer for which
    no more seconds are `left` than the one before it took.

    Raises:
        FormatError: an operator of the graph has no torch counterpart.
    """
    own = {layer.node: layer for layer in scheme.layers if layer.op in ("Conv", "Gemm")}
    model = graph.with_biases(model, lambda node: node.name in own and measurable(own[node.name], node))
    pair = _Rounded(model, scheme, x)
    count = len(model.graph.node)
    with torch.no_grad():
        before, took = left(), 0.0
        for at, node in enumerate(pair.beside.nodes()):
            layer = pair.layers.get(node.name)
            if layer is not None:
                if left() <= took:
                    return False
                pair.fit(layer, node, choose)
                if before < math.inf:
                    took = before - left()
            before = left()
            say((at + 1) / count)
    return True


class _Rounded:
    """The float model and its rounded form side by side."""

    def __init__(self, model: Any, scheme: Scheme, x: Array) -> None:
        self.values, self.scheme = graph.arrays(model), scheme
        self.beside = Beside(model, model, x, shown=self._coded)
        self.weights = self.beside.changed.weights
        self.layers = {layer.node: layer for layer in scheme.layers}

    def fit(self, layer: Layer, node: Any, choose: Choose) -> None:
        """Let a node's layer be rounded."""
        if not measurable(layer, node):
            if layer.bits < 32:
                codes = layer_codes(layer, self.values[layer.weight], self.scheme.profile.weight_bits)
                self.weights[layer.weight].copy_(torch.from_numpy(codes.restore()))
            return
        fit = choose(self._problem(layer, node))
        if fit is not None:
            self.weights[layer.weight].copy_(torch.from_numpy(fit.codes.restore()))
            if fit.bias is not None:
                self.weights[node.input[2]].copy_(torch.from_numpy(fit.bias))

    def _problem(self, layer: Layer, node: Any) -> Problem:
        weight, scheme = self.values[layer.weight], self.scheme
        takes_bias = layer.op in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in self.weights
        groups = layer.groups if layer.op == "Conv" else 1
        floor = np.zeros(layer.shape[layer.axis], np.float32)
        feed = scheme.ranges.get(node.input[0])
        if takes_bias and feed is not None and layer.compute == "int8":  # below, the bias would overflow int32
            scale = feed.quant(scheme.profile.activation)[0]
            floor = (2 * np.abs(self.values[node.input[2]]) / (scale * BIAS_LIMIT)).astype(np.float32)
        range_bits = scheme.profile.weight_bits if layer.compute == "int8" else 8
        found = moments(layer, node, weight, self.beside.pairs(node))
        return Problem(layer, weight, found, takes_bias, range_bits, floor.reshape(groups, -1))

    def _coded(self, name: str, value: Tensor) -> Tensor:
        """Return what is left of an activation in 8-bit codes, if it carries any."""
        limits, kind = self.scheme.ranges.get(name), self.scheme.profile.activation
        if limits is None:
            return value
        scale, zero = limits.quant(kind)
        low = -128 if kind == "s8" else 0
        return torch.fake_quantize_per_tensor_affine(value, scale, zero, low, low + 255)


def rebuild(
    model: Any, scheme: Scheme, x: Array, say: Callable[[float], None] = lambda _share: None,
    left: Callable[[], float] = lambda: math.inf,
) -> Scheme:  # fmt: skip
    """Return the scheme with codes and biases for the width that each of its layers has.

    Raises:
        DeadlineExceeded: no seconds were `left` before the last layer.
        FormatError: an operator of the graph has no torch counterpart.
    """
    codes: dict[str, Codes] = {}
    biases: dict[str, Array] = {}

    def choose(problem: Problem) -> Fit | None:
        layer = problem.layer
        if layer.bits == 32:
            return None
        fit = problem.fit(layer.bits)
        codes[layer.node] = fit.codes
        if fit.bias is not None:
            biases[layer.node] = fit.bias
        return fit

    if not walk(model, scheme, x, choose, say, left):
        raise DeadlineExceeded("the time ended before all layers were fitted")
    return scheme.with_codes(codes).with_biases(biases)
