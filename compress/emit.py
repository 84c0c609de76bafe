"""Write a scheme as a graph that stock onnxruntime turns into its int8 kernels when it loads it.

Stored bits are not compute bits. Whatever depends on constants alone is folded at load into the plain int8 weights
that the kernel wants, so codes of 4, 3, 2 or 1.6 bits make the file smaller and run at the same speed; the same codes
straight in DequantizeLinear would be unpacked on every call. A layer that computes in float stores codes too:
Cast(FLOAT) → Mul(scale) folds to float weights (DequantizeLinear does not).

`compress/store.py` says how constants lie in the file, `compress/macros.py` how repeated nodes become functions.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx

from compress import graph
from compress.graph import Array
from compress.macros import DOMAIN, Folder, Piece
from compress.packing import DIGITS_RUNTIME
from compress.scheme import HEAVY, Layer, Range, Scheme
from compress.statistics import Statistics
from compress.store import Compact, Plain, Store
from compress.trim import letters, shorten, trim
from compress.weights import Codes, encode, encode_with
from skills.profile import Profile

COMPACT_OPSET = 18  # the first whose Split takes the number of parts
COMPACT_RUNTIME = (1, 18)  # the first that was tried; the least opset of `compress` needs it
BIAS_LIMIT = float(1 << 30)  # a bias may take half of the int32 accumulator
MIN_PACKED = 64  # fewer weights than this are stored as they came: the extra nodes would weigh more
CUTS = ("Relu", "Clip")
MICROSOFT = "com.microsoft"


def emit(model: Any, scheme: Scheme, seen: Statistics) -> Any:
    """Return the quantized graph. Layers are named `L0`, `L1`, … in the order of `scheme.layers`: short names are bytes."""
    return _Emitter(model, scheme, seen).build()


def node_name(at: int) -> str:
    """Return the name in the emitted graph of the scheme's layer number `at`."""
    return f"L{at}"


def widths(model: Any, profile: Profile) -> tuple[float, ...]:
    """Return the widths, largest first, in which this graph may store weights for the least runtime of the profile."""
    packed = _compact(model, profile) and _least(profile) >= DIGITS_RUNTIME
    return tuple(sorted((bits for bits in profile.stored_bits if bits == 8 or packed), reverse=True))


def least_runtime(scheme: Scheme) -> tuple[int, int]:
    """Return the least onnxruntime that loads what `emit` writes for this scheme into int8 kernels."""
    return DIGITS_RUNTIME if any(layer.bits < 8 for layer in scheme.layers) else COMPACT_RUNTIME


def _compact(model: Any, profile: Profile) -> bool:
    return (
        profile.runtime == "onnxruntime" and graph.opset(model) >= COMPACT_OPSET and _least(profile) >= COMPACT_RUNTIME
    )


def _least(profile: Profile) -> tuple[int, ...]:
    return tuple(int(part) for part in profile.runtime_min.split("."))


class _Emitter:
    def __init__(self, model: Any, scheme: Scheme, seen: Statistics) -> None:
        self.source, self.scheme, self.seen = model, scheme, seen
        self.values = graph.arrays(model)
        self.ends = graph.outputs(model)
        self.makers = graph.producers(model)
        self.model = graph.copy(model)
        self.layers: dict[str, list[tuple[int, Layer]]] = {}  # a node with two weights has two
        for at, layer in enumerate(scheme.layers):
            self.layers.setdefault(layer.node, []).append((at, layer))
        self.readers = graph.consumers(model)
        self.groups: dict[str, list[Piece]] = {}  # tensor -> the pieces that make it: a layer and what belongs to it
        self.codes_of: dict[str, str] = {}  # activation tensor -> its dequantized form
        self.widths = widths(model, scheme.profile)
        self.compact = _compact(model, scheme.profile)
        self.store: Store = (Compact if self.compact else Plain)(scheme.profile.activation)

    def build(self) -> Any:
        for item in self.source.graph.input:
            self._quantize(item.name, item.name, self.groups.setdefault(item.name, []))
        for node in self.source.graph.node:
            self._node(node)
        if self.scheme.blocks and all(item.domain != MICROSOFT for item in self.model.opset_import):
            self.model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        front, constants = self.store.finish()
        self.model.graph.initializer.extend(constants)
        if self.compact:
            self._fold(front)
        else:
            nodes = [node for group in self.groups.values() for piece in group for node in piece.nodes]
            graph.replace(self.model.graph.node, nodes)
        graph.drop_dead(self.model)
        shorten(self.model)
        if self.compact:
            trim(self.model)
        return self.model

    def _node(self, node: Any) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        for at, name in enumerate(copy.input):
            copy.input[at] = self.codes_of.get(name, name)
        made = [name for name in node.output if name in self.scheme.ranges]
        for at, name in enumerate(copy.output):
            if name in made and name in self.ends:
                copy.output[at] = name + "_f"  # the graph's output keeps its name: the last node makes it
        carriers = {name: name + "_f" if name in self.ends else name for name in made}
        group = self._group(node)
        known = self.layers.get(node.name, [])
        for at, layer in known:
            copy.name = copy.name or node_name(at)
            self._weights(layer, node, copy, group)
        if made and node.op_type in CUTS and not self._keep_float(node, copy) and self._codes_cut(node):
            carriers[made[0]] = copy.input[0]
        else:
            group.append(Piece((copy,), tuple(copy.output), copy.name))
        if (
            any(layer.compute == "float" and layer.op in HEAVY for _, layer in known)
            and made
            and copy.input[0] != node.input[0]
        ):
            carriers[made[0]] = made[0] + "_k"
            group.append(Piece((_no_quantizing(carriers[made[0]], copy.output[0], 1.0),), (carriers[made[0]],)))
        for name, carrier in carriers.items():
            self._quantize(name, carrier, group)

    def _group(self, node: Any) -> list[Piece]:
        """Open the group of a node; a Relu or Clip carries on the group of what it alone reads."""
        source = node.input[0] if node.op_type in CUTS else ""
        alone = source not in self.codes_of and source not in self.ends and len(self.readers.get(source, ())) == 1
        group = self.groups.pop(source, []) if alone else []
        self.groups[node.output[0]] = group
        return group

    def _quantize(self, name: str, carrier: str, group: list[Piece]) -> None:
        limits = self.scheme.ranges.get(name)
        if limits is not None:
            self.codes_of[name] = name if name in self.ends else name + "_d"
            group.append(self.store.quantized(carrier, self.codes_of[name], limits))

    def _codes_cut(self, node: Any) -> bool:
        """Return whether the codes' own range cuts where this Relu or Clip does, so that it need not be written."""
        limits = self.scheme.ranges[node.output[0]]
        return self.compact and limits.lo == 0 and self._cuts_above(node, limits)

    def _cuts_above(self, node: Any, limits: Range) -> bool:
        if node.op_type == "Relu":
            return True
        low, high = (self.values.get(name) for name in (*node.input, "", "")[1:3])
        return (
            high is not None
            and float(high.reshape(())) >= limits.hi
            and low is not None
            and float(low.reshape(())) == 0
        )

    def _weights(self, layer: Layer, node: Any, copy: Any, group: list[Piece]) -> None:
        """Replace a layer's weights and bias by codes and what unfolds them."""
        if node.name in self.scheme.blocks:
            self._blocks(layer, node, copy, group)
            return
        weight = self.values[layer.weight]
        slot = list(node.input).index(layer.weight)
        feed = self.scheme.ranges.get(node.input[0])
        int8 = layer.compute == "int8" and feed is not None and copy.input[0] != node.input[0]
        given = layer.op in HEAVY and len(node.input) > 2 and bool(node.input[2])
        bias = self.values.get(node.input[2]) if given else None
        codes = self._codes(layer, weight)
        if layer.op in HEAVY and layer.op != "MatMul":
            bias = self.scheme.biases.get(node.name, bias)
        if bias is not None:
            bias = np.broadcast_to(bias.reshape(-1), codes.scales.shape).astype(np.float32)
        if layer.bits == 32 or (not int8 and layer.count < MIN_PACKED):
            made = self.store.constant(bias) if node.name in self.scheme.biases and bias is not None else ""
        elif int8 and feed is not None:
            if bias is not None:
                scale = feed.quant(self.scheme.profile.activation)[0]
                codes = _room_for_bias(codes, weight, bias, scale, self.scheme.profile.weight_bits)
            pieces, copy.input[slot], made = self.store.int8_weights(codes, bias, feed, zeros=layer.op != "Conv")
            group.extend(pieces)
        else:
            pieces, copy.input[slot], made = self.store.float_weights(codes, bias)
            group.extend(pieces)
        if made:
            self._set_bias(copy, made)

    def _blocks(self, layer: Layer, node: Any, copy: Any, group: list[Piece]) -> None:
        """Make the operator one that reads 4-bit weights as they lie, and computes in float."""
        blocks = self.scheme.blocks[node.name]
        given = layer.op == "Gemm" and len(node.input) > 2 and bool(node.input[2])
        pieces, weight, scales = self.store.blocks(blocks)
        group.extend(pieces)
        inputs = [copy.input[0], weight, scales]
        if given or node.name in self.scheme.biases:
            bias = self.scheme.biases.get(node.name)
            inputs += ["", "", node.input[2] if bias is None else self.store.constant(bias)]
        outputs, reads = blocks.values.shape
        copy.CopyFrom(
            onnx.helper.make_node(
                "MatMulNBits", inputs, list(copy.output), copy.name, domain=MICROSOFT,
                K=reads, N=outputs, bits=4, block_size=blocks.size,
            )
        )  # fmt: skip

    def _codes(self, layer: Layer, weight: Array) -> Codes:
        bits = layer.bits if layer.bits in self.widths else 8
        fixed = self.scheme.codes.get(layer.node)
        if fixed is not None and fixed.bits == bits and fixed.values.shape == weight.shape:
            return fixed
        return layer_codes(dataclasses.replace(layer, bits=bits), weight, self.scheme.profile.weight_bits)

    def _keep_float(self, node: Any, copy: Any) -> bool:
        """Where a Relu or Clip stands between a float layer and codes, write it as `_no_quantizing`; say whether it does."""
        maker = self.makers.get(node.input[0])
        known = self.layers.get(maker.name, []) if maker is not None else []
        limits = self.scheme.ranges[node.output[0]]
        if maker is None or maker.input[0] not in self.codes_of or all(layer.compute == "int8" for _, layer in known):
            return False
        if limits.lo == 0 and self._cuts_above(node, limits):
            copy.CopyFrom(_no_quantizing(copy.output[0], copy.input[0], 0.0))
        return True

    def _set_bias(self, node: Any, name: str) -> None:
        if len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)

    def _fold(self, front: list[Any]) -> None:
        """Fold what unfolds weights and what quantizes into functions, then whole layers made of those."""
        folder = Folder(self.model.opset_import, letters)
        groups = list(self.groups.values())
        small = iter(folder.fold([piece for group in groups for piece in group if len(piece.nodes) > 1]))
        groups = [[next(small) if len(piece.nodes) > 1 else piece for piece in group] for group in groups]
        pieces = folder.fold(_joined(groups, self.ends))
        graph.replace(self.model.graph.node, [*front, *(node for piece in pieces for node in piece.nodes)])
        if folder.functions:
            self.model.functions.extend(folder.functions)
            self.model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _no_quantizing(made: str, source: str, slope: float) -> Any:
    """Return a LeakyRelu, which with slope 0 is a Relu and with slope 1 nothing.

    onnxruntime (since 1.21) quantizes float weights by itself, with one scale a tensor, where it sees DequantizeLinear
    → Conv → Relu → QuantizeLinear. It does not know LeakyRelu there, and fuses it into the float kernel all the same.
    """
    return onnx.helper.make_node("LeakyRelu", [source], [made], alpha=slope)


def _joined(groups: list[list[Piece]], ends: set[str]) -> list[Piece]:
    """Return each group as one piece; its outputs are what others read of it."""
    whole = [
        Piece(tuple(n for piece in group for n in piece.nodes), (), "".join(p.name for p in group)) for group in groups
    ]
    read = ends.union(*(piece.inputs for piece in whole))
    return [
        dataclasses.replace(piece, outputs=tuple(name for node in piece.nodes for name in node.output if name in read))
        for piece in whole
        if piece.nodes
    ]


def layer_codes(layer: Layer, weight: Array, weight_bits: int) -> Codes:
    """Return the codes of a layer's weights; encoding is remembered, since a search asks for the same ones often."""
    # In a layer that computes in float no kernel's 16-bit sum can saturate, so its 8-bit codes use the whole range.
    range_bits = weight_bits if layer.compute == "int8" else 8
    return _encode(weight.tobytes(), weight.shape, layer.axis, layer.bits, range_bits)


@functools.lru_cache(maxsize=512)
def _encode(raw: bytes, shape: tuple[int, ...], axis: int, bits: float, range_bits: int) -> Codes:
    return encode(np.frombuffer(raw, np.float32).reshape(shape), axis, bits, range_bits)


def _room_for_bias(codes: Codes, weight: Array, bias: Array, input_scale: float, weight_bits: int) -> Codes:
    """Raise the scale of channels whose bias would overflow int32: nearly dead channels have tiny scales."""
    needed = np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)
    if not (codes.scales < needed).any():
        return codes
    scales = np.maximum(codes.scales, needed * (1 + 2**-10)).astype(np.float32)  # rounding to 16 bits must not undo it
    raised = encode_with(weight, codes.axis, codes.bits, scales, weight_bits)
    keep = np.moveaxis(np.zeros(raised.values.shape, bool), codes.axis, -1) | (codes.scales >= needed)
    return dataclasses.replace(raised, values=np.where(np.moveaxis(keep, -1, codes.axis), codes.values, raised.values))
