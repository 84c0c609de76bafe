"""What a layer reads and what it should answer, at some places of some samples, summed into second moments."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf

from compress import graph
from compress.graph import Array
from compress.operators.site import Site
from compress.operators.windows import Windows, as_torch
from compress.rounding import damped
from compress.scheme import Layer

PLACES = 20_000  # rows summed for a layer, over all samples
HELD_BY_FEW = 4.0  # so much stronger are weights held where they are, where rows are few
CHUNK = 1 << 22  # numbers gathered at once

Tensor = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Moments:
    """Of one layer, by groups of outputs: `inputs` means [groups, inputs], `gram` their second moments about the mean.

    `missing` [groups, outputs] is the mean by which the answers of the present weights fall short, without any bias, and
    `cross` [groups, inputs, outputs] what that shortfall and the inputs have in common. All are means over `count` rows.
    """

    inputs: Array
    gram: Array
    missing: Array
    cross: Array
    count: int

    def about(self, *, takes_bias: bool) -> tuple[Array, Array]:
        """Return `gram` and `cross` as the weights see them: about the mean where a bias makes up for it, else about 0."""
        if takes_bias:
            return self.gram, self.cross
        mean = self.inputs[:, :, None]
        return self.gram + mean * self.inputs[:, None, :], self.cross + mean * self.missing[:, None, :]

    def few(self) -> float:
        """Return how few rows there are for the inputs, 0..1."""
        return min(1.0, float(self.gram.shape[-1]) / self.count)

    def nearest(self, rows: Array, ridge: float, *, takes_bias: bool) -> Array:
        """Return weights [groups, outputs, inputs] that answer nearest to what is wanted, held to `rows` by `ridge`."""
        gram, cross = self.about(takes_bias=takes_bias)
        return rows + np.linalg.solve(damped(gram, ridge + HELD_BY_FEW * self.few()), cross).transpose(0, 2, 1)

    def shift(self, change: Array) -> Array:
        """Return the bias that is missing once the weights have changed by so much."""
        return np.asarray((self.missing - (change @ self.inputs[..., None])[..., 0]).reshape(-1))


def rows_of(layer: Layer, weight: Array) -> Array:
    """Return a layer's weights as [groups, outputs, inputs]."""
    if layer.op == "Conv":
        return np.asarray(weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1))
    return np.asarray(np.moveaxis(weight, layer.axis, 0).reshape(1, weight.shape[layer.axis], -1))


def weight_of(layer: Layer, rows: Array) -> Array:
    """Return [groups, outputs, inputs] in the shape of the layer's weight."""
    if layer.op == "Conv":
        return np.ascontiguousarray(rows.reshape(layer.shape))
    return np.ascontiguousarray(np.moveaxis(rows.reshape(layer.shape[layer.axis], -1), 0, layer.axis))


def measurable(layer: Layer, node: Any) -> bool:
    """Return whether a layer is a sum over what it reads, so that its moments can be taken."""
    facts = graph.attributes(node)
    match layer.op:
        case "Conv":
            return True
        case "Gemm":
            return not facts.get("transA", 0) and facts.get("alpha", 1.0) == 1.0 and facts.get("beta", 1.0) == 1.0
        case "MatMul":
            return len(layer.shape) == 2 and node.input[1] == layer.weight
    return False


def moments(layer: Layer, node: Any, weight: Array, batches: Sequence[tuple[Tensor, Tensor]], seed: int = 0) -> Moments:
    """Sum up what the layer reads and what it should answer, (inputs, answers) a batch, at most `PLACES` rows."""
    rows = torch.from_numpy(np.array(rows_of(layer, weight), np.float32))
    groups, outputs, inputs = rows.shape
    chance = np.random.default_rng(seed)
    each = max(1, PLACES // len(batches))
    sizes = ((inputs, inputs), (inputs, outputs), (inputs,), (outputs,))
    gram, cross, mean, missing = (torch.zeros(groups, *size, dtype=torch.float64) for size in sizes)
    count = 0
    for x, wanted in batches:
        for read, answer in _rows(layer, node, x, wanted, each, chance):
            seen = read.transpose(0, 1).contiguous()
            short = answer.transpose(0, 1) - seen @ rows.transpose(1, 2)
            gram += seen.transpose(1, 2) @ seen
            cross += seen.transpose(1, 2) @ short
            mean += seen.sum(1)
            missing += short.sum(1)
            count += seen.shape[1]
    mean, missing, gram, cross = (part / max(count, 1) for part in (mean, missing, gram, cross))
    gram -= mean[:, :, None] * mean[:, None, :]
    cross -= mean[:, :, None] * missing[:, None, :]
    return Moments(mean.numpy(), gram.numpy(), missing.numpy(), cross.numpy(), count)


def _rows(
    layer: Layer, node: Any, x: Tensor, wanted: Tensor, most: int, chance: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what is read, [rows, groups, inputs], and what should be answered, [rows, groups, outputs]."""
    groups = layer.groups
    if layer.op != "Conv":
        x, wanted = x.reshape(-1, x.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        at = torch.from_numpy(_drawn(len(x), most, chance))
        yield x[at][:, None], wanted[at][:, None]
        return
    windows = Windows(Site(node, graph.attributes(node), {}, 0), layer.shape[2:])
    x = nnf.pad(x, as_torch(windows.padding(x.shape[2:]))).movedim(1, -1)
    sizes = tuple(wanted.shape[2:])
    wanted = wanted.movedim(1, -1)
    chosen = _drawn(len(x) * math.prod(sizes), most, chance)
    step = max(1, CHUNK // (x.shape[-1] * math.prod(layer.shape[2:])))
    for start in range(0, len(chosen), step):
        sample, *place = (torch.from_numpy(a) for a in np.unravel_index(chosen[start : start + step], (len(x), *sizes)))
        answer = wanted[(sample, *place)]
        dims = len(sizes)
        index = [sample.reshape(-1, *[1] * dims)]
        for d, at in enumerate(place):
            offsets = torch.arange(layer.shape[2 + d]) * windows.dilations[d]
            along = offsets.reshape(*[1] * (d + 1), -1, *[1] * (dims - d - 1))
            index.append(at.reshape(-1, *[1] * dims) * windows.strides[d] + along)
        seen = x[tuple(index)].flatten(1, dims)  # [rows, kernel entries, channels]
        seen = seen.reshape(len(seen), seen.shape[1], groups, -1).permute(0, 2, 3, 1)
        yield seen.reshape(len(seen), groups, -1), answer.reshape(len(answer), groups, -1)


def _drawn(count: int, most: int, chance: np.random.Generator) -> Array:
    return np.arange(count) if count <= most else np.sort(chance.choice(count, most, replace=False))
