"""Write a scheme as a graph that stock onnxruntime turns into its int8 kernels when it loads it.

Stored bits are not compute bits. A 4-bit initializer followed by Cast(INT8) is folded at load into the plain int8
weights that the kernel wants, so the file is half as large and runs at the same speed; the same initializer straight
into DequantizeLinear would be unpacked on every call. A layer that computes in float stores codes too: INTn →
Cast(FLOAT) → Mul(scale) folds to float weights at load (DequantizeLinear does not).
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from compress import graph
from compress.graph import Array
from compress.scheme import Layer, Scheme
from compress.statistics import Statistics
from compress.weights import Codes, encode, pack4
from skills.profile import Profile

INT4_OPSET = 21
INT4_RUNTIME = (1, 23)  # onnxruntime 1.20 to 1.22 have no Cast from INT4 (tried); 1.23 to 1.31 fold it
BIAS_LIMIT = float(1 << 30)  # a bias may take half of the int32 accumulator
MIN_PACKED = 64  # fewer weights than this are stored as they came: the extra nodes would weigh more


def emit(model: Any, scheme: Scheme, seen: Statistics) -> Any:
    """Return the quantized graph. Layers are named `L0`, `L1`, … in the order of `scheme.layers`: short names are bytes."""
    return _Emitter(model, scheme, seen).build()


def node_name(at: int) -> str:
    """Return the name in the emitted graph of the scheme's layer number `at`."""
    return f"L{at}"


def widths(model: Any, profile: Profile) -> tuple[float, ...]:
    """Return the widths, largest first, in which this graph may store weights for the least runtime of the profile."""
    least = tuple(int(part) for part in profile.runtime_min.split("."))
    packed = graph.opset(model) >= INT4_OPSET and least >= INT4_RUNTIME
    return tuple(sorted((bits for bits in profile.stored_bits if bits == 8 or packed), reverse=True))


class _Emitter:
    def __init__(self, model: Any, scheme: Scheme, seen: Statistics) -> None:
        self.source, self.scheme, self.seen = model, scheme, seen
        self.values = graph.arrays(model)
        self.ends = graph.outputs(model)
        self.makers = graph.producers(model)
        self.model = graph.copy(model)
        self.layers = {layer.node: (at, layer) for at, layer in enumerate(scheme.layers)}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.codes_of: dict[str, str] = {}  # activation tensor -> its dequantized form
        self.widths = widths(model, scheme.profile)
        self.fresh = 0

    def build(self) -> Any:
        for item in self.source.graph.input:
            self._quantize(item.name, item.name)
        for node in self.source.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = ""
            for at, name in enumerate(copy.input):
                copy.input[at] = self.codes_of.get(name, name)
            made = [name for name in node.output if name in self.scheme.ranges]
            for at, name in enumerate(copy.output):
                if name in made and name in self.ends:
                    copy.output[at] = name + "_f"  # the graph's output keeps its name: the last node makes it
            known = self.layers.get(node.name)
            if known is not None:
                self._weights(*known, node, copy)
            if made and node.op_type in ("Relu", "Clip"):
                self._keep_float(node, copy)
            self.nodes.append(copy)
            for name in made:
                self._quantize(name, name + "_f" if name in self.ends else name)
        graph.replace(self.model.graph.node, self.nodes)
        self._store_constants()
        graph.drop_dead(self.model)
        self._shorten()
        return self.model

    def _quantize(self, name: str, carrier: str) -> None:
        limits = self.scheme.ranges.get(name)
        if limits is None:
            return
        activation = self.scheme.profile.activation
        scale, zero = limits.quant(activation)
        parameters = [
            self._shared(np.asarray(scale, np.float32)),
            self._shared(np.asarray(zero, np.uint8 if activation == "u8" else np.int8)),
        ]
        codes, values = name + "_q", name if name in self.ends else name + "_d"
        self.nodes.append(onnx.helper.make_node("QuantizeLinear", [carrier, *parameters], [codes]))
        self.nodes.append(onnx.helper.make_node("DequantizeLinear", [codes, *parameters], [values]))
        self.codes_of[name] = values

    def _weights(self, at: int, layer: Layer, node: Any, copy: Any) -> None:
        """Replace a layer's weights (and an int8 layer's bias) by codes and what unfolds them."""
        copy.name = node_name(at)
        weight = self.values[layer.weight]
        feed = self.scheme.ranges.get(node.input[0])
        int8 = layer.compute == "int8" and feed is not None and copy.input[0] != node.input[0]
        if layer.bits == 32 or (not int8 and layer.count < MIN_PACKED):
            return
        bias = self.values.get(node.input[2]) if len(node.input) > 2 else None
        if len(node.input) > 2 and node.input[2] and bias is None and int8:
            return  # a computed bias cannot become int32
        bias = self.scheme.biases.get(node.name, bias)
        codes = self._codes(layer, weight)
        input_scale = feed.quant(self.scheme.profile.activation)[0] if feed is not None and int8 else 1.0
        if int8 and bias is not None:
            codes = _room_for_bias(codes, weight, bias, input_scale, self.scheme.profile.weight_bits)
        if self.scheme.correct_bias and layer.op in ("Conv", "Gemm") and node.input[0] in self.seen:
            bias = corrected_bias(layer, weight, codes, bias, self.seen[node.input[0]].mean)
        if int8:
            copy.input[1] = self._int8(codes, zero_point=layer.op != "Conv")
            if bias is not None:
                self._set_bias(copy, self._int32(bias, codes.scales * np.float32(input_scale)))
        else:
            copy.input[1] = self._unfold_to_float(codes)
            if bias is not None:
                self._set_bias(copy, self._constant(bias.astype(np.float32)))

    def _codes(self, layer: Layer, weight: Array) -> Codes:
        bits = layer.bits if layer.bits in self.widths else 8
        fixed = self.scheme.codes.get(layer.node)
        if fixed is not None and fixed.bits == bits:
            return fixed
        return layer_codes(dataclasses.replace(layer, bits=bits), weight, self.scheme.profile.weight_bits)

    def _keep_float(self, node: Any, copy: Any) -> None:
        """Write the activation behind a float layer between two seams as LeakyRelu with slope 0.

        onnxruntime (since 1.21) quantizes float weights by itself, with one scale a tensor, where it sees DequantizeLinear
        → Conv → Relu → QuantizeLinear. It does not know LeakyRelu there, and fuses it into the float kernel all the same.
        """
        maker = self.makers.get(node.input[0])
        layer = self.layers.get(maker.name) if maker is not None else None
        limits = self.scheme.ranges[node.output[0]]
        if (
            maker is None
            or layer is None
            or layer[1].compute == "int8"
            or maker.input[0] not in self.codes_of
            or limits.lo < 0
        ):
            return
        upper = self.values.get(node.input[2]) if node.op_type == "Clip" and len(node.input) > 2 else None
        if node.op_type == "Clip" and (upper is None or float(upper.reshape(())) < limits.hi):
            return
        copy.op_type = "LeakyRelu"
        del copy.input[1:]
        del copy.attribute[:]
        copy.attribute.append(onnx.helper.make_attribute("alpha", 0.0))

    def _set_bias(self, node: Any, name: str) -> None:
        if len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)

    def _stored(self, codes: Codes) -> str:
        if codes.bits <= 4:
            name = self._name("w")
            packed = TensorProto(name=name, data_type=TensorProto.INT4, dims=codes.values.shape)
            packed.raw_data = pack4(codes.values)
            self.constants[name] = packed
            return name
        return self._constant(codes.values)

    def _int8(self, codes: Codes, *, zero_point: bool) -> str:
        """Unfold to int8 codes; onnxruntime's rule for Gemm and MatMul wants the zero points written out."""
        stored = self._stored(codes)
        if codes.bits <= 4:
            stored = self._make("Cast", [stored], to=TensorProto.INT8)
        inputs = [stored, self._constant(codes.scales)]
        if zero_point:
            inputs.append(self._shared(np.zeros(codes.scales.size, np.int8)))
        return self._make("DequantizeLinear", inputs, axis=codes.axis)

    def _unfold_to_float(self, codes: Codes) -> str:
        shape = [1] * codes.values.ndim
        shape[codes.axis] = -1
        scales = self._constant(codes.scales.reshape(shape))
        return self._make("Mul", [self._make("Cast", [self._stored(codes)], to=TensorProto.FLOAT), scales])

    def _int32(self, bias: Array, scales: Array) -> str:
        limit = float(np.iinfo(np.int32).max)
        whole = np.clip(np.rint(bias.astype(np.float64) / scales), -limit, limit).astype(np.int32)
        return self._make(
            "DequantizeLinear", [self._constant(whole), self._constant(scales.astype(np.float32))], axis=0
        )

    def _make(self, kind: str, inputs: list[str], **facts: object) -> str:
        name = self._name("t")
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], **facts))
        return name

    def _constant(self, value: Array) -> str:
        name = self._name("w")
        self.constants[name] = graph.tensor(name, value)
        return name

    def _shared(self, value: Array) -> str:
        """Store a small constant once, however many nodes read it."""
        key = (value.dtype.name, value.shape, value.tobytes())
        if key not in self.shared:
            self.shared[key] = self._constant(value)
        return self.shared[key]

    def _name(self, letter: str) -> str:
        self.fresh += 1
        return f"skerry.{letter}{self.fresh}"

    def _store_constants(self) -> None:
        self.model.graph.initializer.extend(self.constants.values())

    def _shorten(self) -> None:
        """Give every inner tensor the shortest free name."""
        body = self.model.graph
        keep = {item.name for item in (*body.input, *body.output)}
        if any(attribute.g.node or attribute.graphs for node in body.node for attribute in node.attribute):
            return  # names inside If and Loop bodies refer to the outside
        short: dict[str, str] = {name: name for name in keep} | {"": ""}

        def renamed(name: str) -> str:
            if name not in short:
                candidate = _letters(len(short))
                while candidate in keep:
                    candidate += "_"
                short[name] = candidate
            return short[name]

        for item in body.initializer:
            item.name = renamed(item.name)
        for node in body.node:
            for names in (node.input, node.output):
                for at, name in enumerate(names):
                    names[at] = renamed(name)


def _letters(number: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, len(alphabet))
        text = alphabet[digit] + text
    return text


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
    from compress.weights import encode_with

    needed = np.abs(bias.astype(np.float64)).reshape(-1) / (input_scale * BIAS_LIMIT)
    if bias.size != codes.scales.size or not (codes.scales < needed).any():
        return codes
    scales = np.maximum(codes.scales, needed).astype(np.float32)
    return encode_with(weight, codes.axis, codes.bits, scales, weight_bits)


def corrected_bias(layer: Layer, weight: Array, codes: Codes, bias: Array | None, mean: Array) -> Array | None:
    """Return the bias that cancels what rounding the weights shifts the layer's mean answer by.

    The shift is the weights' error times each input channel's mean over calibration data (Nagel et al. 2019,
    arXiv 1906.04721, section 4.2, with measured means). Padding's zeros at the border are ignored.
    """
    error = (codes.restore() - weight).astype(np.float64)
    per_input = error.reshape(*error.shape[:2], -1).sum(axis=2) if layer.op == "Conv" else error
    out_channels, in_per_group = per_input.shape
    if mean.size != in_per_group * layer.groups:
        return bias
    inputs = mean.reshape(layer.groups, in_per_group)
    grouped = per_input.reshape(layer.groups, out_channels // layer.groups, in_per_group)
    shift = np.einsum("goi,gi->go", grouped, inputs).reshape(-1)
    return np.asarray((np.zeros(1) if bias is None else bias.astype(np.float64)) - shift)
