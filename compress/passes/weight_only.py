"""Store large linear layers in 4 bits with a scale for every few inputs, as neural-compressor rounds them.

Such layers compute in float in onnxruntime's `MatMulNBits`, which reads the 4 bits as they lie: nothing is rounded but
weights. That is how transformers are compressed whose activations do not fit 8 bits. Each way is tried as a whole model and
kept only where it is smaller than what was found before and may be expected to keep the budget.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from compress import graph, neural
from compress.graph import Array
from compress.moments import measurable
from compress.passes.bits import SAFE, Search
from compress.passes.place import place
from compress.pipeline import Bench, Pass, State
from compress.scheme import Candidate, Layer, Scheme
from compress.to_torch import Twin
from compress.weights import Blocks
from skills.errors import FormatError, SkerryError

LARGE = 1 << 14  # weights: below, nodes and scales weigh more than is won
SIZES = (128, 32)  # inputs that share a scale
SAMPLES, ROWS = 128, 4096  # calibration inputs, and rows of them that GPTQ sees of a layer


def large(model: Any, scheme: Scheme, size: int) -> list[Layer]:
    """Return the layers that can be stored in blocks of `size` inputs: large, linear, with a fixed weight."""
    nodes = {node.name: node for node in model.graph.node}
    return [
        layer
        for layer in scheme.layers
        if layer.op in ("MatMul", "Gemm")
        and layer.count >= LARGE
        and measurable(layer, nodes[layer.node])
        and layer.count // layer.shape[layer.axis] % size == 0
    ]


def in_blocks(state: State, bench: Bench, blocks: dict[str, Blocks]) -> Scheme:
    """Return the scheme with these layers in blocks, computing in float, and all others as they were."""
    old = state.planned()
    stay_float = {layer.node for layer in old.layers if layer.compute == "float"} | blocks.keys()
    scheme = place(
        state.model, state.seen(), bench.profile, depthwise="int8", others="int8", stay_float=frozenset(stay_float)
    )
    scheme = scheme.with_bits({layer.node: 4 if layer.node in blocks else layer.bits for layer in old.layers})
    biases = {node: bias for node, bias in old.biases.items() if node not in blocks}
    before = {layer.node: layer.bits for layer in old.layers if layer.node in blocks}
    return dataclasses.replace(scheme, codes=old.codes, biases=biases, blocks=blocks, bits_before=before)


def _run(state: State, bench: Bench) -> State:
    scheme = state.planned()
    if bench.planned is not None:
        asked = bench.planned.choices.get(WEIGHT_ONLY.name)
        return state if asked is None else _kept(state, _tried(state, bench, asked), asked, "Given:")
    if bench.profile.runtime != "onnxruntime" or not large(state.model, scheme, SIZES[-1]):
        return state
    if not neural.available():
        said = "Large linear layers could also be rounded by neural-compressor's weight-only methods: pip install 'skerry[inc]'."
        return dataclasses.replace(state, notes=(*state.notes, said))
    search = Search(state, bench, (8.0,))
    now = search.judge(scheme)
    tried: dict[str, Candidate] = {}
    told = []
    for at, way in enumerate(_ways()):
        if bench.left() <= 0 or not large(state.model, scheme, _ways()[way][1]):
            continue
        try:
            found = tried[way] = search.judge(_tried(state, bench, way))
            told.append(f"{way}: {found.bytes:,} bytes at {found.drop:+.2f}")
        except SkerryError as error:  # one way that fails is no reason to give up the others, or what was found before
            told.append(f"{way}: {error}")
        bench.say((at + 1) / len(_ways()), told[-1])
    note = f"Weight-only by neural-compressor, against {now.bytes:,} bytes at {now.drop:+.2f} points without: {'; '.join(told)}."
    state = dataclasses.replace(state, notes=(*state.notes, note), tried=(*state.tried, *tried.values()))
    better = [way for way, found in tried.items() if found.bytes < now.bytes and found.drop <= SAFE * bench.max_drop]
    if not better:
        return state
    best = min(better, key=lambda way: tried[way].bytes)
    return _kept(state, tried[best].scheme, best, "Kept:")


def _ways() -> dict[str, tuple[neural.Method, int]]:
    """Return what is tried, by the name that a recipe keeps."""
    return {f"{method} {size}": (method, size) for size in SIZES for method in neural.METHODS}


def _kept(state: State, scheme: Scheme, way: str, why: str) -> State:
    note = f"{why} {way} (method, inputs that share a scale) in {len(scheme.blocks)} layers."
    choices = {**state.choices, WEIGHT_ONLY.name: way}
    return dataclasses.replace(state, scheme=scheme, safer=(), bolder=(), notes=(*state.notes, note), choices=choices)


def _tried(state: State, bench: Bench, way: str) -> Scheme:
    """Return the scheme with every layer that can be in blocks of this way in them."""
    if way not in _ways():
        raise FormatError(f"there is no weight-only way '{way}', there are {', '.join(_ways())}")
    method, size = _ways()[way]
    return in_blocks(state, bench, _rounded(state, bench, large(state.model, state.planned(), size), method, size))


def _rounded(state: State, bench: Bench, layers: list[Layer], method: neural.Method, size: int) -> dict[str, Blocks]:
    values, nodes = graph.arrays(state.model), {node.name: node for node in state.model.graph.node}
    sources = {layer.node: nodes[layer.node].input[0] for layer in layers}
    try:
        reads = _reads(state.model, bench.splits.calibrate.x[:SAMPLES], sorted(set(sources.values())), bench.seed)
    except FormatError:  # an operator without torch counterpart: what is read is not known, and all inputs count alike
        reads = {}
    linears = []
    for layer in layers:
        weight = np.moveaxis(values[layer.weight], layer.axis, 0)
        read = reads.get(sources[layer.node], np.eye(weight.shape[1], dtype=np.float32))
        linears.append(neural.Linear(np.ascontiguousarray(weight), read))
    found = neural.rounded(linears, method, size)
    return {layer.node: blocks for layer, blocks in zip(layers, found, strict=True)}


def _reads(model: Any, x: Array, names: list[str], seed: int) -> dict[str, Array]:
    """Return rows of what is read under these names, at most `ROWS` each."""
    with torch.no_grad():
        found = Twin(model).run({model.graph.input[0].name: torch.from_numpy(np.array(x))}, names)
    chance = np.random.default_rng(seed)
    rows = {}
    for name, value in found.items():
        flat = value.reshape(-1, value.shape[-1]).numpy()
        rows[name] = flat if len(flat) <= ROWS else flat[np.sort(chance.choice(len(flat), ROWS, replace=False))]
    return rows


WEIGHT_ONLY = Pass("weight-only", "rounding large linear layers in blocks", _run)
