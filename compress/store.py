"""How the constants of a quantized graph lie in the file: plainly, or as few bytes as onnxruntime can unfold at load.

Plain: each layer has int8 codes, float scales and int32 biases of its own. LiteRT's lowering reads that, and runtimes
too old for anything else.

Compact: codes of one width and shape lie one behind the other, and all scales and biases in one row of 16-bit floats
that is split once. Scales of activations stay single: splitting those too saves 6 bytes each and makes loading half as
slow again. What can be computed is not stored: the int32 bias is the float one
divided by the product of two scales, rounded, in float32 as NumPy would.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from onnx import TensorProto

from compress import graph
from compress.graph import Array
from compress.macros import Piece
from compress.packing import PLANES, pack, padding, unfold
from compress.scheme import Range
from compress.weights import Blocks, Codes, half

Activation = Literal["u8", "s8"]
Unfolded = tuple[list[Piece], str, str]  # the nodes, the name of the weights, the name of the bias
ZERO = {"u8": np.uint8, "s8": np.int8}


class Store(Protocol):
    """Takes constants while the graph is written and gives their nodes and initializers at the end."""

    def constant(self, value: Array) -> str:
        """Store a constant as it is and return its name."""

    def quantized(self, carrier: str, values: str, limits: Range) -> Piece:
        """Return what rounds the tensor `carrier` to 8-bit codes and back to the tensor `values`."""

    def int8_weights(self, codes: Codes, bias: Array | None, feed: Range, *, zeros: bool) -> Unfolded:
        """Return what unfolds an int8 layer's weights and bias, and the names of both ("" without bias).

        `feed` is the range of the layer's input. With `zeros`, zero points are written out, as the runtime's rule for
        Gemm and MatMul wants them.
        """

    def float_weights(self, codes: Codes, bias: Array | None) -> Unfolded:
        """Return what unfolds the weights and bias of a layer that computes in float, and their names."""

    def blocks(self, blocks: Blocks) -> Unfolded:
        """Return what gives `MatMulNBits` its weights and scales, and the names of both."""

    def finish(self) -> tuple[list[Any], list[Any]]:
        """Return the nodes that belong in front of all others, and the initializers."""


class _Writer:
    """Gives names, and stores each small constant once, however many nodes read it."""

    def __init__(self, activation: Activation) -> None:
        self.activation: Activation = activation
        self.constants: dict[str, Any] = {}
        self.shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.fresh = 0
        self.nodes: list[Any] = []

    def name(self) -> str:
        self.fresh += 1
        return f"skerry.{self.fresh}"

    def constant(self, value: Array) -> str:
        name = self.name()
        self.constants[name] = graph.tensor(name, value)
        return name

    def once(self, value: Array) -> str:
        key = (value.dtype.name, value.shape, value.tobytes())
        if key not in self.shared:
            self.shared[key] = self.constant(value)
        return self.shared[key]

    def make(self, kind: str, inputs: list[str], **facts: Any) -> str:
        return self.many(kind, inputs, 1, **facts)[0]

    def many(self, kind: str, inputs: list[str], count: int, **facts: Any) -> list[str]:
        names = [self.name() for _ in range(count)]
        self.nodes.append(onnx.helper.make_node(kind, inputs, names, **facts))
        return names

    def taken(self) -> tuple[Any, ...]:
        """Return the nodes made since the last call."""
        nodes, self.nodes = tuple(self.nodes), []
        return nodes

    def quantized(self, carrier: str, values: str, limits: Range) -> Piece:
        parameters = [
            self.scale(limits),
            self.once(np.asarray(limits.quant(self.activation)[1], ZERO[self.activation])),
        ]
        codes = self.make("QuantizeLinear", [carrier, *parameters])
        self.nodes.append(onnx.helper.make_node("DequantizeLinear", [codes, *parameters], [values]))
        return Piece(self.taken(), (values,))

    def scale(self, limits: Range) -> str:
        return self.once(np.asarray(limits.quant(self.activation)[0], np.float32))

    def blocks(self, blocks: Blocks) -> Unfolded:
        scales = half(blocks.scales)
        short = bool((scales.astype(np.float16) == scales).all())
        stored = self.constant(scales.astype(np.float16) if short else scales)
        name = self.make("Cast", [stored], to=TensorProto.FLOAT) if short else stored
        nodes = self.taken()
        return [Piece(nodes, (name,))] if nodes else [], self.constant(blocks.packed()), name

    def to_float(self, stored: str, scales: str, codes: Codes) -> str:
        return self.make("Mul", [self.make("Cast", [stored], to=TensorProto.FLOAT), scales])


class Plain(_Writer):
    """Eight bits, each layer with constants of its own."""

    def int8_weights(self, codes: Codes, bias: Array | None, feed: Range, *, zeros: bool) -> Unfolded:
        inputs = [self.constant(codes.values), self.constant(codes.scales)]
        if zeros:
            inputs.append(self.once(np.zeros(codes.scales.size, np.int8)))
        weight = self.make("DequantizeLinear", inputs, axis=codes.axis)
        if bias is None:
            return [Piece(self.taken(), (weight,))], weight, ""
        whole, scales = whole_bias(bias, codes.scales, feed.quant(self.activation)[0])
        made = self.make("DequantizeLinear", [self.constant(whole), self.constant(scales)], axis=0)
        return [Piece(self.taken(), (weight, made))], weight, made

    def float_weights(self, codes: Codes, bias: Array | None) -> Unfolded:
        weight = self.to_float(self.constant(codes.values), self.constant(codes.factors()), codes)
        return [Piece(self.taken(), (weight,))], weight, "" if bias is None else self.constant(bias)

    def finish(self) -> tuple[list[Any], list[Any]]:
        return [], list(self.constants.values())


class Compact(_Writer):
    """Any width; what lies together is split when the model is loaded."""

    def __init__(self, activation: Activation) -> None:
        super().__init__(activation)
        self.codes: dict[tuple[float, tuple[int, ...]], list[tuple[str, Array]]] = {}
        self.rows: dict[str, list[tuple[str, Array]]] = {"float16": [], "float32": []}

    def int8_weights(self, codes: Codes, bias: Array | None, feed: Range, *, zeros: bool) -> Unfolded:
        scales, floats = self._scales(codes, bias)
        inputs = [self._codes(codes), scales]
        if zeros:
            inputs.append(self.make("Cast", [self.make("Sub", [scales, scales])], to=TensorProto.INT8))
        weight = self.make("DequantizeLinear", inputs, axis=codes.axis)
        pieces = [Piece(self.taken(), (weight, scales, floats) if floats else (weight,))]
        if bias is None:
            return pieces, weight, ""
        joint = self.make("Mul", [scales, self.scale(feed)])
        whole = self.make("Cast", [self.make("Round", [self.make("Div", [floats, joint])])], to=TensorProto.INT32)
        made = self.make("DequantizeLinear", [whole, joint], axis=0)
        return [*pieces, Piece(self.taken(), (made,))], weight, made

    def float_weights(self, codes: Codes, bias: Array | None) -> Unfolded:
        scales, floats = self._scales(codes, bias)
        shape = codes.factors().shape
        if codes.axis != codes.values.ndim - 1:
            scales = self.make("Reshape", [scales, self.once(np.asarray([-1, *shape[codes.axis + 1 :]], np.int64))])
        weight = self.to_float(self._codes(codes), scales, codes)
        return [Piece(self.taken(), (weight, floats) if floats else (weight,))], weight, floats

    def finish(self) -> tuple[list[Any], list[Any]]:
        for bits in sorted({bits for bits, _ in self.codes}, reverse=True):
            groups = {shape: named for (width, shape), named in self.codes.items() if width == bits}
            if bits in PLANES:
                self._digits(bits, groups)
            else:
                for named in groups.values():
                    stored = self.constant(np.concatenate([values for _, values in named]))
                    self._split(stored, [name for name, _ in named], None)
        for kind, named in self.rows.items():
            if named:
                row = self.constant(np.concatenate([values for _, values in named]).astype(kind))
                row = self.make("Cast", [row], to=TensorProto.FLOAT) if kind == "float16" else row
                self._split(row, [name for name, _ in named], [values.size for _, values in named])
        return list(self.taken()), list(self.constants.values())

    def _scales(self, codes: Codes, bias: Array | None) -> tuple[str, str]:
        if bias is None:
            return self._row(codes.scales, exact=codes.scales.size), ""
        row = self._row(np.concatenate([codes.scales, bias]), exact=codes.scales.size)
        scales, floats = self.many("Split", [row], 2, num_outputs=2)
        return scales, floats

    def _row(self, values: Array, exact: int) -> str:
        """Keep values in 16 bits where those hold the first `exact` of them exactly and the others as numbers at all."""
        name, short = self.name(), values.astype(np.float32)
        with np.errstate(over="ignore"):
            same = bool((short[:exact].astype(np.float16) == short[:exact]).all())
            room = bool(np.isfinite(short.astype(np.float16)).all())
        self.rows["float16" if same and room else "float32"].append((name, short))
        return name

    def _codes(self, codes: Codes) -> str:
        name = self.name()
        self.codes.setdefault((codes.bits, codes.values.shape), []).append((name, codes.values))
        return name

    def _digits(self, bits: float, groups: Mapping[tuple[int, ...], list[tuple[str, Array]]]) -> None:
        """Store codes of all shapes as one row of digits."""
        flat = np.concatenate([values.reshape(-1) for named in groups.values() for _, values in named])
        row = unfold(pack(flat, bits), bits, self.make, self.once)
        parts = {self.name(): len(named) * named[0][1].size for named in groups.values()}
        fill = padding(flat.size, bits)
        self._split(row, [*parts, *([self.name()] if fill else [])], [*parts.values(), *([fill] if fill else [])])
        for part, (shape, named) in zip(parts, groups.items(), strict=True):
            shaped = self.make("Reshape", [part, self.once(np.asarray([-1, *shape[1:]], np.int64))])
            self._split(shaped, [name for name, _ in named], None)

    def _split(self, source: str, names: list[str], sizes: list[int] | None) -> None:
        """Cut `source` into `names`; without sizes, into equal parts."""
        if len(names) == 1:
            for node in self.nodes:  # nothing to cut: the source itself takes the name
                for at, made in enumerate(node.output):
                    node.output[at] = names[0] if made == source else made
            if source in self.constants:
                stored = self.constants.pop(source)
                stored.name = names[0]
                self.constants[names[0]] = stored
            return
        inputs = [source] if sizes is None else [source, self.once(np.asarray(sizes, np.int64))]
        facts = {"num_outputs": len(names)} if sizes is None else {}
        self.nodes.append(onnx.helper.make_node("Split", inputs, names, **facts))


def whole_bias(bias: Array, scales: Array, input_scale: float) -> tuple[Array, Array]:
    """Return an int8 layer's bias as int32 with its scales, computed in float32 as the compact form's operators do."""
    joint = scales.astype(np.float32) * np.float32(input_scale)
    return np.rint(bias.astype(np.float32) / joint).astype(np.int32), joint
