"""Bring a graph into the one form that every later pass reads: batch-norm folded, Gemm instead of MatMul + Add.

What is folded away costs nothing at run time either way; what matters is that ranges are searched after folding and
that no pass needs to know two spellings of the same thing.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from compress import graph
from compress.graph import Array
from compress.passes.fold import fold_constants
from compress.passes.strip import strip
from compress.pipeline import Bench, Pass, State
from skills import ort
from skills.errors import FormatError

OPSET = 21  # the first with 4-bit initializers that Cast and DequantizeLinear take
IR = 10  # the IR version that belongs to it
NOTHING = ("Identity", "Dropout")


def canonicalise(model: Any) -> Any:
    """Return the canonical form; see the functions below for the rewritings, each of which keeps the function."""
    model = strip(_raise_opset(model))
    for rewrite in REWRITINGS:
        rewrite(model)
        graph.drop_dead(model)
    model.ir_version = IR
    _name_nodes(model)
    onnx.shape_inference.infer_shapes(model)
    return model


def _raise_opset(model: Any) -> Any:
    found = graph.opset(model)
    if found == OPSET:
        return graph.copy(model)
    with contextlib.suppress(Exception):  # the converter raises RuntimeError and its own kinds, undocumented
        return onnx.version_converter.convert_version(model, OPSET)
    if 13 <= found <= ort.MAX_OPSET:
        return graph.copy(model)  # 8-bit storage works; emit() sees the opset and leaves 4-bit storage out
    raise FormatError(
        f"the model uses operator set {found}, which cannot be converted to {OPSET}: export it again with opset {OPSET}"
    )


def _remove_nothing(model: Any) -> None:
    """Identity and (at inference) Dropout pass their input on, and so does a Relu what another one gives."""
    ends = graph.outputs(model)
    rename: dict[str, str] = {}
    ending: dict[str, str] = {}  # what a node makes that only passes it on as the graph's output -> that output
    made = {name for node in model.graph.node for name in node.output} - ends
    kept = []
    positive: set[str] = set()
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = rename.get(name, name)
        if node.op_type == "Relu":
            if node.input[0] in positive and node.output[0] not in ends:
                rename[node.output[0]] = node.input[0]
                continue
            positive.add(node.output[0])
        mask_is_read = len(node.output) > 1 and bool(node.output[1]) and node.output[1] in graph.consumers(model)
        training = len(node.input) > 2 and bool(node.input[2])
        if node.op_type in NOTHING and node.output[0] not in ends and not mask_is_read and not training:
            rename[node.output[0]] = node.input[0]
        elif node.op_type in NOTHING and node.input[0] in made - ending.keys() and not mask_is_read and not training:
            ending[node.input[0]] = node.output[0]
        else:
            kept.append(node)
    for node in kept:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = ending.get(name, name)
    graph.replace(model.graph.node, kept)


def _bias_apart(model: Any) -> None:
    """A bias that is computed, which no int8 kernel takes, is added behind its layer: addmm with a residual, say."""
    values = graph.arrays(model)
    kept = []
    for node in model.graph.node:
        kept.append(node)
        bias = node.input[2] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2 else ""
        if not bias or bias in values or node.input[1] not in values:
            continue
        made, beta = node.output[0], graph.attributes(node).get("beta", 1.0)
        del node.input[2:]
        if beta == 0.0:
            continue
        node.output[0] = f"{made}.product"
        if node.op_type != "Gemm" or beta != 1.0:
            pixels = np.arange(1, values[node.input[1]].ndim - 1)  # a bias has one number a channel
            kind, constant = ("Mul", np.float32(beta)) if node.op_type == "Gemm" else ("Unsqueeze", pixels)
            model.graph.initializer.append(graph.tensor(f"{made}.how", np.asarray(constant)))
            kept.append(onnx.helper.make_node(kind, [bias, f"{made}.how"], [f"{made}.bias"]))
            bias = f"{made}.bias"
        kept.append(onnx.helper.make_node("Add", [node.output[0], bias], [made]))
    graph.replace(model.graph.node, kept)


def _fold_batch_norm(model: Any) -> None:
    """Conv or Gemm followed by BatchNormalization: scale the weights, shift the bias."""
    values = graph.arrays(model)
    readers = graph.consumers(model)
    makers = graph.producers(model)
    ends = graph.outputs(model)
    gone: set[str] = set()
    for norm in model.graph.node:
        if norm.op_type != "BatchNormalization" or any(name not in values for name in norm.input[1:5]):
            continue
        layer = makers.get(norm.input[0])
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm") or layer.output[0] in ends:
            continue
        if len(readers[layer.output[0]]) != 1 or layer.input[1] not in values or len(readers[layer.input[1]]) != 1:
            continue
        axis = _output_axis(layer)
        if axis is None:
            continue
        gamma, beta, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:5])
        factor = gamma / np.sqrt(variance + graph.attributes(norm).get("epsilon", 1e-5))
        weight = values[layer.input[1]]
        along = [1] * weight.ndim
        along[axis] = -1
        bias = values[layer.input[2]].astype(np.float64) if len(layer.input) > 2 and layer.input[2] else np.zeros(1)
        _set(model, values, layer, 1, (weight * factor.reshape(along)).astype(np.float32))
        _set(model, values, layer, 2, (beta + (bias - mean) * factor).astype(np.float32))
        layer.output[0] = norm.output[0]
        gone.add(norm.output[0])
    kept = [n for n in model.graph.node if n.op_type != "BatchNormalization" or n.output[0] not in gone]
    graph.replace(model.graph.node, kept)


def _output_axis(layer: Any) -> int | None:
    facts = graph.attributes(layer)
    match layer.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1 if facts.get("group", 1) == 1 else None
        case _:
            plain = facts.get("alpha", 1.0) == 1.0 and facts.get("beta", 1.0) == 1.0
            return (0 if facts.get("transB", 0) else 1) if plain else None


def _set(model: Any, values: dict[str, Array], node: Any, at: int, value: Array) -> None:
    """Give input `at` of a node a new constant under a name of its own."""
    name = f"{node.output[0]}.{'weight' if at == 1 else 'bias'}.folded"
    model.graph.initializer.append(graph.tensor(name, value))
    values[name] = value
    if at < len(node.input):
        node.input[at] = name
    else:
        node.input.append(name)


def _pad_in_conv(model: Any) -> None:
    """A Conv can add the zeros of the Pad before it itself."""
    values, makers, readers = graph.arrays(model), graph.producers(model), graph.consumers(model)
    for node in model.graph.node:
        pad = makers.get(node.input[0]) if node.op_type == "Conv" else None
        if pad is None or pad.op_type != "Pad" or len(pad.input) > 3 or len(readers[pad.output[0]]) > 1:
            continue
        facts, more = graph.attributes(node), values.get(pad.input[1])
        value = values.get(pad.input[2], np.ones(1)) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
        zeros = graph.attributes(pad).get("mode", b"constant") == b"constant" and not value.any()
        if more is None or not zeros or more.min() < 0 or facts.get("auto_pad", b"NOTSET") != b"NOTSET":
            continue
        before, after = more[: len(more) // 2], more[len(more) // 2 :]
        if before[:2].any() or after[:2].any():
            continue
        own = facts.get("pads") or [0] * (len(more) - 4)
        rest = [item for item in node.attribute if item.name != "pads"]
        sums = [int(a + b) for a, b in zip(own, (*before[2:], *after[2:]), strict=True)]
        graph.replace(node.attribute, [*rest, onnx.helper.make_attribute("pads", sums)])
        node.input[0] = pad.input[0]


def _mean_to_pool(model: Any) -> None:
    """ReduceMean over all pixels (what newer exporters write) has no int8 kernel; GlobalAveragePool has."""
    values, sizes = graph.arrays(model), graph.shapes(model)
    kept = []
    for node in model.graph.node:
        facts = graph.attributes(node)
        shape = sizes.get(node.input[0]) if node.input else None
        if node.op_type != "ReduceMean" or shape is None or len(shape) < 3:
            kept.append(node)
            continue
        axes = values.get(node.input[1]) if len(node.input) > 1 else facts.get("axes")
        pixels = list(range(2, len(shape)))
        if axes is None or sorted(int(a) % len(shape) for a in axes) != pixels:
            kept.append(node)
        elif facts.get("keepdims", 1):
            kept.append(onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], node.name))
        else:
            pooled = node.output[0] + ".pooled"
            kept.append(onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name))
            kept.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], axis=1))
    graph.replace(model.graph.node, kept)


def whole_pool(model: Any) -> None:
    """AveragePool over the whole picture is GlobalAveragePool, which has an int8 kernel in more cases."""
    sizes = graph.shapes(model)
    for node in model.graph.node:
        facts = graph.attributes(node)
        shape = sizes.get(node.input[0], ()) if node.op_type == "AveragePool" else ()
        if len(shape) >= 3 and tuple(facts["kernel_shape"]) == shape[2:] and not any(facts.get("pads", ())):
            del node.attribute[:]
            node.op_type = "GlobalAveragePool"


def _matmul_to_gemm(model: Any) -> None:
    """MatMul by a constant matrix on a 2-D input, with or without an Add of a constant row, is a Gemm."""
    values, sizes, readers = graph.arrays(model), graph.shapes(model), graph.consumers(model)
    ends = graph.outputs(model)
    skip: set[str] = set()
    kept = []
    for node in model.graph.node:
        if node.output[0] in skip:
            continue
        weight = values.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2 or len(sizes.get(node.input[0], ())) != 2:
            kept.append(node)
            continue
        inputs, made = [node.input[0], node.input[1]], node.output[0]
        after = readers.get(made, [])
        if len(after) == 1 and after[0].op_type == "Add" and made not in ends:
            other = next((name for name in after[0].input if name != made), made)
            if other in values and values[other].shape in ((weight.shape[1],), (1, weight.shape[1])):
                model.graph.initializer.append(graph.tensor(made + ".bias", values[other].reshape(-1)))
                inputs.append(made + ".bias")
                made = after[0].output[0]
                skip.add(made)
        kept.append(onnx.helper.make_node("Gemm", inputs, [made], node.name))
    graph.replace(model.graph.node, kept)


def _plain_gemm(model: Any) -> None:
    """Store every constant Gemm weight as [out, in] with alpha and beta multiplied in."""
    values = graph.arrays(model)
    for node in model.graph.node:
        facts = graph.attributes(node)
        if node.op_type != "Gemm" or node.input[1] not in values or facts.get("transA", 0):
            continue
        weight, alpha, beta = values[node.input[1]], facts.get("alpha", 1.0), facts.get("beta", 1.0)
        if facts.get("transB", 0) and alpha == 1.0 and beta == 1.0:
            continue
        _set(model, values, node, 1, ((weight if facts.get("transB", 0) else weight.T) * alpha).astype(weight.dtype))
        if len(node.input) > 2 and node.input[2] and beta != 1.0:  # a constant: see _bias_apart
            _set(model, values, node, 2, (values[node.input[2]] * beta).astype(weight.dtype))
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("transB", 1))


def _name_nodes(model: Any) -> None:
    """Give each node a name of its own: layers are known by it in the scheme, the audit and the report."""
    taken: set[str] = set()
    for node in model.graph.node:
        name = node.name or node.output[0]
        at = 2
        while name in taken:
            name = f"{node.name or node.output[0]}_{at}"
            at += 1
        node.name = name
        taken.add(name)


REWRITINGS: tuple[Callable[[Any], None], ...] = (
    fold_constants, _remove_nothing, _bias_apart, _fold_batch_norm, _pad_in_conv, _mean_to_pool, whole_pool, _matmul_to_gemm,
    _fold_batch_norm, _plain_gemm,
)  # fmt: skip


def _run(state: State, _bench: Bench) -> State:
    return dataclasses.replace(state, model=canonicalise(state.model))


CANONICALISE = Pass("canonicalise", "folding batch-norm, cleaning the graph", _run)
