"""Even out the channels between two layers, where that brings the 8-bit model closer: one scale then fits them all.

What a layer divides a channel by, the next one multiplies it with again; a Relu between them lets a positive factor
through. This is cross-layer equalization (Nagel et al., arXiv 1906.04721, section 4.1) with the factors of SmoothQuant
(Xiao et al., arXiv 2211.10438): weights have a scale a channel, so it is the activations that need it. A Clip lets no factor
through and ends a chain.
"""

import dataclasses
from typing import Any

import numpy as np

from compress import graph
from compress.graph import Array
from compress.passes.bias import distance
from compress.passes.place import find_layers, place
from compress.passes.ranges import activations
from compress.pipeline import Bench, Pass, State
from compress.scheme import Layer
from compress.statistics import Statistics, observe
from compress.weights import along

THROUGH = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool")  # let a positive factor a channel through
MOST = 16.0  # a channel is moved by at most this
LEAST_GAIN = 0.75  # of the distance without; nearer than that the two are alike


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Two layers with nothing between them that a factor a channel would not pass; `between` is what the second reads."""

    first: Layer
    second: Layer
    bias: str
    between: str


def links(model: Any) -> list[Link]:
    """Return the pairs of layers whose channels can be evened out."""
    layers, readers = {layer.node: layer for layer in find_layers(model)}, graph.consumers(model)
    ends, stored = graph.outputs(model), graph.arrays(model)
    found = []
    for node in model.graph.node:
        first = layers.get(node.name)
        bias = node.input[2] if len(node.input) > 2 else ""
        own = not bias or (bias in stored and len(readers[bias]) == 1 and stored[bias].ndim == 1)
        if first is None or first.op != "Conv" or not own:
            continue
        name, cut = node.output[0], False
        while len(readers.get(name, ())) == 1 and name not in ends:
            (after,) = readers[name]
            second = layers.get(after.name)
            if after.op_type in THROUGH:
                name, cut = after.output[0], cut or after.op_type == "Relu"
                continue
            if cut and second is not None and second.op == "Conv" and (second.groups == 1 or second.depthwise):
                found.append(Link(first, second, bias, name))
            break
    return found


def equalized(model: Any, seen: Statistics) -> Any:
    """Return the model with evened-out channels; it computes the same."""
    model = graph.copy(model)
    values = {name: np.array(value) for name, value in graph.arrays(model).items()}
    for link in links(model):
        first, second = values[link.first.weight], values[link.second.weight]
        factor = _factors(link, second, seen[link.between].mean)
        values[link.first.weight] = first / along(factor, 0, first.ndim)
        if link.bias:
            values[link.bias] = values[link.bias] / factor
        repeat = len(second) // len(factor) if link.second.depthwise else 1
        axis = 0 if link.second.depthwise else 1
        values[link.second.weight] = second * along(np.repeat(factor, repeat), axis, second.ndim)
    items = [graph.tensor(item.name, values[item.name]) for item in model.graph.initializer]
    graph.replace(model.graph.initializer, items)
    return model


def _factors(link: Link, second: Array, mean: Array) -> Array:
    """Return what each channel is divided by: half of the way to equal means for a layer that mixes channels."""
    size = link.first.shape[0]
    if mean.size != size:
        return np.ones(size, np.float32)
    large = np.maximum(mean, 1e-6 * max(float(mean.max()), 1e-12))
    if not link.second.depthwise:
        reach = np.abs(np.moveaxis(second, 1, 0).reshape(size, -1)).max(axis=1)
        large = np.sqrt(large / np.maximum(reach, 1e-6 * max(float(reach.max()), 1e-12)))
    return np.asarray(np.clip(large / np.exp(np.log(large).mean()), 1 / MOST, MOST), np.float32)


def _run(state: State, bench: Bench) -> State:
    if not links(state.model):
        return state
    better = equalized(state.model, state.seen())
    seen = observe(
        better, activations(better), bench.splits.calibrate.x, lambda done: bench.say(done, ""), bench.threads
    )
    tried = dataclasses.replace(state, model=better, statistics=seen)
    before, after = (
        distance(one, place(one.model, one.seen(), bench.profile, depthwise="int8", others="int8"), bench)
        for one in (state, tried)
    )
    keep = bench.planned is not None or after < LEAST_GAIN * before  # a recipe names this pass where it was kept
    note = (
        f"Evening out channels: distance of plain 8 bits to the original {before:.4g} without, {after:.4g} with it: "
        f"{'kept' if keep else 'not kept'}."
    )
    return dataclasses.replace(tried if keep else state, notes=(*state.notes, note))


EQUALIZE = Pass("equalize", "evening out channels", _run)
