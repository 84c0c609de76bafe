"""A network made ready to train: its weights seen as codes, each convolution normalised; and the graph that comes of it.

Step sizes are learned (LSQ, Esser et al. 2020, arXiv 1902.08153), one a channel. While it trains, every convolution is
followed by a batch normalisation that restores the mean and spread that were there before its weights were rounded, so that what
rounding shifts is set right from the first step; it is folded into weights, scales and biases in the end, so nothing of it
is left in the graph.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from compress import graph
from compress.graph import Array
from compress.scheme import Layer
from compress.to_torch import Twin
from compress.weights import Codes, along, encode, half, limits

SCALE_RATE = 0.1  # of the weights' learning rate
EPS = 1e-5
LEAST_SCALE = 1e-9
LEAST_FACTOR = 1e-4  # a channel's normalisation may shrink to this part of what it was; below, its scale would vanish

Tensor = Any
Spread = tuple[Array, Array]  # mean and standard deviation of each channel


class _Round(torch.autograd.Function):  # type: ignore[misc]
    """Rounding to codes and back whose gradient also reaches the scales."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        code = weight / scale
        ctx.save_for_backward(code, scale)
        ctx.limits = low, high
        return code.round().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        code, scale = ctx.saved_tensors
        low, high = ctx.limits
        inside = (code >= low) & (code <= high)
        by_scale = torch.where(inside, code.round() - code, code.clamp(low, high)).mul_(grad)
        for axis, size in enumerate(scale.shape):
            if size == 1:
                by_scale = by_scale.sum(axis, keepdim=True)
        return grad * inside, by_scale / (code.numel() / scale.numel() * max(1, high)) ** 0.5, None, None


class _Rounding:
    """The learned scales of one layer, as a transform of its weight."""

    def __init__(self, layer: Layer, weight: Array) -> None:
        self.layer = layer
        self.low, self.high = limits(layer.bits)
        shape = [1] * weight.ndim
        shape[layer.axis] = -1
        start = encode(weight, layer.axis, layer.bits).scales.astype(np.float32)
        self.scale = torch.nn.Parameter(torch.from_numpy(start.reshape(shape).copy()))

    def __call__(self, weight: Tensor) -> Tensor:
        return _Round.apply(weight, self.scale.clamp_min(LEAST_SCALE), self.low, self.high)

    def codes(self, weight: Array, factor: Array) -> Codes:
        """Return the codes of the trained weight; `factor`, positive, is what a norm behind the layer multiplies by."""
        scale = np.maximum(self.scale.detach().cpu().numpy(), LEAST_SCALE)
        values = np.clip(np.rint(weight / scale), self.low, self.high).astype(np.int8)
        return Codes(values, half(scale.reshape(-1) * factor), self.layer.axis, self.layer.bits)


class _Norm(torch.nn.Module):  # type: ignore[misc]
    """Batch normalisation behind one layer, starting at the mean and spread there before weights were rounded."""

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        mean, deviation = (torch.from_numpy(np.asarray(part, np.float32)) for part in spread)
        self.gain, self.shift = torch.nn.Parameter(deviation.clamp_min(EPS)), torch.nn.Parameter(mean.clone())
        self.register_buffer("mean", mean.clone())
        self.register_buffer("var", (deviation**2).clone())
        self.momentum = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.mean, self.var, self.gain.abs(), self.shift, self.training, self.momentum, EPS
        )

    def fold(self) -> tuple[Array, Array]:
        """Return factor (positive) and offset per channel: the norm computes `factor * x + offset`."""
        factor = (self.gain.abs() / (self.var + EPS).sqrt()).detach()
        factor = factor.clamp_min(LEAST_FACTOR * float(factor.max()))
        return factor.cpu().numpy(), (self.shift - self.mean * factor).detach().cpu().numpy()


class Student:
    """A twin made ready to train: `rounded` layers see their weights as codes, convolutions are normalised."""

    def __init__(self, model: Any, rounded: Sequence[Layer], spreads: Mapping[str, Spread]) -> None:
        self.source = graph.with_biases(model)
        self.twin = Twin(self.source)
        values = graph.arrays(self.source)
        self.rounding = {layer.weight: _Rounding(layer, values[layer.weight]) for layer in rounded}
        makers = graph.producers(self.source)
        self.norms = {
            name: _Norm(spread)
            for name, spread in spreads.items()
            if name in makers and name not in graph.outputs(model)
        }
        self.twin.on_weight.update(self.rounding)
        self.twin.on_tensor.update(self.norms)
        self.makers = makers

    def modules(self) -> torch.nn.ModuleList:
        """Return everything that has parameters or statistics."""
        own = torch.nn.Module()
        for at, rounding in enumerate(self.rounding.values()):
            own.register_parameter(f"scale{at}", rounding.scale)
        return torch.nn.ModuleList([self.twin, *self.norms.values(), own])

    def groups(self, rate: float, decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups: weights decay, scales learn slower, vectors do not decay."""
        flat = [p for p in self.twin.parameters() if p.ndim > 1]
        rest = [p for p in self.twin.parameters() if p.ndim <= 1] + [
            p for n in self.norms.values() for p in n.parameters()
        ]
        scales = [rounding.scale for rounding in self.rounding.values()]
        rows = [
            (flat, rate, decay),
            (rest, rate, 0.0),
            (scales, rate * SCALE_RATE, 0.0),
        ]
        return [{"params": p, "lr": full, "base": full, "weight_decay": less} for p, full, less in rows if p]

    def finish(self) -> tuple[Any, dict[str, Codes]]:
        """Return the graph with the norms folded in, and the codes of the rounded layers by node.

        A rounded layer's weights are those that its codes stand for: the ones that were trained may lie far from them (on
        CIFAR a ResNet-56 that was right 91 % of the time with its codes was so 40 % of the time without).
        """
        model = self.twin.to_onnx()
        values = graph.arrays(model)
        factors: dict[str, Array] = {}
        for name, norm in self.norms.items():
            weight, bias = self.makers[name].input[1:3]
            factors[weight], offset = norm.fold()
            values[bias] = values[bias] * factors[weight] + offset
        codes: dict[str, Codes] = {}
        for name, factor in factors.items():
            if name not in self.rounding:
                axis = 1 if self.transposed(name) else 0
                values[name] = values[name] * along(factor, axis, values[name].ndim)
        for name, rounding in self.rounding.items():
            made = rounding.codes(values[name], factors.get(name, np.ones(1, np.float32)))
            codes[rounding.layer.node], values[name] = made, made.restore()
        for item in model.graph.initializer:
            if item.name in self.twin.weights:
                item.CopyFrom(graph.tensor(item.name, values[item.name].astype(np.float32)))
        return model, codes

    def transposed(self, weight: str) -> bool:
        """Return whether a weight belongs to a transposed convolution, whose output channels lie on axis 1."""
        return any(node.op_type == "ConvTranspose" and node.input[1] == weight for node in self.source.graph.node)


def spreads(model: Any, x: Array, batch: int = 64) -> dict[str, Spread]:
    """Return mean and standard deviation of each channel behind every convolution of a float model, over inputs `x`."""
    twin = Twin(model).eval()
    weights = set(graph.arrays(model))
    names = [
        node.output[0]
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose")
        and node.input[1] in weights
        and len(graph.consumers(model).get(node.input[1], ())) == 1
        and node.output[0] not in graph.outputs(model)
    ]
    sums: dict[str, list[Array]] = {}
    with torch.no_grad():
        for at in range(0, len(x), batch):
            part = torch.from_numpy(np.ascontiguousarray(x[at : at + batch]))
            for name, single in twin.run({twin.inputs[0]: part}, names).items():
                value = single.double()
                over = [axis for axis in range(value.ndim) if axis != 1]
                count = value.numel() / value.shape[1]
                row = [np.asarray(count), value.sum(over).numpy(), (value**2).sum(over).numpy()]
                sums[name] = [a + b for a, b in zip(sums[name], row, strict=True)] if name in sums else row
    found = {}
    for name, (count, first, second) in sums.items():
        mean = first / count
        found[name] = (mean, np.sqrt(np.maximum(second / count - mean**2, 0.0)))
    return found
